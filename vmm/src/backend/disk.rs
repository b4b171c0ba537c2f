//! What a block device needs from whatever holds its bytes.
use std::fs::File;
use std::io;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// One operation. Offsets and lengths are bytes inside the disk: the caller has checked them
/// against [`Disk::size`].
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    Read {
        to: &'a [Segment],
        offset: u64,
    },
    Write {
        from: &'a [Segment],
        offset: u64,
    },
    /// Everything whose completion was reported before survives a crash of the host.
    Flush,
}

/// What became of an operation.
#[derive(Debug)]
#[must_use]
pub enum Started {
    Done(io::Result<()>),
    /// [`Disk::reap`] reports it under the tag it was started with.
    InFlight,
}

/// Device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl FileId {
    pub fn of(file: &File) -> io::Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }
}

/// The bytes behind a block device: a file, through one of two engines; later layers.
///
/// An operation in flight keeps the guest memory it needs alive. Dropping a disk waits for
/// what is in flight.
pub trait Disk: Send {
    /// Bytes, a multiple of 512 and not 0.
    fn size(&self) -> u64;

    /// Starts `op`. `tag` is below [`Disk::depth`] and not in flight.
    fn start(&mut self, mem: &GuestRam, op: Op<'_>, tag: u16) -> Started;

    /// Most operations in flight at once; 0: every one is done when `start` returns.
    fn depth(&self) -> u16 {
        0
    }

    /// `wakeup` is written when [`Disk::reap`] may have something to report.
    fn notify_through(&mut self, _wakeup: EventFd) {}

    /// Hands what was started to the kernel; once per batch.
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Appends what has finished to `done`; with `wait`, everything in flight.
    fn reap(&mut self, _wait: bool, _done: &mut Vec<(u16, io::Result<()>)>) -> io::Result<()> {
        Ok(())
    }

    /// The contents of the range are no longer needed. A hint; done when it returns.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeros afterwards. `unmap`: its space may be given back. Done when
    /// it returns.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// What names the file behind the disk, if it is one file.
    fn file_id(&self) -> Option<FileId> {
        None
    }

    /// Reads the size again, after the file behind the disk was resized.
    fn rescan(&mut self) -> io::Result<()>;
}
