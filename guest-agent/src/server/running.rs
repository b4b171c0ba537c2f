//! A program that runs for a connection: its pipes, its cgroup and its life.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use belljar_protocol::frame::Decoder;
use belljar_protocol::v1;
use prost::Message;
use rustix::fs::{Gid, OFlags, Uid};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use super::socket::{Gone, Socket};
use crate::exec::cgroup::Leaf;
use crate::exec::lifecycle::{Action, Lifecycle};
use crate::sys;

/// Input held for a program that does not read it, bytes; one frame more at most.
const INPUT_HELD: usize = 256 << 10;

/// The end of an output pipe that the agent reads.
#[derive(Debug)]
pub(crate) struct Output {
    fd: OwnedFd,
    /// Field of `ExecOutput`.
    field: u32,
    pub(crate) readable: bool,
    /// Set when the program has ended: bytes that were in the pipe then. What comes later is from
    /// others that hold the pipe, and does not keep the call open.
    left: Option<usize>,
}

/// The end of the input pipe that the agent writes.
#[derive(Debug)]
pub(crate) struct Input {
    fd: OwnedFd,
    pub(crate) writable: bool,
    pending: Vec<u8>,
    written: usize,
    /// The host has sent the end; the pipe is closed after the pending bytes.
    closing: bool,
}

/// What one turn of the pump did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Something moved; there may be more.
    Progress,
    /// Nothing to do until the system reports something.
    Idle,
    /// The program has ended and everything is queued: the end was sent.
    Done,
}

/// A program and everything that belongs to it.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: i32,
    pub(crate) leaf: Option<Leaf>,
    pub(crate) life: Lifecycle,
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    /// Bytes from the host behind the request, not yet looked at.
    pub(crate) backlog: Vec<u8>,
}

/// The child's ends, to be closed once it runs.
#[derive(Debug)]
pub(crate) struct ChildEnds {
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl ChildEnds {
    /// Descriptors for the child's 0, 1 and 2; `null` where it gets no input.
    pub(crate) fn stdio(&self, null: &OwnedFd) -> [i32; 3] {
        [
            self.stdin.as_ref().unwrap_or(null).as_raw_fd(),
            self.stdout.as_raw_fd(),
            self.stderr.as_raw_fd(),
        ]
    }
}

impl ChildEnds {
    /// Gives the pipes to the user of the program, who may open them again by name
    /// (`/dev/stderr`), which the mode of a pipe allows to its owner only.
    pub(crate) fn give_to(&self, uid: u32, gid: u32) {
        for fd in [self.stdin.as_ref(), Some(&self.stdout), Some(&self.stderr)] {
            let owner = (Uid::from_raw(uid), Gid::from_raw(gid));
            // Without it most programs run all the same.
            let _ = fd.map(|fd| rustix::fs::fchown(fd, Some(owner.0), Some(owner.1)));
        }
    }
}

/// The agent's ends.
#[derive(Debug)]
pub(crate) struct OwnEnds {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
}

/// Makes the pipes of a program.
pub(crate) fn pipes(with_stdin: bool) -> rustix::io::Result<(OwnEnds, ChildEnds)> {
    let (out_read, out_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (err_read, err_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&out_read, OFlags::NONBLOCK)?;
    rustix::fs::fcntl_setfl(&err_read, OFlags::NONBLOCK)?;
    let (input, child_input) = if with_stdin {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&write, OFlags::NONBLOCK)?;
        let input = Input {
            fd: write,
            writable: true,
            pending: Vec::new(),
            written: 0,
            closing: false,
        };
        (Some(input), Some(read))
    } else {
        (None, None)
    };
    let own = OwnEnds {
        stdin: input,
        stdout: Output::new(out_read, 1),
        stderr: Output::new(err_read, 2),
    };
    let child = ChildEnds {
        stdin: child_input,
        stdout: out_write,
        stderr: err_write,
    };
    Ok((own, child))
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Output {
    const fn new(fd: OwnedFd, field: u32) -> Self {
        Self {
            fd,
            field,
            readable: false,
            left: None,
        }
    }

    /// Moves one piece to the socket. `None`: this stream is finished.
    fn pump(&mut self, socket: &mut Socket, scratch: &mut [u8]) -> Option<Turn> {
        let wanted = self.left.unwrap_or(scratch.len()).min(scratch.len());
        if wanted == 0 {
            return None;
        }
        if !self.readable {
            return Some(Turn::Idle);
        }
        let buffer = scratch.get_mut(..wanted).unwrap_or_default();
        match rustix::io::read(&self.fd, &mut *buffer) {
            Ok(0) => None,
            Ok(got) => {
                socket.queue_chunk(self.field, buffer.get(..got).unwrap_or_default());
                if let Some(left) = &mut self.left {
                    *left = left.saturating_sub(got);
                } else if got < wanted {
                    // The pipe is empty; the next write reports itself.
                    self.readable = false;
                }
                Some(Turn::Progress)
            }
            Err(Errno::INTR) => Some(Turn::Progress),
            Err(Errno::AGAIN) if self.left.is_none() => {
                self.readable = false;
                Some(Turn::Idle)
            }
            Err(_) => None,
        }
    }

    /// From now on only what is in the pipe at this moment counts.
    fn program_ended(&mut self) {
        let held = rustix::io::ioctl_fionread(&self.fd).unwrap_or(0);
        self.left = Some(usize::try_from(held).unwrap_or(usize::MAX));
        self.readable = true;
    }
}

impl Input {
    const fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes no more until the program has read. There is room for a good deal, so that a signal
    /// behind unread input still arrives.
    const fn is_full(&self) -> bool {
        self.pending.len().saturating_sub(self.written) >= INPUT_HELD
    }

    fn push(&mut self, bytes: Vec<u8>) {
        if self.pending.is_empty() {
            self.pending = bytes;
            return;
        }
        self.pending.drain(..self.written);
        self.written = 0;
        self.pending.extend_from_slice(&bytes);
    }

    /// Writes what it can. `Err`: nobody reads any more.
    fn flush(&mut self) -> Result<Turn, Errno> {
        let mut turn = Turn::Idle;
        while self.writable && self.is_pending() {
            let rest = self.pending.get(self.written..).unwrap_or_default();
            match rustix::io::write(&self.fd, rest) {
                Ok(written) => {
                    self.written = self.written.saturating_add(written);
                    turn = Turn::Progress;
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            if self.written >= self.pending.len() {
                self.pending = Vec::new();
                self.written = 0;
            }
        }
        Ok(turn)
    }
}

impl Running {
    /// Moves what can be moved, one piece of each kind.
    pub(crate) fn turn(
        &mut self,
        socket: &mut Socket,
        decoder: &mut Decoder,
        scratch: &mut [u8],
    ) -> Result<Turn, Gone> {
        socket.flush()?;
        let mut turn = self.take_input(socket, decoder, scratch)?;
        if socket.is_drained() {
            for output in [&mut self.stdout, &mut self.stderr] {
                match output.as_mut().map(|open| open.pump(socket, scratch)) {
                    Some(Some(Turn::Idle)) | None => {}
                    Some(Some(_)) => turn = Turn::Progress,
                    Some(None) => *output = None,
                }
            }
        }
        if let Some(how) = self.life.end()
            && self.stdout.is_none()
            && self.stderr.is_none()
        {
            let end = v1::End {
                how: Some(how.clone()),
                ..v1::End::default()
            };
            let output = Some(v1::exec_output::Output::End(end));
            socket.queue(&v1::ExecOutput { output });
            turn = Turn::Done;
        }
        socket.flush()?;
        Ok(turn)
    }

    /// Takes frames from the host until the program's input is full.
    fn take_input(
        &mut self,
        socket: &mut Socket,
        decoder: &mut Decoder,
        scratch: &mut [u8],
    ) -> Result<Turn, Gone> {
        if self.life.end().is_some() {
            return Ok(Turn::Idle);
        }
        let mut turn = self.flush_stdin();
        let backlog = std::mem::take(&mut self.backlog);
        let mut bytes = backlog.as_slice();
        if bytes.is_empty() && !self.stdin.as_ref().is_some_and(Input::is_full) {
            let got = socket.receive(scratch)?;
            bytes = scratch.get(..got).unwrap_or_default();
        }
        while !bytes.is_empty() {
            if self.stdin.as_ref().is_some_and(Input::is_full) {
                self.backlog = bytes.to_vec();
                return Ok(turn);
            }
            turn = Turn::Progress;
            let frame = decoder.feed(&mut bytes).map_err(|error| {
                crate::log!("connection dropped: {error}");
                Gone
            })?;
            if let Some(frame) = frame {
                self.take_frame(&frame)?;
                self.flush_stdin();
            }
        }
        Ok(turn)
    }

    fn take_frame(&mut self, frame: &[u8]) -> Result<(), Gone> {
        let message = v1::ExecInput::decode(frame).map_err(|error| {
            crate::log!("connection dropped: input of exec: {error}");
            Gone
        })?;
        match (message.input, &mut self.stdin) {
            (Some(v1::exec_input::Input::Stdin(bytes)), Some(stdin)) if !stdin.closing => {
                stdin.push(bytes);
            }
            (Some(v1::exec_input::Input::StdinEof(_)), Some(stdin)) => stdin.closing = true,
            (Some(v1::exec_input::Input::Signal(number)), _) => {
                sys::signal_group(self.pid, number);
            }
            // Without a pipe (closed from the start, by the end of input, or by the program) bytes
            // have no place to go.
            _ => {}
        }
        Ok(())
    }

    fn flush_stdin(&mut self) -> Turn {
        let Some(stdin) = &mut self.stdin else {
            return Turn::Idle;
        };
        let flushed = stdin.flush();
        let is_over = stdin.closing && !stdin.is_pending();
        if flushed.is_err() || is_over {
            self.stdin = None;
        }
        flushed.unwrap_or(Turn::Progress)
    }

    /// The program has ended.
    pub(crate) fn program_ended(&mut self) {
        self.stdin = None;
        self.backlog = Vec::new();
        for output in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            output.program_ended();
        }
    }

    /// Tells the life of the program the time and does what follows.
    pub(crate) fn tick(&mut self, now: Instant) {
        if let Some(action) = self.life.tick(now) {
            self.act(action);
        }
    }

    pub(crate) fn act(&self, action: Action) {
        match action {
            Action::Terminate => sys::signal_group(self.pid, libc::SIGTERM as u32),
            Action::KillTree => kill_tree(self.pid, self.leaf.as_ref()),
        }
    }
}

/// SIGKILL to everything that descends from a program, or, without cgroups, to its process group.
pub(crate) fn kill_tree(pid: i32, leaf: Option<&Leaf>) {
    match leaf.map(Leaf::kill) {
        Some(Ok(())) => {}
        _ => sys::signal_group(pid, libc::SIGKILL as u32),
    }
}
