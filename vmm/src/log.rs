//! Log lines with levels: one line per event, never blocking, never growing.
//!
//! ```text
//! 2026-11-21T22:43:05.123456Z [box-1:Warning] vsock: …
//! ```
//!
//! Use [`log_error!`](crate::log_error), [`log_warn!`](crate::log_warn),
//! [`log_info!`](crate::log_info), [`log_debug!`](crate::log_debug) and
//! [`log_trace!`](crate::log_trace) like `format!`; whatever a guest can trigger goes through
//! [`log_limited!`](crate::log_limited). Without any set-up lines of level Info and above go to
//! standard error. A line that would block is dropped and counted.
use std::fmt::{self, Write as _};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

/// How much is logged: everything up to and including the level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
#[repr(u8)]
pub enum Level {
    Off,
    Error,
    #[serde(rename = "Warning")]
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl std::str::FromStr for Level {
    type Err = String;
    /// Any case; `Warn` and `Warning` mean the same.
    fn from_str(text: &str) -> Result<Self, String> {
        const NAMES: [(&str, Level); 7] = [
            ("off", Level::Off),
            ("error", Level::Error),
            ("warn", Level::Warn),
            ("warning", Level::Warn),
            ("info", Level::Info),
            ("debug", Level::Debug),
            ("trace", Level::Trace),
        ];
        NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, level)| *level)
            .ok_or_else(|| {
                format!("{text:?} is no log level; Off, Error, Warning, Info, Debug and Trace are")
            })
    }
}

impl TryFrom<String> for Level {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "Off",
            Self::Error => "Error",
            Self::Warn => "Warning",
            Self::Info => "Info",
            Self::Debug => "Debug",
            Self::Trace => "Trace",
        }
    }
}

/// The level in force, as `Level as u8`: the only thing a disabled line looks at.
static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);
/// Lines that could not be written.
static DROPPED: AtomicU64 = AtomicU64::new(0);
static SETTINGS: Mutex<Settings> = Mutex::new(Settings {
    id: String::new(),
    show_level: true,
    show_origin: false,
    module: String::new(),
    output: None,
});

struct Settings {
    id: String,
    show_level: bool,
    show_origin: bool,
    /// Only modules that begin so.
    module: String,
    /// `None`: standard error.
    output: Option<File>,
}

/// What [`configure`] changes; `None` leaves a setting as it is.
#[derive(Debug, Default)]
pub struct Changes {
    /// `--id`, printed in every line.
    pub id: Option<String>,
    pub level: Option<Level>,
    pub show_level: Option<bool>,
    pub show_origin: Option<bool>,
    pub module: Option<String>,
    /// Opened with [`Expect::Output`](crate::config::Expect::Output), so that it does not block.
    pub output: Option<File>,
}

/// Whether lines go somewhere else than to standard error.
pub fn to_file() -> bool {
    lock().output.is_some()
}

/// Changes settings: `--log-path`, `--level` and so on, `PUT /logger`.
pub fn configure(changes: Changes) {
    if let Some(level) = changes.level {
        LEVEL.store(level as u8, Ordering::Relaxed);
    }
    let mut settings = lock();
    let Settings {
        id,
        show_level,
        show_origin,
        module,
        output,
    } = &mut *settings;
    *id = changes.id.unwrap_or_else(|| std::mem::take(id));
    *show_level = changes.show_level.unwrap_or(*show_level);
    *show_origin = changes.show_origin.unwrap_or(*show_origin);
    *module = changes.module.unwrap_or_else(|| std::mem::take(module));
    if let Some(file) = changes.output {
        *output = Some(file);
    }
}

/// How many lines were lost because nobody read them, since the start.
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Whether lines of this level are written at all.
#[inline]
pub fn enabled(level: Level) -> bool {
    level as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Where a line comes from; made by the macros.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    pub module: &'static str,
    pub file: &'static str,
    pub line: u32,
}

/// Writes one line; use the macros.
pub fn write(level: Level, origin: Origin, text: fmt::Arguments<'_>) {
    let settings = lock();
    if !origin.module.starts_with(settings.module.as_str()) {
        return;
    }
    let mut line = Line::new();
    // Formatting cannot fail: a full line drops the rest.
    let _ = header(&mut line, SystemTime::now(), &settings, level, origin);
    let _ = write!(Escaped(&mut line), "{text}");
    let bytes = line.finish();
    let written = match &settings.output {
        Some(file) => write_whole(file.as_fd(), bytes),
        None => {
            let stderr = rustix::stdio::stderr();
            // Shared with other processes, so it cannot be made non-blocking: a pipe that
            // polls writable takes PIPE_BUF bytes, and a line is shorter.
            writable(stderr) && write_whole(stderr, bytes)
        }
    };
    if !written {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

fn lock() -> MutexGuard<'static, Settings> {
    SETTINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn header(
    line: &mut Line,
    now: SystemTime,
    settings: &Settings,
    level: Level,
    origin: Origin,
) -> fmt::Result {
    write_time(line, now)?;
    write!(line, " [{}", settings.id)?;
    if settings.show_level {
        write!(line, ":{}", level.name())?;
    }
    if settings.show_origin {
        write!(line, ":{}:{}", origin.file, origin.line)?;
    }
    line.write_str("] ")
}

/// RFC 3339 in UTC, with microseconds.
fn write_time(out: &mut impl fmt::Write, now: SystemTime) -> fmt::Result {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = civil_date(seconds / 86_400);
    let of_day = seconds % 86_400;
    write!(
        out,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        since.subsec_micros()
    )
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that the leap day is the last of its year; 719468 days lie
    // between that and the epoch, 146097 are in 400 years.
    let days = days.saturating_add(719_468);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months from March have 153 days in every five.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let (month, next_year) = if month_from_march < 10 {
        (month_from_march + 3, 0)
    } else {
        (month_from_march - 9, 1)
    };
    (era * 400 + year_of_era + next_year, month, day)
}

/// Longest line with its newline, in bytes; less than PIPE_BUF, so that lines of several
/// processes in one FIFO do not mix.
const MAX_LINE: usize = 1024;
const CUT: &[u8] = b"...\n";

/// A line in a fixed buffer.
struct Line {
    bytes: [u8; MAX_LINE],
    length: usize,
    cut: bool,
}

impl Line {
    fn new() -> Self {
        Self {
            bytes: [0; MAX_LINE],
            length: 0,
            cut: false,
        }
    }

    fn finish(&mut self) -> &[u8] {
        let end = if self.cut { CUT } else { b"\n" };
        for (place, byte) in self.bytes.iter_mut().skip(self.length).zip(end) {
            *place = *byte;
        }
        let length = self.length.saturating_add(end.len()).min(MAX_LINE);
        self.bytes.get(..length).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let mut utf8 = [0u8; 4];
            let encoded = c.encode_utf8(&mut utf8).as_bytes();
            let end = self.length.saturating_add(encoded.len());
            if self.cut || end > MAX_LINE - CUT.len() {
                self.cut = true;
                return Ok(());
            }
            if let Some(place) = self.bytes.get_mut(self.length..end) {
                place.copy_from_slice(encoded);
                self.length = end;
            }
        }
        Ok(())
    }
}

/// Guests and clients can put anything into a text: nothing of it may end the line or steer
/// a terminal.
struct Escaped<'a>(&'a mut Line);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            if c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
                write!(self.0, "{}", c.escape_default())?;
            } else {
                self.0.write_char(c)?;
            }
        }
        Ok(())
    }
}

fn writable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&at_once)).is_ok_and(|n| n > 0)
        && fds.iter().all(|f| f.revents().contains(PollFlags::OUT))
}

/// One write: false if not everything went out.
fn write_whole(fd: BorrowedFd<'_>, bytes: &[u8]) -> bool {
    loop {
        match rustix::io::write(fd, bytes) {
            Ok(count) => return count == bytes.len(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Bounds how often one place in the code logs: [`BURST`](Self::BURST) lines in
/// [`WINDOW`](Self::WINDOW), then silence with a count.
#[derive(Debug)]
pub struct RateLimit(Mutex<Window>);

#[derive(Debug)]
struct Window {
    began: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl RateLimit {
    pub const WINDOW: Duration = Duration::from_secs(10);
    pub const BURST: u32 = 5;

    #[allow(clippy::new_without_default)] // statics need a const function
    pub const fn new() -> Self {
        Self(Mutex::new(Window {
            began: None,
            lines: 0,
            suppressed: 0,
        }))
    }

    /// `Some(n)`: the line may be written, and n before it were not.
    pub fn allow(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = window
            .began
            .is_none_or(|began| now.duration_since(began) >= Self::WINDOW);
        if fresh {
            window.began = Some(now);
            window.lines = 0;
        }
        if window.lines < Self::BURST {
            window.lines += 1;
            return Some(std::mem::take(&mut window.suppressed));
        }
        window.suppressed = window.suppressed.saturating_add(1);
        None
    }
}

/// `log_at!(Level::Warn, "…", …)`: one line of that level.
#[macro_export]
macro_rules! log_at {
    ($level:expr, $($text:tt)+) => {{
        let level = $level;
        if $crate::log::enabled(level) {
            let origin = $crate::log::Origin {
                module: ::core::module_path!(),
                file: ::core::file!(),
                line: ::core::line!(),
            };
            $crate::log::write(level, origin, ::core::format_args!($($text)+));
        }
    }};
}

/// `log_limited!(Level::Warn, "…", …)`: for whatever a guest can trigger as often as it likes.
/// Each place in the code has its own [`RateLimit`](crate::log::RateLimit).
#[macro_export]
macro_rules! log_limited {
    ($level:expr, $($text:tt)+) => {{
        static LIMIT: $crate::log::RateLimit = $crate::log::RateLimit::new();
        if $crate::log::enabled($level) {
            match LIMIT.allow(::std::time::Instant::now()) {
                Some(0) => $crate::log_at!($level, $($text)+),
                Some(before) => $crate::log_at!(
                    $level, "{} ({before} more like this)", ::core::format_args!($($text)+)
                ),
                None => {}
            }
        }
    }};
}

/// An error: something did not work.
#[macro_export]
macro_rules! log_error { ($($text:tt)+) => { $crate::log_at!($crate::log::Level::Error, $($text)+) }; }
/// Something is odd, and the VMM goes on.
#[macro_export]
macro_rules! log_warn { ($($text:tt)+) => { $crate::log_at!($crate::log::Level::Warn, $($text)+) }; }
/// An event an operator wants to see.
#[macro_export]
macro_rules! log_info { ($($text:tt)+) => { $crate::log_at!($crate::log::Level::Info, $($text)+) }; }
/// For debugging the VMM.
#[macro_export]
macro_rules! log_debug { ($($text:tt)+) => { $crate::log_at!($crate::log::Level::Debug, $($text)+) }; }
/// For debugging the VMM, very often.
#[macro_export]
macro_rules! log_trace { ($($text:tt)+) => { $crate::log_at!($crate::log::Level::Trace, $($text)+) }; }

#[cfg(test)]
mod tests;
