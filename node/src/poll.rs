//! Waiting for several descriptors and a deadline at once.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Descriptors to wait for; each gets a slot number.
#[derive(Debug, Default)]
pub struct PollSet<'a> {
    fds: Vec<PollFd<'a>>,
}

/// What was ready.
#[derive(Debug)]
pub struct Polled {
    ready: Vec<PollFlags>,
}

impl<'a> PollSet<'a> {
    /// Waits for something to read, or for the end of it.
    pub fn readable(&mut self, fd: BorrowedFd<'a>) -> usize {
        self.add(fd, PollFlags::IN)
    }

    /// Waits for room to write, or for the reader to be gone.
    pub fn writable(&mut self, fd: BorrowedFd<'a>) -> usize {
        self.add(fd, PollFlags::OUT)
    }

    fn add(&mut self, fd: BorrowedFd<'a>, flags: PollFlags) -> usize {
        self.fds.push(PollFd::from_borrowed_fd(fd, flags));
        self.fds.len().saturating_sub(1)
    }

    /// Waits until one is ready or the deadline has passed.
    ///
    /// # Errors
    /// A descriptor cannot be polled.
    pub fn wait(mut self, deadline: Option<Instant>) -> io::Result<Polled> {
        loop {
            let limit = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // A limit beyond what the kernel can count is none.
            let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
            match poll(&mut self.fds, limit.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Polled {
            ready: self.fds.iter().map(PollFd::revents).collect(),
        })
    }
}

impl Polled {
    /// Whether the descriptor in this slot is ready, hung up or broken: using it tells which.
    #[must_use]
    pub fn is_ready(&self, slot: usize) -> bool {
        self.ready.get(slot).is_some_and(|flags| !flags.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn only_what_is_ready_is_told() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let wait = |fd: BorrowedFd<'_>| {
            let mut set = PollSet::default();
            let (read, write) = (set.readable(fd), set.writable(fd));
            let polled = set.wait(None).unwrap();
            (polled.is_ready(read), polled.is_ready(write))
        };
        assert_eq!(wait(ours.as_fd()), (false, true));
        theirs.write_all(b"x").unwrap();
        assert_eq!(wait(ours.as_fd()), (true, true));
    }

    #[test]
    fn the_deadline_ends_the_wait() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut set = PollSet::default();
        let slot = set.readable(ours.as_fd());
        let begin = Instant::now();
        let polled = set.wait(Some(begin + Duration::from_millis(20))).unwrap();
        assert!(!polled.is_ready(slot));
        assert!(begin.elapsed() >= Duration::from_millis(20));
    }
}
