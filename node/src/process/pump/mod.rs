//! A session connected with descriptors of the host.
//!
//! One loop waits for everything at once: the guest, the user's input and output, signals, limits and the
//! next try to connect. So neither a reader that stops, nor an input that never ends, nor a guest that
//! hangs can keep the others waiting.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::frame::MAX_CHUNK;
use belljar_protocol::v1;

use super::dial::Dial;
use super::error::SessionError;
use super::keys::DetachKeys;
use super::outcome::Outcome;
use super::retry::Retry;
use super::session::{Channel, Event, Session, Started, Step};
use super::sink::Sink;
use super::terminal::RawTerminal;
use crate::poll::PollSet;
use crate::sys::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH, SignalFd};

/// Output held for a reader that is slow. Above it nothing more is read from the guest.
const HELD_MAX: usize = 256 * 1024;
/// Bytes asked for in one read of the connection, from the time on when so many come.
const READ_SIZE: usize = 128 * 1024;
/// Before: most commands say little, and fresh memory is not free.
const FIRST_READ: usize = 8 * 1024;
/// Time for the agent to answer once a limit it enforces has passed.
const AGENT_PATIENCE: Duration = Duration::from_secs(3);
/// A process has to be started, or found, within this time.
const START_LIMIT: Duration = Duration::from_secs(30);
/// What a terminal in raw mode sends for Ctrl-C.
const CTRL_C: u8 = 3;
/// An answer that takes longer is noticed.
const SLOW: Duration = Duration::from_secs(3);
/// The agent confirms within this time that it has detached this viewer.
const DETACH_LIMIT: Duration = Duration::from_secs(5);

/// The signals that [`Io::signals`] should collect without a terminal, and with one.
pub const SIGNALS: [i32; 4] = [SIGINT, SIGQUIT, SIGTERM, SIGHUP];
/// See [`SIGNALS`].
pub const TERMINAL_SIGNALS: [i32; 7] =
    [SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGWINCH, SIGTSTP, SIGCONT];

/// What the user should be told while a session goes on.
#[derive(Debug, PartialEq)]
pub enum Notice<'a> {
    Started(Started),
    Attached(&'a v1::ProcessInfo),
    /// Bytes `from..to` are missing in what is written.
    Gap {
        channel: Channel,
        from: u64,
        to: u64,
    },
    /// The connection was cut some time ago, and cannot be made again.
    Waiting,
    /// The first answer is long in coming.
    Slow,
    /// After [`Notice::Waiting`]: it goes on.
    Resumed,
}

/// What SIGINT and SIGQUIT mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// They go to the command; the second one kills it, the third one gives up.
    Forward,
    /// The session is given up.
    GiveUp,
}

/// What a session is connected with.
pub struct Io<'a, 'n> {
    /// `None`: nothing is passed on.
    pub stdin: Option<BorrowedFd<'a>>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    /// Other signals than SIGINT and SIGQUIT give up.
    pub signals: Option<&'a SignalFd>,
    pub on_interrupt: OnInterrupt,
    /// Of the user, in raw mode.
    pub terminal: Option<RawTerminal<'a>>,
    pub detach_keys: Option<DetachKeys>,
    /// What is typed only leaves: by the keys for that, or by Ctrl-C.
    pub watch_only: bool,
    /// The process has this time in all, and the agent ends it then.
    pub timeout: Option<Duration>,
    /// Written to `stdout` before anything of the process.
    pub first: &'n [u8],
    pub notice: &'n mut dyn FnMut(Notice<'_>),
}

impl<'a, 'n> Io<'a, 'n> {
    /// Output only.
    pub fn new(
        stdout: BorrowedFd<'a>,
        stderr: BorrowedFd<'a>,
        notice: &'n mut dyn FnMut(Notice<'_>),
    ) -> Self {
        Self {
            stdin: None,
            stdout,
            stderr,
            signals: None,
            on_interrupt: OnInterrupt::Forward,
            terminal: None,
            detach_keys: None,
            watch_only: false,
            timeout: None,
            first: b"",
            notice,
        }
    }
}

/// Carries a session to its end.
///
/// # Errors
/// The process could not be started or found, the guest is gone, or its agent broke the protocol.
pub fn run(
    session: Session,
    dial: &dyn Dial,
    io: Io<'_, '_>,
    patience: Patience,
) -> Result<Outcome, SessionError> {
    let begin = Instant::now();
    let end_by = io
        .timeout
        .and_then(|limit| begin.checked_add(limit.checked_add(patience.grace + AGENT_PATIENCE)?));
    let mut pump = Pump {
        session,
        dial,
        stream: None,
        retry: Retry::new(patience.resume),
        stdin: io.stdin,
        stdout: Sink::new(io.stdout),
        stderr: Sink::new(io.stderr),
        signals: io.signals,
        on_interrupt: io.on_interrupt,
        terminal: io.terminal,
        keys: io.detach_keys,
        watch_only: io.watch_only,
        notice: io.notice,
        interrupts: 0,
        start_by: begin + patience.start,
        end_by,
        detach_by: None,
        waiting_told: false,
        buffer: Vec::new(),
        was_full: false,
        outcome: None,
        slow_at: Some(begin + SLOW),
    };
    if let Some(terminal) = &mut pump.terminal {
        terminal.follow(io.first);
    }
    pump.stdout.put(io.first);
    pump.run()
}

/// How long what is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the start or the first attach.
    pub start: Duration,
    /// For a connection that was cut.
    pub resume: Duration,
    /// Between SIGTERM and SIGKILL when the time of a process is over.
    pub grace: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            start: START_LIMIT,
            resume: Duration::from_secs(30),
            grace: super::GRACE,
        }
    }
}

struct Pump<'a, 'n> {
    session: Session,
    dial: &'a dyn Dial,
    stream: Option<UnixStream>,
    retry: Retry,
    /// Until it ends.
    stdin: Option<BorrowedFd<'a>>,
    stdout: Sink<'a>,
    stderr: Sink<'a>,
    signals: Option<&'a SignalFd>,
    on_interrupt: OnInterrupt,
    terminal: Option<RawTerminal<'a>>,
    keys: Option<DetachKeys>,
    watch_only: bool,
    notice: &'n mut dyn FnMut(Notice<'_>),
    interrupts: u32,
    start_by: Instant,
    end_by: Option<Instant>,
    detach_by: Option<Instant>,
    waiting_told: bool,
    buffer: Vec<u8>,
    /// The last read filled it.
    was_full: bool,
    /// Known, and told when all output has been passed on.
    outcome: Option<Outcome>,
    /// Until it was told, or the first answer has come.
    slow_at: Option<Instant>,
}

/// What one wait found.
struct Ready {
    guest: bool,
    room: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    signals: bool,
}

impl Pump<'_, '_> {
    fn run(&mut self) -> Result<Outcome, SessionError> {
        loop {
            if self.stdout.is_empty()
                && self.stderr.is_empty()
                && let Some(outcome) = self.outcome.take()
            {
                return Ok(outcome);
            }
            self.connect()?;
            let deadline = self.deadline();
            let ready = self.wait(deadline)?;
            if ready.signals
                && let Some(outcome) = self.on_signals()?
            {
                return Ok(outcome);
            }
            if ready.stdin {
                self.read_stdin();
            }
            if (ready.stdout && !self.stdout.write_some())
                || (ready.stderr && !self.stderr.write_some())
            {
                return Ok(Outcome::OutputClosed);
            }
            if ready.guest {
                self.read_guest()?;
            }
            if ready.room || ready.stdin || ready.signals {
                self.send()?;
            }
            if let Some(outcome) = self.overdue()? {
                return Ok(outcome);
            }
        }
    }

    // ---- Connections ----

    fn connect(&mut self) -> Result<(), SessionError> {
        if self.stream.is_some() || self.outcome.is_some() || !self.retry.is_due(Instant::now()) {
            return Ok(());
        }
        match self.dial.dial() {
            Ok(stream) => {
                self.session.connected(self.dial.port())?;
                self.retry.connected(Instant::now());
                self.stream = Some(stream);
                self.send()
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(SessionError::Gone(error.to_string()))
            }
            Err(error) => {
                self.retry.failed(Instant::now(), error.to_string());
                Ok(())
            }
        }
    }

    fn cut(&mut self, reason: &str) -> Result<(), SessionError> {
        self.stream = None;
        self.session.disconnected()?;
        self.retry.failed(Instant::now(), reason.to_owned());
        Ok(())
    }

    /// Sends what the connection takes now.
    fn send(&mut self) -> Result<(), SessionError> {
        loop {
            let Some(stream) = &mut self.stream else {
                return Ok(());
            };
            let unsent = self.session.unsent();
            if unsent.is_empty() {
                return Ok(());
            }
            match stream.write(unsent) {
                Ok(count) => self.session.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What the guest sent last is still to be read; reading tells the cut.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_gone(&error) => {
                    return Ok(());
                }
                Err(error) => return self.cut(&error.to_string()),
            }
        }
    }

    // ---- Time ----

    fn deadline(&self) -> Option<Instant> {
        if let Some(outcome) = &self.outcome {
            // Only the reader of the output is waited for, and no time bounds that, unless there was no more.
            return self.end_by.filter(|_| outcome.is_timed_out());
        }
        let start = (!self.session.is_started()).then_some(self.start_by);
        let redial = self.stream.is_none().then(|| self.retry.next()).flatten();
        let slow = self.slow_at.filter(|_| start.is_some());
        [start, slow, self.end_by, self.detach_by, redial]
            .into_iter()
            .flatten()
            .min()
    }

    fn overdue(&mut self) -> Result<Option<Outcome>, SessionError> {
        let now = Instant::now();
        let passed = |limit: Option<Instant>| limit.is_some_and(|limit| now >= limit);
        if let Some(outcome) = &self.outcome {
            let is_over = outcome.is_timed_out() && passed(self.end_by);
            return Ok(self.outcome.take_if(|_| is_over));
        }
        if !self.session.is_started() && passed(Some(self.start_by)) {
            return Err(SessionError::NoAnswer(START_LIMIT));
        }
        if passed(self.slow_at) {
            self.slow_at = None;
            if !self.session.is_started() {
                (self.notice)(Notice::Slow);
            }
        }
        if passed(self.end_by) {
            return Ok(Some(Outcome::TimedOut));
        }
        if passed(self.detach_by) {
            return Err(SessionError::NoAnswer(DETACH_LIMIT));
        }
        if self.stream.is_none() {
            if let Some(reason) = self.retry.given_up(now) {
                return Err(SessionError::Unreachable {
                    limit: self.retry.limit(),
                    reason,
                });
            }
            if self.retry.is_noticeable(now) && !std::mem::replace(&mut self.waiting_told, true) {
                (self.notice)(Notice::Waiting);
            }
        }
        Ok(None)
    }

    fn wait(&mut self, deadline: Option<Instant>) -> io::Result<Ready> {
        let running = self.outcome.is_none();
        let wants_input = running && self.session.wants_input();
        let has_unsent = running && self.session.has_unsent();
        let mut set = PollSet::default();
        let held = self.stdout.len().saturating_add(self.stderr.len());
        let stream = self.stream.as_ref().filter(|_| running);
        let guest = stream
            .filter(|_| held < HELD_MAX)
            .map(|stream| set.readable(stream.as_fd()));
        let room = stream
            .filter(|_| has_unsent)
            .map(|stream| set.writable(stream.as_fd()));
        let stdin = self
            .stdin
            .filter(|_| wants_input)
            .map(|fd| set.readable(fd));
        let stdout = self.stdout.waiting().map(|fd| set.writable(fd));
        let stderr = self.stderr.waiting().map(|fd| set.writable(fd));
        let signals = self.signals.map(|fd| set.readable(fd.as_fd()));
        let polled = set.wait(deadline)?;
        let is_ready = |slot: Option<usize>| slot.is_some_and(|slot| polled.is_ready(slot));
        Ok(Ready {
            guest: is_ready(guest),
            room: is_ready(room),
            stdin: is_ready(stdin),
            stdout: is_ready(stdout),
            stderr: is_ready(stderr),
            signals: is_ready(signals),
        })
    }

    // ---- The user ----

    fn on_signals(&mut self) -> Result<Option<Outcome>, SessionError> {
        while let Some(signal) = self.signals.and_then(SignalFd::take) {
            match signal {
                SIGWINCH => self.follow_size(),
                SIGTSTP => {
                    if let Some(terminal) = &mut self.terminal {
                        terminal.suspend()?;
                    }
                }
                SIGCONT => {
                    if let Some(terminal) = &self.terminal {
                        terminal.resume()?;
                    }
                    self.follow_size();
                }
                SIGINT | SIGQUIT if self.on_interrupt == OnInterrupt::Forward => {
                    self.interrupts = self.interrupts.saturating_add(1);
                    match self.interrupts {
                        1 => self.session.signal(signal),
                        2 => self.session.signal(crate::sys::SIGKILL),
                        _ => return Ok(Some(Outcome::GivenUp(signal))),
                    }
                    if !self.session.is_started() || self.outcome.is_some() {
                        return Ok(Some(Outcome::GivenUp(signal)));
                    }
                }
                _ => return Ok(Some(Outcome::GivenUp(signal))),
            }
        }
        Ok(None)
    }

    fn follow_size(&mut self) {
        if let Some(size) = self.terminal.as_ref().and_then(RawTerminal::size) {
            self.session.resize(size);
        }
    }

    fn read_stdin(&mut self) {
        let Some(stdin) = self.stdin else {
            return;
        };
        grow(&mut self.buffer, self.was_full);
        let limit = self.buffer.len().min(MAX_CHUNK);
        let window = self.buffer.get_mut(..limit).unwrap_or_default();
        match rustix::io::read(stdin, window) {
            Ok(count) if count > 0 => {
                self.was_full = count == limit;
                self.typed(count);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            // An input that cannot be read is at its end.
            Ok(_) | Err(_) => {
                self.session.input_end();
                self.stdin = None;
            }
        }
    }

    /// The first bytes of the buffer were typed.
    fn typed(&mut self, count: usize) {
        let typed = self.buffer.get(..count).unwrap_or_default();
        let Some(keys) = &mut self.keys else {
            self.session.input(typed);
            return;
        };
        let mut wanted = Vec::with_capacity(count);
        let left = keys.filter(typed, &mut wanted);
        if self.watch_only {
            let interrupted = wanted.contains(&CTRL_C);
            if left {
                self.outcome = Some(Outcome::Detached);
            } else if interrupted {
                self.outcome = Some(Outcome::GivenUp(SIGINT));
            }
            return;
        }
        self.session.input(&wanted);
        if left {
            self.session.detach();
            self.stdin = None;
            self.detach_by = Instant::now().checked_add(DETACH_LIMIT);
        }
    }

    // ---- The guest ----

    fn read_guest(&mut self) -> Result<(), SessionError> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        grow(&mut self.buffer, self.was_full);
        let count = match stream.read(&mut self.buffer) {
            Ok(0) => return self.cut("the guest closed the connection"),
            Ok(count) => count,
            Err(error) if is_passing(&error) => return Ok(()),
            Err(error) => return self.cut(&error.to_string()),
        };
        self.was_full = count == self.buffer.len();
        let step = self.take(count)?;
        // Most output is short and its reader waits: saves a round through poll.
        self.stdout.write_at_once()?;
        self.stderr.write_at_once()?;
        match step {
            Step::Continue => {}
            Step::Redial | Step::Later => {
                self.stream = None;
                self.session.moved_on();
                self.retry.again(Instant::now(), step == Step::Later);
            }
            // A detached process goes on; others have ended.
            Step::Over => self.stream = None,
        }
        Ok(())
    }

    /// The first bytes of the buffer came from the guest.
    fn take(&mut self, count: usize) -> Result<Step, SessionError> {
        let bytes = self.buffer.get(..count).unwrap_or_default();
        let (stdout, stderr, terminal) = (&mut self.stdout, &mut self.stderr, &mut self.terminal);
        let (notice, outcome) = (&mut self.notice, &mut self.outcome);
        let mut progress = false;
        let step = self.session.receive(bytes, |event| match event {
            Event::Output(channel, bytes) => {
                progress = true;
                if let Some(terminal) = terminal {
                    terminal.follow(bytes);
                }
                match channel {
                    Channel::Stdout => stdout.put(bytes),
                    Channel::Stderr => stderr.put(bytes),
                }
            }
            Event::Started(started) => {
                *outcome = Some(Outcome::Started(started));
                notice(Notice::Started(started));
            }
            Event::Attached(info) => notice(Notice::Attached(info)),
            Event::Gap { channel, from, to } => notice(Notice::Gap { channel, from, to }),
            Event::Ended(end) => *outcome = Some(Outcome::of(end)),
            Event::Detached => *outcome = Some(Outcome::Detached),
            Event::Resized(_) | Event::CaughtUp => {}
        })?;
        // A start is the outcome only if nothing follows it.
        if step != Step::Over {
            self.outcome = None;
        }
        if self.session.is_streaming() {
            self.retry.works(progress);
            if std::mem::take(&mut self.waiting_told) {
                (self.notice)(Notice::Resumed);
            }
        }
        Ok(step)
    }
}

/// Makes room for a read.
fn grow(buffer: &mut Vec<u8>, was_full: bool) {
    let wanted = if was_full { READ_SIZE } else { FIRST_READ };
    if buffer.len() < wanted {
        buffer.resize(wanted, 0);
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests;
