//! A descriptor of the host that output goes to. It may be shared with other programs, so it is not
//! made non-blocking.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::fs::FileType;
use rustix::io::{Errno, ReadWriteFlags};

use crate::poll::PollSet;

/// After `poll` says that a pipe has room, this much can be written without waiting (`pipe(7)`, PIPE_BUF).
const SAFE_WRITE: usize = 4096;
/// `pwritev2(2)`: at the descriptor's own position.
const CURRENT: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    fd: BorrowedFd<'a>,
    held: Vec<u8>,
    /// Files always have room.
    never_blocks: bool,
    /// The kernel writes what fits, and no more, if asked to.
    may_refuse: bool,
}

impl<'a> Sink<'a> {
    pub(super) fn new(fd: BorrowedFd<'a>) -> Self {
        let kind = rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        Self {
            fd,
            held: Vec::new(),
            never_blocks: kind == Ok(FileType::RegularFile),
            may_refuse: kind == Ok(FileType::Fifo),
        }
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// Bytes that are not written yet.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The descriptor, if there is something to write to it.
    pub(super) fn waiting(&self) -> Option<BorrowedFd<'a>> {
        (!self.held.is_empty()).then_some(self.fd)
    }

    /// Writes what fits into a descriptor that has room; `false` if nobody reads it any more.
    pub(super) fn write_some(&mut self) -> bool {
        match self.write() {
            Ok(count) => {
                self.held.drain(..count.min(self.held.len()));
                true
            }
            Err(Errno::INTR | Errno::AGAIN) => true,
            Err(_) => false,
        }
    }

    fn write(&mut self) -> Result<usize, Errno> {
        if self.may_refuse {
            let flags = ReadWriteFlags::NOWAIT;
            match rustix::io::pwritev2(self.fd, &[IoSlice::new(&self.held)], CURRENT, flags) {
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::SPIPE | Errno::NOSYS) => {
                    self.may_refuse = false;
                }
                other => return other,
            }
        }
        let safe = if self.never_blocks {
            self.held.len()
        } else {
            self.held.len().min(SAFE_WRITE)
        };
        rustix::io::write(self.fd, self.held.get(..safe).unwrap_or_default())
    }

    /// Writes as long as that cannot block. Errors are left to the next round.
    pub(super) fn write_at_once(&mut self) -> io::Result<()> {
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
