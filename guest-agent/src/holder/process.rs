//! One process that was started for the host: its streams, its life, who reads it.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use belljar_protocol::v1;
use rustix::io::Errno;
use rustix::termios::Winsize;

use super::input::Input;
use super::ring::Ring;
use crate::exec::cgroup::Leaf;
use crate::exec::lifecycle::{Action, Lifecycle};
use crate::sys;

/// A tied process blocks when its owner is a quarter of the ring behind, within these bounds, bytes.
/// The worker tells what it has passed on in pieces of less than the lower one: a process must not
/// wait for it to tell of less.
const MIN_LAG: u64 = 64 << 10;
const MAX_LAG: u64 = 256 << 10;

/// Read at once where memory is short, bytes.
const SHORT_READ: usize = 4 << 10;

/// After its end a terminal is read for so many bytes more at most: others may hold it and write.
const MAX_DRAIN: u64 = 256 << 10;

/// Whose hang-up ends the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Nobody's: it is detached.
    None,
    /// A channel's.
    Channel(u64),
    /// The worker that served the owner died; until then it may come back.
    Lost { until: Instant },
}

/// An output stream.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) fd: Option<Rc<OwnedFd>>,
    pub(super) ring: Ring,
    pub(super) readable: bool,
}

/// What a turn of reading came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Bytes came; there may be more.
    Moved,
    /// Nothing, until the system or the owner says so.
    Idle,
}

impl Output {
    pub(super) const fn new(fd: Option<Rc<OwnedFd>>, limit: u64) -> Self {
        Self {
            fd,
            ring: Ring::new(limit),
            readable: false,
        }
    }

    pub(super) const fn is_closed(&self) -> bool {
        self.fd.is_none()
    }

    /// True if reading waits for the owner, who holds the bytes from `hold` on. Where memory is
    /// short, it waits for all of them.
    fn is_held(&self, hold: Option<u64>, is_short: bool) -> bool {
        let lag = match is_short {
            true => 1,
            false => (self.ring.limit() / 4).clamp(MIN_LAG, MAX_LAG),
        };
        hold.is_some_and(|hold| self.ring.newest().saturating_sub(hold) >= lag)
    }

    /// Reads once into the ring.
    pub(super) fn pump(
        &mut self,
        scratch: &mut [u8],
        hold: Option<u64>,
        is_short: bool,
        unix_ns: impl Fn() -> u64,
    ) -> Pumped {
        if !self.readable || self.is_held(hold, is_short) {
            return Pumped::Idle;
        }
        let Some(fd) = &self.fd else {
            return Pumped::Idle;
        };
        let most = match is_short {
            true => SHORT_READ.min(scratch.len()),
            false => scratch.len(),
        };
        let room = scratch.get_mut(..most).unwrap_or_default();
        match rustix::io::read(&**fd, room) {
            Ok(0) => {
                self.fd = None;
                Pumped::Moved
            }
            Ok(got) => {
                let bytes = scratch.get(..got).unwrap_or_default();
                self.ring.push(bytes, unix_ns());
                self.ring.trim_to_limit(hold);
                Pumped::Moved
            }
            Err(Errno::INTR) => Pumped::Moved,
            Err(Errno::AGAIN) => {
                self.readable = false;
                Pumped::Idle
            }
            // EIO: nobody holds the terminal any more.
            Err(_) => {
                self.fd = None;
                Pumped::Moved
            }
        }
    }
}

/// How a process ended, and when.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) end: v1::End,
    pub(super) boottime_ns: u64,
    /// When its record is dropped.
    pub(super) expires: Option<Instant>,
}

/// What is told about a process and never changes.
#[derive(Debug, Default)]
pub(super) struct About {
    pub(super) argv: Vec<Vec<u8>>,
    pub(super) cwd: Vec<u8>,
    pub(super) user: String,
    pub(super) limits: Option<v1::Limits>,
    pub(super) boottime_ns: u64,
    pub(super) unix_ns: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) pid: i32,
    pub(super) about: Box<About>,
    pub(super) started: Instant,
    pub(super) keep: Duration,
    pub(super) life: Lifecycle,
    pub(super) leaf: Option<Leaf>,
    pub(super) owner: Owner,
    pub(super) owner_key: Vec<u8>,
    /// From where on each stream is held for the owner, who may not have got it.
    pub(super) holds: [Option<u64>; 2],
    pub(super) outputs: [Output; 2],
    /// Present: it runs on a terminal of this size.
    pub(super) terminal: Option<v1::Terminal>,
    pub(super) stdin: Option<Rc<OwnedFd>>,
    pub(super) stdin_writable: bool,
    pub(super) input: Input,
    /// Who sent the unwritten bytes of `input`: (channel, bytes).
    pub(super) senders: VecDeque<(u64, u64)>,
    /// Channels that read it.
    pub(super) viewers: Vec<u64>,
    /// Channels that wait for its end.
    pub(super) waiters: Vec<u64>,
    pub(super) ended: Option<Ended>,
    /// SIGKILL was sent to it from here, so the kernel's is not to blame.
    pub(super) was_killed: Cell<bool>,
    /// Where each stream ends for those who read it at the end of the process; known a little later
    /// than that for terminals.
    pub(super) finals: [Option<u64>; 2],
    /// Reading a terminal's rest, up to this offset.
    pub(super) drain_to: Option<u64>,
}

impl Process {
    pub(super) const fn is_running(&self) -> bool {
        self.ended.is_none()
    }

    /// SIGTERM to the group, or SIGKILL to all.
    pub(super) fn act(&self, action: Action) {
        match action {
            Action::Terminate if self.is_running() => {
                sys::signal_group(self.pid, libc::SIGTERM as u32);
            }
            Action::Terminate => {}
            Action::KillTree => self.kill_tree(),
        }
    }

    /// SIGKILL to everything that descends from it, or, without cgroups, to its process group.
    pub(super) fn kill_tree(&self) {
        self.was_killed.set(true);
        match self.leaf.as_ref().map(Leaf::kill) {
            Some(Ok(())) => {}
            // The number may be somebody else's group by now.
            _ if !self.is_running() => {}
            _ => {
                sys::signal_group(self.pid, libc::SIGKILL as u32);
                if let Ok(pgrp) = self.foreground() {
                    sys::signal_group(pgrp, libc::SIGKILL as u32);
                }
            }
        }
    }

    fn foreground(&self) -> Result<i32, Errno> {
        let fd = self.stdin.as_ref().filter(|_| self.terminal.is_some());
        let fd = fd.ok_or(Errno::NOTTY)?;
        Ok(rustix::termios::tcgetpgrp(&**fd)?.as_raw_pid())
    }

    /// A signal as from a keyboard: to the foreground group of the terminal, or the process group.
    pub(super) fn signal_foreground(&self, number: u32) {
        self.note_signal(number);
        match self.foreground() {
            Ok(pgrp) => sys::signal_group(pgrp, number),
            Err(_) if self.is_running() => sys::signal_group(self.pid, number),
            Err(_) => {}
        }
    }

    /// Sends a signal; true if there was nobody left to get it.
    pub(super) fn signal(&self, number: u32, scope: v1::signal::Scope) -> bool {
        use v1::signal::Scope;
        let is_running = self.is_running();
        self.note_signal(number);
        match scope {
            Scope::Group if is_running => sys::signal_group(self.pid, number),
            Scope::Process if is_running => sys::signal_process(self.pid, number),
            Scope::Group | Scope::Process => return true,
            Scope::Tree => match &self.leaf {
                Some(leaf) if number == libc::SIGKILL as u32 => {
                    let was_empty = !is_running && !leaf.is_populated();
                    self.kill_tree();
                    return was_empty;
                }
                Some(leaf) => return leaf.signal_all(number) == 0 && !is_running,
                None if is_running => sys::signal_group(self.pid, number),
                None => return true,
            },
        }
        false
    }

    fn note_signal(&self, number: u32) {
        if number == libc::SIGKILL as u32 {
            self.was_killed.set(true);
        }
    }

    /// Gives the terminal a size; true if that is a change.
    pub(super) fn resize(&mut self, size: &v1::Terminal) -> bool {
        let size = sane_size(size);
        if self.terminal.is_none_or(|now| now == size) {
            return false;
        }
        let fd = self.stdin.as_ref().or_else(|| self.outputs[0].fd.as_ref());
        if let Some(fd) = fd {
            set_size(&**fd, &size);
        }
        self.terminal = Some(size);
        true
    }

    /// The end of the input, as the process sees it: its pipe is closed, or VEOF is typed.
    pub(super) fn close_input(&mut self) {
        if self.terminal.is_none() {
            self.input.close();
            return;
        }
        let Some(fd) = &self.stdin else { return };
        let veof = rustix::termios::tcgetattr(&**fd).map_or(4, |settings| {
            settings.special_codes[rustix::termios::SpecialCodeIndex::VEOF]
        });
        self.input.push(&[veof]);
    }

    /// Writes input to the process as far as it takes it. Returns bytes that left the queue, written
    /// or thrown away.
    pub(super) fn flush_input(&mut self) -> u64 {
        let mut gone = 0_u64;
        while self.stdin_writable && !self.input.unwritten().is_empty() {
            let Some(fd) = &self.stdin else { break };
            match rustix::io::write(&**fd, self.input.unwritten()) {
                Ok(written) => {
                    self.input.advance(written);
                    gone = gone.saturating_add(written as u64);
                }
                Err(Errno::AGAIN) => self.stdin_writable = false,
                Err(Errno::INTR) => {}
                // Nobody reads any more.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            gone = gone.saturating_add(self.input.unwritten().len() as u64);
            self.input.discard();
        } else if self.input.is_over() {
            self.stdin = None;
        }
        gone
    }

    /// What `info` says of the streams.
    pub(super) fn stream_infos(&self) -> [v1::StreamInfo; 2] {
        self.outputs.each_ref().map(|output| v1::StreamInfo {
            oldest: output.ring.oldest(),
            newest: output.ring.newest(),
            closed: output.is_closed(),
        })
    }

    /// From the end of the program on: the streams end with what was written by then.
    pub(super) fn begin_finals(&mut self) {
        if self.terminal.is_some() {
            let newest = self.outputs[0].ring.newest();
            self.drain_to = Some(newest.saturating_add(MAX_DRAIN));
            self.outputs[0].readable = true;
            self.finals[1] = Some(0);
            self.check_drained();
            return;
        }
        for (output, end) in self.outputs.iter_mut().zip(&mut self.finals) {
            let held = output.fd.as_ref().and_then(|fd| {
                let held = rustix::io::ioctl_fionread(&**fd).ok();
                held.filter(|held| *held != 0)
            });
            // It may have been written in this moment: the event is still to come.
            output.readable |= held.is_some();
            *end = Some(output.ring.newest().saturating_add(held.unwrap_or(0)));
        }
    }

    /// The rest of a terminal is read when nothing more comes.
    pub(super) fn check_drained(&mut self) {
        // A terminal that nobody holds any more takes no keys: its master is given back at once, and
        // not with the record.
        if self.terminal.is_some() && self.ended.is_some() && self.outputs[0].is_closed() {
            self.stdin = None;
        }
        let Some(to) = self.drain_to else { return };
        let output = &self.outputs[0];
        let newest = output.ring.newest();
        if output.is_closed() || !output.readable || newest >= to {
            self.finals[0] = Some(newest);
            self.drain_to = None;
        }
    }

    /// Where each stream ends for a reader that comes now and waits for nothing new. Of a process that
    /// has ended there may be bytes that are not read yet.
    pub(super) fn ends_now(&self) -> [Option<u64>; 2] {
        let mut ends = self
            .outputs
            .each_ref()
            .map(|output| Some(output.ring.newest()));
        if self.is_settled() {
            for (end, last) in ends.iter_mut().zip(self.finals) {
                *end = (*end).max(last);
            }
        }
        ends
    }

    /// From now on nobody's hang-up matters, and nobody's slowness.
    pub(super) const fn disown(&mut self) {
        self.owner = Owner::None;
        self.holds = [None; 2];
    }

    /// Whether everything about its end is known.
    pub(super) const fn is_settled(&self) -> bool {
        self.ended.is_some() && self.drain_to.is_none()
    }
}

/// A size that every program can bear.
pub(super) fn sane_size(size: &v1::Terminal) -> v1::Terminal {
    let sane = |value: u32, default: u32| match value {
        0 => default,
        value => value.min(4096),
    };
    v1::Terminal {
        columns: sane(size.columns, 80),
        rows: sane(size.rows, 24),
    }
}

pub(super) fn set_size(fd: impl AsFd, size: &v1::Terminal) {
    let size = Winsize {
        ws_row: u16::try_from(size.rows).unwrap_or(u16::MAX),
        ws_col: u16::try_from(size.columns).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // A terminal that is gone has no size.
    let _ = rustix::termios::tcsetwinsize(fd, size);
}
