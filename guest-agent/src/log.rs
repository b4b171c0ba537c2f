//! One line per event of note, on the guest's console. Never blocks: PID 1 must not hang because
//! nobody reads its console.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

const PREFIX: &str = "belljar-agent: ";

/// Longest line, bytes; what is beyond is cut.
const MAX_LINE: usize = 900;

static CONSOLE: OnceLock<File> = OnceLock::new();

/// Opens the console: the kernel's choice, the virtio console, or the kernel's own log. Until then
/// lines go to standard error.
pub(crate) fn open_console() {
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    for path in ["/dev/console", "/dev/hvc0", "/dev/kmsg"] {
        if let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) {
            let _ = CONSOLE.set(File::from(fd));
            return;
        }
    }
}

/// Writes one line. Use [`crate::log!`].
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let mut line = format!("{PREFIX}{text}").into_bytes();
    line.truncate(MAX_LINE);
    for byte in &mut line {
        if byte.is_ascii_control() {
            *byte = b' ';
        }
    }
    line.push(b'\n');
    // A line that cannot be written is lost; there is nowhere to say so.
    match CONSOLE.get() {
        Some(mut console) => drop(console.write(&line)),
        None => drop(rustix::io::write(rustix::stdio::stderr(), &line)),
    }
}

/// Formats its arguments into one line of the log.
#[macro_export]
macro_rules! log {
    ($($arguments:tt)*) => { $crate::log::line(format_args!($($arguments)*)) };
}

/// Puts `/dev/null` on descriptors 0 to 2, so that nothing else ever lands there.
pub(crate) fn detach_stdio(null: &OwnedFd) -> rustix::io::Result<()> {
    rustix::stdio::dup2_stdin(null)?;
    rustix::stdio::dup2_stdout(null)?;
    rustix::stdio::dup2_stderr(null)
}
