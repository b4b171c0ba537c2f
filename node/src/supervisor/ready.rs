//! A VMM that waits for a sandbox, as whoever restores one has it from the keeper.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_keeper::v1::{self as keeper, order::Order};
use belljar_keeper::wire::Connection;
use rustix::process::{Signal, pidfd_send_signal};

use super::{Event, EventReader};
use crate::poll::PollSet;
use crate::state::SandboxDir;

/// A supervisor that waits takes a sandbox over within this time.
const TAKE_LIMIT: Duration = Duration::from_secs(3);
/// One that is told to end does so within this time.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A VMM that waits: its supervisor. Dropping it ends both.
#[derive(Debug)]
pub(crate) struct Ready {
    socket: UnixStream,
    supervisor: Supervising,
}

/// A supervisor that somebody else has started.
#[derive(Debug)]
pub(crate) struct Supervising(OwnedFd);

impl Supervising {
    /// Waits for its end; false if that is not within the limit.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let mut set = PollSet::default();
        let slot = set.readable(self.0.as_fd());
        set.wait(Some(Instant::now() + limit))
            .is_ok_and(|polled| polled.is_ready(slot))
    }

    /// When it returns, it is gone, or cannot be ended by anybody.
    pub(crate) fn end(&self, limit: Duration) {
        if !self.wait(limit) {
            let _ = pidfd_send_signal(&self.0, Signal::KILL);
            self.wait(END_LIMIT);
        }
    }
}

impl Ready {
    /// `socket` leads to the supervisor, of which the other is a pidfd.
    pub(crate) const fn new(socket: UnixStream, supervisor: OwnedFd) -> Self {
        let supervisor = Supervising(supervisor);
        Self { socket, supervisor }
    }

    /// Gives it a sandbox. If that fails its supervisor has ended, and may have left something in the directory.
    ///
    /// # Errors
    /// What went wrong.
    pub(crate) fn take(
        self,
        dir: &SandboxDir,
        lock: &File,
    ) -> io::Result<(Supervising, UnixStream, EventReader)> {
        let Self { socket, supervisor } = self;
        // One that were hung up on after it had taken the sandbox would remove it: it is killed first.
        let taken = socket.try_clone().and_then(|copy| taken(copy, dir, lock));
        let (socket, events) = taken.inspect_err(|_| supervisor.end(Duration::ZERO))?;
        Ok((supervisor, socket, events))
    }
}

fn taken(
    socket: UnixStream,
    dir: &SandboxDir,
    lock: &File,
) -> io::Result<(UnixStream, EventReader)> {
    socket.set_write_timeout(Some(TAKE_LIMIT))?;
    let directory = File::open(dir.path())?;
    let path = dir.path().to_str().ok_or(io::ErrorKind::InvalidFilename)?;
    let order = keeper::Order {
        descriptors: 2,
        order: Some(Order::Take(keeper::Take {
            dir: path.to_owned(),
        })),
    };
    let mut connection = Connection::new(socket);
    connection
        .send(&order, &[directory.as_fd(), lock.as_fd()])
        .map_err(io::Error::other)?;
    let mut socket = connection.into_stream();
    let deadline = Instant::now() + TAKE_LIMIT;
    let mut events = EventReader::default();
    loop {
        let mut set = PollSet::default();
        let slot = set.readable(socket.as_fd());
        if !set.wait(Some(deadline))?.is_ready(slot) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let Some(arrived) = events.read(&mut socket)? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        match arrived.as_slice() {
            [] => {}
            [Event::Started { .. }] => break,
            [Event::Failed { message }, ..] => return Err(io::Error::other(message.clone())),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
    socket.set_write_timeout(None)?;
    Ok((socket, events))
}
