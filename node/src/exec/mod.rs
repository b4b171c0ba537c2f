//! A command in a guest with its streams connected to descriptors of the host.
//!
//! One loop waits for everything at once: the guest, the user's input and output, signals and the
//! limit. So neither a reader that stops, nor an input that never ends, nor a guest that hangs can
//! keep the others waiting.

mod wire;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::v1;

pub use wire::{ExecError, WireEvent};

use crate::poll::PollSet;
use crate::sys::SignalFd;
use wire::Wire;

/// Output held for a reader that is slow. Above it nothing more is read from the guest.
const HELD_MAX: usize = 256 * 1024;
/// After `poll` says that a pipe has room, this much can be written without waiting (`pipe(7)`, PIPE_BUF).
const SAFE_WRITE: usize = 4096;
/// Time for the agent to answer once a limit it enforces has passed.
const AGENT_PATIENCE: Duration = Duration::from_secs(3);
/// Between SIGTERM and SIGKILL when a command's time is over.
const GRACE: Duration = Duration::from_secs(2);
/// A command has to be started within this time.
const START_LIMIT: Duration = Duration::from_secs(30);

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct ExecSpec {
    /// Program and arguments; no shell is involved.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// Empty: `/`.
    pub workdir: Vec<u8>,
    /// `USER` or `USER:GROUP`, names or numbers. Empty: root.
    pub user: String,
    pub timeout: Option<Duration>,
}

/// Descriptors of the host that a command is connected to.
#[derive(Debug, Clone, Copy)]
pub struct Streams<'a> {
    /// `None`: the command reads nothing.
    pub stdin: Option<BorrowedFd<'a>>,
    pub stdout: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    /// SIGINT goes to the command, a second one kills it, a third one gives up; other signals give up.
    pub signals: Option<&'a SignalFd>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// As the guest says.
    Ended(v1::end::How),
    /// This host's limit passed, and the guest did not even answer.
    TimedOut,
    /// Whoever read the output is gone.
    OutputClosed,
    /// The user gave up with this signal.
    GivenUp(i32),
}

impl Outcome {
    /// The exit status of a command line: the command's own, 128+n after a signal, 124 for the time limit,
    /// 125 if the end is not known.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        use v1::end::How;
        let after_signal = |number: u32| u8::try_from(number.saturating_add(128)).unwrap_or(255);
        match self {
            Self::Ended(How::Exited(exited)) => u8::try_from(exited.code).unwrap_or(255),
            Self::Ended(How::Signalled(signalled)) => after_signal(signalled.number),
            Self::Ended(How::TimedOut(_)) | Self::TimedOut => 124,
            Self::Ended(How::OutOfMemory(_)) => after_signal(9),
            Self::Ended(How::Lost(_)) => 125,
            Self::OutputClosed => after_signal(13),
            Self::GivenUp(signal) => after_signal(u32::try_from(*signal).unwrap_or(0)),
        }
    }
}

/// Runs a command over a connection to the agent's port.
///
/// # Errors
/// It could not be started, or the agent broke the protocol.
pub fn exec(
    stream: UnixStream,
    spec: &ExecSpec,
    streams: Streams<'_>,
) -> Result<Outcome, ExecError> {
    stream.set_nonblocking(true)?;
    let begin = Instant::now();
    let pump = Pump {
        wire: Wire::start(&request(spec, streams.stdin.is_some()))?,
        stream,
        stdin: streams.stdin,
        stdout: Sink::new(streams.stdout),
        stderr: Sink::new(streams.stderr),
        signals: streams.signals,
        interrupts: 0,
        start_by: begin + START_LIMIT,
        end_by: spec
            .timeout
            .map(|limit| begin + limit + GRACE + AGENT_PATIENCE),
    };
    pump.run()
}

fn request(spec: &ExecSpec, stdin: bool) -> v1::Exec {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let stdin = if stdin {
        v1::exec::Stdin::Stream
    } else {
        v1::exec::Stdin::Closed
    };
    v1::Exec {
        argv: spec.argv.clone(),
        env: spec.env.clone(),
        cwd: spec.workdir.clone(),
        user: spec.user.clone(),
        stdin: stdin.into(),
        // 0 would mean no limit at all.
        time_limit_ms: spec.timeout.map_or(0, |limit| millis(limit).max(1)),
        grace_ms: Some(millis(GRACE)),
        ..v1::Exec::default()
    }
}

struct Pump<'a> {
    wire: Wire,
    stream: UnixStream,
    /// Until it ends.
    stdin: Option<BorrowedFd<'a>>,
    stdout: Sink<'a>,
    stderr: Sink<'a>,
    signals: Option<&'a SignalFd>,
    interrupts: u32,
    start_by: Instant,
    end_by: Option<Instant>,
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

impl Pump<'_> {
    fn run(mut self) -> Result<Outcome, ExecError> {
        let mut end = None;
        loop {
            // The end is only told when all output has been passed on.
            if let Some(how) = &end
                && self.stdout.held.is_empty()
                && self.stderr.held.is_empty()
            {
                return Ok(Outcome::Ended(v1::end::How::clone(how)));
            }
            // After the end only the reader of the output is waited for, and no time bounds that.
            let deadline = if end.is_none() { self.deadline() } else { None };
            let ready = self.wait(end.is_none(), deadline)?;
            if ready.signals
                && let Some(outcome) = self.on_signal()?
            {
                return Ok(outcome);
            }
            if ready.room {
                self.send()?;
            }
            if ready.stdin {
                self.read_stdin()?;
            }
            if (ready.stdout && !self.stdout.write_some())
                || (ready.stderr && !self.stderr.write_some())
            {
                return Ok(Outcome::OutputClosed);
            }
            if ready.guest && end.is_none() {
                end = self.read_guest()?;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) && end.is_none() {
                return if self.wire.is_started() {
                    Ok(Outcome::TimedOut)
                } else {
                    Err(ExecError::NoAnswer(START_LIMIT))
                };
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let start = (!self.wire.is_started()).then_some(self.start_by);
        [start, self.end_by].into_iter().flatten().min()
    }

    fn wait(&self, running: bool, deadline: Option<Instant>) -> io::Result<Ready> {
        let mut set = PollSet::default();
        let held = self
            .stdout
            .held
            .len()
            .saturating_add(self.stderr.held.len());
        let guest = (running && held < HELD_MAX).then(|| set.readable(self.stream.as_fd()));
        let unsent = self.wire.unsent();
        let room = (running && !unsent.is_empty()).then(|| set.writable(self.stream.as_fd()));
        let stdin = self
            .stdin
            .filter(|_| running && unsent.is_empty() && self.wire.is_started())
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

    fn on_signal(&mut self) -> Result<Option<Outcome>, ExecError> {
        let Some(signal) = self.signals.and_then(SignalFd::take) else {
            return Ok(None);
        };
        if signal != libc::SIGINT {
            return Ok(Some(Outcome::GivenUp(signal)));
        }
        self.interrupts = self.interrupts.saturating_add(1);
        match self.interrupts {
            1 => self.wire.signal(libc::SIGINT)?,
            2 => self.wire.signal(libc::SIGKILL)?,
            _ => return Ok(Some(Outcome::GivenUp(signal))),
        }
        Ok(None)
    }

    fn send(&mut self) -> io::Result<()> {
        match self.stream.write(self.wire.unsent()) {
            Ok(count) => {
                self.wire.sent(count);
                Ok(())
            }
            // A guest that is gone is noticed by reading.
            Err(error) if is_gone(&error) => {
                self.wire.sent(usize::MAX);
                self.stdin = None;
                Ok(())
            }
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn read_stdin(&mut self) -> Result<(), ExecError> {
        let Some(stdin) = self.stdin else {
            return Ok(());
        };
        let mut buffer = vec![0u8; belljar_protocol::frame::MAX_CHUNK];
        match rustix::io::read(stdin, &mut buffer[..]) {
            Ok(count) if count > 0 => self.wire.input(buffer.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            // An input that cannot be read is at its end.
            Ok(_) | Err(_) => {
                self.wire.input_end()?;
                self.stdin = None;
            }
        }
        Ok(())
    }

    fn read_guest(&mut self) -> Result<Option<v1::end::How>, ExecError> {
        let mut buffer = [0u8; 64 * 1024];
        let count = match self.stream.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if is_passing(&error) => return Ok(None),
            Err(error) if is_gone(&error) => 0,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return self.wire.cut().map(Some);
        }
        let mut end = None;
        self.wire.receive(
            buffer.get(..count).unwrap_or_default(),
            |event| match event {
                WireEvent::Stdout(bytes) => self.stdout.held.extend_from_slice(bytes),
                WireEvent::Stderr(bytes) => self.stderr.held.extend_from_slice(bytes),
                WireEvent::End(how) => end = Some(how),
            },
        )?;
        // Most output is short and its reader waits: saves a round through poll.
        self.stdout.write_at_once()?;
        self.stderr.write_at_once()?;
        Ok(end)
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

/// A descriptor of the host that output goes to. It may be shared with other programs, so it is not
/// made non-blocking.
struct Sink<'a> {
    fd: BorrowedFd<'a>,
    held: Vec<u8>,
    /// Files always have room.
    never_blocks: bool,
}

impl<'a> Sink<'a> {
    fn new(fd: BorrowedFd<'a>) -> Self {
        let kind =
            rustix::fs::fstat(fd).map(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode));
        Self {
            fd,
            held: Vec::new(),
            never_blocks: kind == Ok(rustix::fs::FileType::RegularFile),
        }
    }

    /// The descriptor, if there is something to write to it.
    fn waiting(&self) -> Option<BorrowedFd<'a>> {
        (!self.held.is_empty()).then_some(self.fd)
    }

    /// Writes what fits; `false` if nobody reads it any more.
    fn write_some(&mut self) -> bool {
        let safe = if self.never_blocks {
            self.held.len()
        } else {
            self.held.len().min(SAFE_WRITE)
        };
        match rustix::io::write(self.fd, self.held.get(..safe).unwrap_or_default()) {
            Ok(count) => {
                self.held.drain(..count.min(self.held.len()));
                true
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => true,
            Err(_) => false,
        }
    }

    /// Writes as long as that cannot block. Errors are left to the next round.
    fn write_at_once(&mut self) -> io::Result<()> {
        while !self.held.is_empty() {
            let mut set = PollSet::default();
            let slot = set.writable(self.fd);
            if !set.wait(Some(Instant::now()))?.is_ready(slot) || !self.write_some() {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
