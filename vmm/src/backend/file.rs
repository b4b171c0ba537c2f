//! A raw disk in a regular file or a block device.
//!
//! The format is always raw: nothing looks at the contents, so a guest cannot turn its drive
//! into another format by writing a header.
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FileType, FlockOperation, OFlags};
use rustix::io::Errno;

use super::disk::{Disk, FileId, Op, Started};
use super::iovec::{Direction, IoVectors};
use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// Bytes of one sector, the unit of a disk's size.
pub const SECTOR: u64 = 512;

/// Why a file cannot be a disk. `disk` is what the caller calls it: a path or `fd:NAME`.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{disk}: a disk must be a regular file or a block device, not {found}")]
    Kind { disk: String, found: &'static str },
    #[error("{disk}: the descriptor must be open for {wanted}")]
    Mode { disk: String, wanted: &'static str },
    #[error("{disk}: the descriptor is open for appending; a disk is written anywhere")]
    Append { disk: String },
    #[error(
        "{disk}: in use by another drive or VM; a drive is shared only if all have it read-only"
    )]
    InUse { disk: String },
    #[error("{disk}: is empty; give it a size, for example with 'truncate -s 1G'")]
    Empty { disk: String },
    #[error(
        "{disk}: {size} bytes are not a whole number of 512-byte sectors; \
         if it is a raw image, pad it with 'truncate -s %512'"
    )]
    Unaligned { disk: String, size: u64 },
    #[error("{disk}: cannot {what}: {source}")]
    Io {
        disk: String,
        what: &'static str,
        source: io::Error,
    },
}

/// A raw disk whose operations are done when `start` returns.
///
/// It holds a lock (flock) as long as it lives: exclusive if writable, else shared.
#[derive(Debug)]
pub struct RawFile {
    file: Arc<File>,
    size: u64,
    vectors: IoVectors,
}

impl RawFile {
    /// Takes `file` as a disk. It must be open for reading, and unless `read_only` for
    /// writing; that a read-only disk is not written is up to the device.
    ///
    /// # Errors
    /// See [`DiskError`]: kind, mode, lock and size are checked, contents never.
    pub fn new(file: File, disk: &str, read_only: bool) -> Result<Self, DiskError> {
        take(&file, disk, read_only)?;
        let size = measure(&file).map_err(|source| DiskError::Io {
            disk: disk.to_owned(),
            what: "find its size",
            source,
        })?;
        if size == 0 {
            return Err(DiskError::Empty {
                disk: disk.to_owned(),
            });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Unaligned {
                disk: disk.to_owned(),
                size,
            });
        }
        Ok(Self {
            file: Arc::new(file),
            size,
            vectors: IoVectors::default(),
        })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Does `op` now.
    pub(super) fn run(&mut self, mem: &GuestRam, op: Op<'_>) -> io::Result<()> {
        match op {
            Op::Read { to, offset } => self.transfer(mem, Direction::Read, to, offset),
            Op::Write { from, offset } => self.transfer(mem, Direction::Write, from, offset),
            Op::Flush => Ok(rustix::fs::fdatasync(&self.file)?),
        }
    }

    fn transfer(
        &mut self,
        mem: &GuestRam,
        direction: Direction,
        segments: &[Segment],
        offset: u64,
    ) -> io::Result<()> {
        self.vectors.fill(mem, segments)?;
        // SAFETY: `mem` is borrowed until the call is over.
        unsafe { self.vectors.transfer(&self.file, direction, offset, 0) }
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        loop {
            match rustix::fs::fallocate(&self.file, mode, offset, len) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }
}

/// Checks kind and mode of a disk's file, and locks it: shared if it is only read, else exclusively.
pub(super) fn take(file: &File, disk: &str, read_only: bool) -> Result<(), DiskError> {
    let io = |what: &'static str| {
        move |source: Errno| DiskError::Io {
            disk: disk.to_owned(),
            what,
            source: source.into(),
        }
    };
    let stat = rustix::fs::fstat(file).map_err(io("look at its kind"))?;
    check_kind(disk, FileType::from_raw_mode(stat.st_mode))?;
    let flags = rustix::fs::fcntl_getfl(file).map_err(io("read its flags"))?;
    check_mode(disk, flags, read_only)?;
    let lock = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    rustix::fs::flock(file, lock).map_err(|e| {
        if e == Errno::WOULDBLOCK {
            DiskError::InUse {
                disk: disk.to_owned(),
            }
        } else {
            io("lock it")(e)
        }
    })
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

fn write_zeroes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while len > 0 {
        let part = usize::try_from(len).map_or(ZEROS.len(), |len| len.min(ZEROS.len()));
        let part = ZEROS.get(..part).unwrap_or_default();
        std::os::unix::fs::FileExt::write_all_at(file, part, offset)?;
        offset += part.len() as u64;
        len -= part.len() as u64;
    }
    Ok(())
}

fn check_kind(disk: &str, kind: FileType) -> Result<(), DiskError> {
    let found = match kind {
        FileType::RegularFile | FileType::BlockDevice => return Ok(()),
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "something else",
    };
    Err(DiskError::Kind {
        disk: disk.to_owned(),
        found,
    })
}

fn check_mode(disk: &str, flags: OFlags, read_only: bool) -> Result<(), DiskError> {
    let mode = flags & OFlags::RWMODE;
    let good = mode == OFlags::RDWR || (read_only && mode == OFlags::RDONLY);
    if !good || flags.contains(OFlags::PATH) {
        let wanted = if read_only {
            "reading"
        } else {
            "reading and writing"
        };
        return Err(DiskError::Mode {
            disk: disk.to_owned(),
            wanted,
        });
    }
    if flags.contains(OFlags::APPEND) && !read_only {
        return Err(DiskError::Append {
            disk: disk.to_owned(),
        });
    }
    Ok(())
}

/// The end of the file; for block devices too, whose `st_size` is 0.
fn measure(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

impl Disk for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn start(&mut self, mem: &GuestRam, op: Op<'_>, _tag: u16) -> Started {
        Started::Done(self.run(mem, op))
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(PUNCH, offset, len) {
            // A hint that the file system cannot take is still done.
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Without `unmap` the space stays allocated where the file system can do that (tmpfs
    /// cannot, and gets a hole); where neither works, zeros are written.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let order = if unmap { [PUNCH, ZERO] } else { [ZERO, PUNCH] };
        for mode in order {
            match self.allocate(mode, offset, len) {
                Err(Errno::OPNOTSUPP) => {}
                result => return Ok(result?),
            }
        }
        write_zeroes(&self.file, offset, len)
    }

    fn file_id(&self) -> Option<FileId> {
        FileId::of(&self.file).ok()
    }

    fn rescan(&mut self) -> io::Result<()> {
        let size = measure(&self.file)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the new size is not a whole number of 512-byte sectors",
            ));
        }
        self.size = size;
        Ok(())
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
