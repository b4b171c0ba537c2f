//! Where an image's bytes come from.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

/// Bytes to be stored. Several threads read at once.
pub trait Source: Sync {
    /// Bytes in all.
    fn length(&self) -> u64;

    /// The next bytes from there on that are not known to be zero; `None` if there are none.
    ///
    /// # Errors
    /// What the system says.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok((from < self.length()).then(|| from..self.length()))
    }

    /// Fills the buffer from there.
    ///
    /// # Errors
    /// What the system says; `UnexpectedEof` beyond the end.
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Source for [u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let to = from.saturating_add(bytes.len());
        let found = self.get(from..to).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(found);
        Ok(())
    }
}

/// A file or memfd; its holes are not read.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    length: u64,
}

impl FileSource {
    /// As long as it is now.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }
}

impl Source for FileSource {
    fn length(&self) -> u64 {
        self.length
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        if from >= self.length {
            return Ok(None);
        }
        // The file's position is shared by threads, but each call says where it begins.
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(rustix::io::Errno::INVAL) => from,
            Err(error) => return Err(error.into()),
        };
        let end = match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(rustix::io::Errno::INVAL) => self.length,
            Err(error) => return Err(error.into()),
        };
        let range = start..end.min(self.length);
        Ok((!range.is_empty()).then_some(range))
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}
