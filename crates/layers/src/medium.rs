//! What is asked of the file behind a layer or a base image. Tests have one that forgets.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// A file.
pub trait Medium {
    /// Bytes in all.
    ///
    /// # Errors
    /// What the system says; so for all of these.
    fn length(&self) -> io::Result<u64>;

    /// Makes an empty file longer; what is new reads as zeros.
    fn extend(&self, length: u64) -> io::Result<()>;

    /// Fills `bytes` from there; `UnexpectedEof` beyond the end.
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` there.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a hole, which reads as zeros; `false` if the file system cannot.
    fn punch(&self, offset: u64, length: u64) -> io::Result<bool>;

    /// What was written, and holes, survive a power cut afterwards.
    fn sync(&self) -> io::Result<()>;

    /// The first byte from there on that is in no hole; `None`: there are only holes.
    fn next_data(&self, from: u64) -> io::Result<Option<u64>>;

    /// Where the data that `from` lies in ends.
    fn next_hole(&self, from: u64) -> io::Result<u64>;
}

impl Medium for File {
    fn length(&self) -> io::Result<u64> {
        // Of block devices too, whose `st_size` is 0.
        Ok(rustix::fs::seek(self, SeekFrom::End(0))?)
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        if length == 0 {
            return Ok(true);
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(self, mode, offset, length) {
                Ok(()) => return Ok(true),
                Err(Errno::OPNOTSUPP) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self)?)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(self, SeekFrom::Data(from)) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            // A file system, or a block device, that knows no holes.
            Err(Errno::INVAL) => Ok(Some(from)),
            Err(error) => Err(error.into()),
        }
    }

    fn next_hole(&self, from: u64) -> io::Result<u64> {
        match rustix::fs::seek(self, SeekFrom::Hole(from)) {
            Ok(at) => Ok(at),
            Err(Errno::INVAL) => self.length(),
            Err(error) => Err(error.into()),
        }
    }
}

impl<M: Medium> Medium for Arc<M> {
    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        (**self).extend(length)
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read(bytes, offset)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write(bytes, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        (**self).punch(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        (**self).next_data(from)
    }

    fn next_hole(&self, from: u64) -> io::Result<u64> {
        (**self).next_hole(from)
    }
}
