//! Descriptors that were handed over by name, and opening a [`Source`] either way.
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};

use super::Source;

/// What kind of file an opener can work with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// A regular file, read (kernel, initrd).
    ReadFile,
    /// A regular file or block device, read only (read-only drives).
    ReadDisk,
    /// A regular file or block device, read and written (drives).
    WriteDisk,
    /// A file, FIFO, terminal or socket that is appended to and made if missing; never blocks
    /// (logs, metrics, serial output).
    Output,
    /// An empty regular file that is written from its start; only as a descriptor, for a path
    /// that names one might be somebody's file (see `backend::aside`).
    EmptyFile,
    /// A directory to work in.
    Directory,
}

/// A source could not be opened; the message names the field and the path.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{field}: cannot open {path} to {purpose}: {error}")]
    Open {
        field: String,
        path: String,
        purpose: &'static str,
        error: io::Error,
    },
    #[error("{field}: {path} is {found}; {wanted} is needed")]
    Kind {
        field: String,
        path: String,
        found: &'static str,
        wanted: &'static str,
    },
    #[error(
        "{field}: no descriptor was handed over under the name {name:?}; \
         send it with the header 'Belljar-Fds: {name}' or start with --fd {name}=N"
    )]
    NoDescriptor { field: String, name: String },
}

/// The table of descriptors: filled with `--fd` and with every API call that carries some.
#[derive(Debug, Default)]
pub struct Descriptors {
    by_name: BTreeMap<String, OwnedFd>,
}

impl Descriptors {
    /// Most descriptors that can wait to be used.
    pub const MAX: usize = 128;

    /// Adds one; false (and it is closed) if the table is full. A name used again replaces the
    /// older descriptor, which is closed.
    pub fn insert(&mut self, name: String, fd: OwnedFd) -> bool {
        if self.by_name.len() >= Self::MAX && !self.by_name.contains_key(&name) {
            return false;
        }
        self.by_name.insert(name, fd);
        true
    }

    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// A duplicate of the descriptor (so that a failed start can be tried again).
    /// `field` is for the error message.
    pub fn duplicate(&self, field: &str, name: &str) -> Result<OwnedFd, OpenError> {
        let Some(fd) = self.by_name.get(name) else {
            return Err(OpenError::NoDescriptor {
                field: field.to_owned(),
                name: name.to_owned(),
            });
        };
        fd.try_clone().map_err(|error| OpenError::Open {
            field: field.to_owned(),
            path: format!("fd:{name}"),
            purpose: "duplicate it",
            error,
        })
    }

    /// Closes one, if it is there.
    pub fn remove(&mut self, name: &str) {
        self.by_name.remove(name);
    }

    /// Closes all of them: after the start nobody can name them any more.
    pub fn clear(&mut self) {
        self.by_name.clear();
    }

    /// Opens `source` as `expect` says. Never blocks (a FIFO in the place of a file is refused,
    /// not waited for). A descriptor is taken as it is and its kind checked; but an output that
    /// could block is made non-blocking, since nobody may make the VMM wait by not reading.
    pub fn open(&self, field: &str, source: &Source, expect: Expect) -> Result<File, OpenError> {
        let fd = match source {
            Source::Fd(name) => self.duplicate(field, name)?,
            Source::Path(path) => rustix::fs::open(
                path,
                expect.flags() | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
                Mode::RUSR | Mode::WUSR,
            )
            .map_err(|e| OpenError::Open {
                field: field.to_owned(),
                path: source.to_string(),
                purpose: expect.purpose(),
                error: e.into(),
            })?,
        };
        let file = File::from(fd);
        expect.check(field, source, &file)?;
        if expect != Expect::Output {
            return Ok(file);
        }
        nonblocking(file).map_err(|e| OpenError::Open {
            field: field.to_owned(),
            path: source.to_string(),
            purpose: "make it non-blocking",
            error: e.into(),
        })
    }
}

/// An open file description of our own where that can be had: O_NONBLOCK belongs to the
/// description, which others may share (a shell its terminal). Sockets, and a jail without
/// /proc, have only the one that was handed over.
fn nonblocking(file: File) -> rustix::io::Result<File> {
    let stat = rustix::fs::fstat(&file)?;
    let flags = rustix::fs::fcntl_getfl(&file)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        || flags.contains(OFlags::NONBLOCK)
    {
        return Ok(file);
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mode = flags & OFlags::RWMODE;
    let own = mode | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    if let Ok(reopened) = rustix::fs::open(path, own, Mode::empty()) {
        return Ok(reopened.into());
    }
    rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
    Ok(file)
}

impl Expect {
    fn flags(self) -> OFlags {
        match self {
            Self::ReadFile | Self::ReadDisk => OFlags::RDONLY,
            Self::Directory => OFlags::RDONLY | OFlags::DIRECTORY,
            Self::WriteDisk | Self::EmptyFile => OFlags::RDWR,
            // Read-write, so that a FIFO without a reader can be opened and does not raise
            // SIGPIPE when its reader leaves.
            Self::Output => OFlags::RDWR | OFlags::APPEND | OFlags::CREATE,
        }
    }

    fn purpose(self) -> &'static str {
        match self {
            Self::ReadFile | Self::ReadDisk => "read it",
            Self::WriteDisk | Self::EmptyFile => "read and write it",
            Self::Output => "append to it",
            Self::Directory => "work in it",
        }
    }

    fn check(self, field: &str, source: &Source, file: &File) -> Result<(), OpenError> {
        let stat = rustix::fs::fstat(file).map_err(|e| OpenError::Open {
            field: field.to_owned(),
            path: source.to_string(),
            purpose: "look at its kind",
            error: e.into(),
        })?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let good = match self {
            Self::ReadFile => kind == FileType::RegularFile,
            Self::EmptyFile => kind == FileType::RegularFile && stat.st_size == 0,
            Self::ReadDisk | Self::WriteDisk => {
                matches!(kind, FileType::RegularFile | FileType::BlockDevice)
            }
            Self::Output => kind != FileType::Directory,
            Self::Directory => kind == FileType::Directory,
        };
        if good {
            return Ok(());
        }
        Err(OpenError::Kind {
            field: field.to_owned(),
            path: source.to_string(),
            found: match kind {
                FileType::Directory => "a directory",
                FileType::Fifo => "a FIFO",
                FileType::Socket => "a socket",
                FileType::CharacterDevice => "a character device",
                FileType::BlockDevice => "a block device",
                FileType::Symlink => "a symbolic link",
                FileType::RegularFile if self == Self::Directory => "a regular file",
                FileType::RegularFile => "a file that is not empty",
                _ => "something else",
            },
            wanted: match self {
                Self::ReadFile => "a regular file",
                Self::ReadDisk | Self::WriteDisk => "a regular file or a block device",
                Self::Output => "a file or a FIFO",
                Self::EmptyFile => "an empty regular file",
                Self::Directory => "a directory",
            },
        })
    }
}
