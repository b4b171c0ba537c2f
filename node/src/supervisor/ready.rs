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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateRoot;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::io::Write;
    use std::process::{Child, Command};

    /// Somebody who is to be given a sandbox, and our end of the socket to give it.
    fn somebody() -> (Child, Ready, UnixStream) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        (child, Ready::new(ours, pidfd), theirs)
    }

    #[test]
    fn one_that_does_not_take_it_is_ended_and_touches_nothing() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (dir, lock) = root.create().unwrap();
        let names = || std::fs::read_dir(dir.path()).unwrap().count();
        let before = names();
        type Does = fn(UnixStream) -> Option<UnixStream>;
        let ways: [Does; 5] = [
            |socket| Some(socket),
            |socket| {
                drop(socket);
                None
            },
            |mut socket| {
                socket.write_all(b"\x02\x10\x07what?\n").unwrap();
                Some(socket)
            },
            |mut socket| {
                socket
                    .write_all(b"{\"failed\":{\"message\":\"no\"}}\n")
                    .unwrap();
                Some(socket)
            },
            // It started, and its VMM ended at once.
            |mut socket| {
                let two = [Event::Started { pid: 1 }, Event::Ended(Box::default())];
                let lines = two.map(|event| serde_json::to_string(&event).unwrap() + "\n");
                socket.write_all(lines.concat().as_bytes()).unwrap();
                Some(socket)
            },
        ];
        for does in ways {
            let (mut child, ready, theirs) = somebody();
            let _theirs = does(theirs);
            assert!(ready.take(&dir, &lock).is_err());
            // It was killed; who started it hears that.
            assert!(!child.wait().unwrap().success());
        }
        assert_eq!(names(), before);
    }

    #[test]
    fn one_that_takes_it_is_left_alone() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (dir, lock) = root.create().unwrap();
        let (mut child, ready, mut theirs) = somebody();
        Event::Started { pid: 1 }.send(&mut theirs);
        let (supervising, _, _) = ready.take(&dir, &lock).unwrap();
        let mut connection = Connection::new(theirs);
        let order: keeper::Order = connection.receive().unwrap().unwrap();
        assert_eq!(connection.take(order.descriptors).unwrap().len(), 2);
        assert!(!supervising.wait(Duration::ZERO));
        supervising.end(Duration::ZERO);
        assert!(!child.wait().unwrap().success());
    }
}
