//! A tar stream to a tree. The stream is hostile: nothing is written outside of the root.
//!
//! Names are single and checked ([`crate::names`]); directories are entered without following symlinks, so
//! one that the stream made (or that was there) is an error and no way out; files are always new ones, so
//! nothing is written through an old link.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dev, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, Uid, XattrFlags,
    chownat, fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, mkdirat, mknodat, openat,
    symlinkat, unlinkat, utimensat,
};
use rustix::io::{Errno, pwrite};

use crate::dirs::{Dirs, open_directory};
use crate::names::{self, NameError};
use crate::problems::Report;
use crate::tar::{Entry, Event, Kind, ParseError, Parser};
use crate::{TreeError, join};

/// Of directories that the stream does not mention.
const DIRECTORY_MODE: u32 = 0o755;

/// Whom things are given to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Who unpacks.
    Unpacker,
    /// As the stream says.
    Stream,
    /// This user and group.
    Given(u32, u32),
}

/// What of a stream is believed.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Owners.
    pub owner: Owner,
    /// Mode bits that are kept.
    pub mode_mask: u32,
    /// Extended attributes.
    pub xattrs: bool,
    /// Devices and FIFOs are made; otherwise they are left out, which is a problem told.
    pub nodes: bool,
    /// What exists and is no directory is an error; otherwise it is replaced.
    pub no_replace: bool,
    /// The root was made for this: it gets mode, owner and times of the stream's own root.
    pub new_root: bool,
}

/// Why unpacking ended early.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The bytes are no tar stream.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// The system refused something.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// An entry would be written outside of the tree, or nowhere.
    #[error("the tar stream names {}: {reason}", String::from_utf8_lossy(.path))]
    Name {
        /// As in the stream.
        path: Vec<u8>,
        /// What is wrong with it.
        reason: NameError,
    },
}

/// A directory's own, set when it is left: what is made in it changes its time.
#[derive(Debug)]
struct Pending {
    entry: Entry,
}

#[derive(Debug)]
struct Open {
    file: OwnedFd,
    entry: Box<Entry>,
    end: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Unpacker {
    parser: Parser,
    dirs: Dirs,
    rules: Rules,
    /// For the root and each directory down to where one is.
    pending: Vec<Option<Pending>>,
    open: Option<Open>,
    report: Report,
}

impl Unpacker {
    /// Into a directory.
    #[must_use]
    pub fn new(root: OwnedFd, rules: Rules) -> Self {
        Self {
            parser: Parser::new(),
            dirs: Dirs::new(root),
            rules,
            pending: vec![None],
            open: None,
            report: Report::default(),
        }
    }

    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, mut input: &[u8]) -> Result<(), UnpackError> {
        while let Some(event) = self.parser.feed(&mut input)? {
            match event {
                Event::Entry(entry) => {
                    self.report.entries = self.report.entries.saturating_add(1);
                    self.begin(entry)?;
                }
                Event::Data { offset, bytes } => {
                    if let Some(open) = &mut self.open {
                        write_at(open.file.as_fd(), bytes, offset)
                            .map_err(|errno| error("write", &open.entry.path, errno))?;
                        let count = bytes.len() as u64;
                        open.end = offset.saturating_add(count);
                        self.report.bytes = self.report.bytes.saturating_add(count);
                    }
                }
                Event::Done => self.done()?,
                Event::End => {}
            }
        }
        Ok(())
    }

    /// What became of it, when the stream is over.
    pub fn finish(mut self) -> Result<Report, UnpackError> {
        if !self.parser.may_end() {
            return Err(ParseError::Cut.into());
        }
        self.go_to(&[])?;
        if let Some(Some(pending)) = self.pending.pop() {
            let root = self.dirs.root();
            let root = root
                .try_clone_to_owned()
                .map_err(|_| error("finish", &pending.entry.path, Errno::MFILE))?;
            self.dress(root.as_fd(), &pending.entry);
        }
        Ok(self.report)
    }

    /// Content so far, holes left out.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.report.bytes
    }

    fn begin(&mut self, entry: Box<Entry>) -> Result<(), UnpackError> {
        let mut names = split(&entry.path)?;
        let Some(name) = names.pop() else {
            if entry.kind == Kind::Directory {
                if self.rules.new_root
                    && let Some(root) = self.pending.first_mut()
                {
                    *root = Some(Pending { entry: *entry });
                }
                return Ok(());
            }
            return Err(error("make", &entry.path, Errno::ISDIR).into());
        };
        if entry.kind == Kind::Directory {
            return self.directory(&names, &name, *entry);
        }
        self.go_to(&names)?;
        let failed = |errno| error("make", &entry.path, errno);
        match entry.kind {
            Kind::Regular => {
                let file = self.make(&name, |here| {
                    let flags = OFlags::WRONLY
                        | OFlags::CREATE
                        | OFlags::EXCL
                        | OFlags::NOFOLLOW
                        | OFlags::CLOEXEC;
                    openat(here, &name, flags, Mode::from_raw_mode(0o600))
                });
                let file = file.map_err(failed)?;
                self.open = Some(Open {
                    file,
                    entry,
                    end: 0,
                });
            }
            Kind::HardLink => {
                let target = self.link_target(&entry)?;
                self.make(&name, |here| {
                    let (folder, old) = &target;
                    linkat(folder, old, here, &name, AtFlags::empty())
                })
                .map_err(failed)?;
            }
            Kind::Symlink => {
                let link = CString::new(entry.link.as_slice()).map_err(|_| failed(Errno::INVAL))?;
                self.make(&name, |here| symlinkat(&link, here, &name))
                    .map_err(failed)?;
                self.dress_node(&name, &entry);
            }
            Kind::CharacterDevice | Kind::BlockDevice | Kind::Fifo => self.node(&name, &entry)?,
            Kind::Directory => {}
        }
        Ok(())
    }

    /// Makes something new, in place of what is there.
    fn make<T>(
        &self,
        name: &CStr,
        make: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let here = self.dirs.here();
        match make(here) {
            Err(Errno::EXIST) if !self.rules.no_replace => {
                // EISDIR for a directory: that is not thrown away.
                unlinkat(here, name, AtFlags::empty())?;
                make(here)
            }
            other => other,
        }
    }

    fn directory(
        &mut self,
        above: &[CString],
        name: &CStr,
        entry: Entry,
    ) -> Result<(), UnpackError> {
        self.go_to(above)?;
        let is_new = match mkdirat(self.dirs.here(), name, Mode::from_raw_mode(0o700)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(error("make directory", &entry.path, errno).into()),
        };
        let path = entry.path.clone();
        self.enter(name)
            .map_err(|errno| error("enter", &path, errno))?;
        if is_new && let Some(pending) = self.pending.last_mut() {
            *pending = Some(Pending { entry });
        }
        Ok(())
    }

    fn enter(&mut self, name: &CStr) -> Result<(), Errno> {
        // Who may only search a directory can still put something into it.
        match self.dirs.enter(name, true) {
            Err(Errno::ACCESS) => self.dirs.enter(name, false)?,
            other => other?,
        }
        self.pending.push(None);
        Ok(())
    }

    /// Goes to a directory: up as far as need be, then down, making what is missing.
    fn go_to(&mut self, names: &[CString]) -> Result<(), UnpackError> {
        let shared = names
            .iter()
            .zip(1..)
            .take_while(|(name, depth)| self.dirs.name(*depth) == Some(name.to_bytes()))
            .count();
        while self.dirs.depth() > shared {
            let path = self.dirs.path().to_vec();
            let left = self
                .dirs
                .leave()
                .map_err(|errno| error("leave", &path, errno))?;
            if let (Some(Some(pending)), Some(left)) = (self.pending.pop(), left) {
                self.dress(left.as_fd(), &pending.entry);
            }
        }
        for name in names.get(shared..).unwrap_or_default() {
            let failed = |errno| {
                error(
                    "make directory",
                    &join(self.dirs.path(), name.to_bytes()),
                    errno,
                )
            };
            match mkdirat(self.dirs.here(), name, Mode::from_raw_mode(DIRECTORY_MODE)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno).into()),
            }
            let path = join(self.dirs.path(), name.to_bytes());
            self.enter(name)
                .map_err(|errno| error("enter", &path, errno))?;
        }
        Ok(())
    }

    /// The directory and name of an older entry that a hard link is to.
    fn link_target(&self, entry: &Entry) -> Result<(OwnedFd, CString), UnpackError> {
        let failed = |errno| error("link to", &entry.link, errno);
        let mut names = split(&entry.link)?;
        let name = names.pop().ok_or_else(|| failed(Errno::PERM))?;
        let mut here = open_directory(self.dirs.root(), c".", false).map_err(failed)?;
        for name in names {
            here = open_directory(here.as_fd(), &name, false).map_err(failed)?;
        }
        Ok((here, name))
    }

    fn node(&mut self, name: &CStr, entry: &Entry) -> Result<(), UnpackError> {
        if !self.rules.nodes {
            let path = entry.path.clone();
            self.report
                .problems
                .add("make a device or FIFO", path, Errno::PERM);
            return Ok(());
        }
        let kind = match entry.kind {
            Kind::CharacterDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let device: Dev = rustix::fs::makedev(entry.device.0, entry.device.1);
        let mode = Mode::from_raw_mode(entry.mode & self.rules.mode_mask & 0o777);
        match self.make(name, |here| mknodat(here, name, kind, mode, device)) {
            Ok(()) => self.dress_node(name, entry),
            Err(Errno::PERM) => {
                let path = entry.path.clone();
                self.report.problems.add("make a device", path, Errno::PERM);
            }
            Err(errno) => return Err(error("make", &entry.path, errno).into()),
        }
        Ok(())
    }

    fn done(&mut self) -> Result<(), UnpackError> {
        if let Some(open) = self.open.take() {
            if open.end < open.entry.size {
                // It ends with a hole.
                ftruncate(&open.file, open.entry.size)
                    .map_err(|errno| error("write", &open.entry.path, errno))?;
            }
            self.dress(open.file.as_fd(), &open.entry);
        }
        Ok(())
    }

    const fn owner(&self, entry: &Entry) -> Option<(u32, u32)> {
        match self.rules.owner {
            Owner::Unpacker => None,
            Owner::Stream => Some((entry.uid, entry.gid)),
            Owner::Given(uid, gid) => Some((uid, gid)),
        }
    }

    /// Owner, attributes, mode and time of a file or directory, in the order in which none undoes another.
    fn dress(&mut self, fd: BorrowedFd<'_>, entry: &Entry) {
        let mut mask = self.rules.mode_mask & 0o7777;
        if self.owner(entry) != Some((entry.uid, entry.gid)) {
            // Set-id bits belong to an owner.
            mask &= 0o1777;
        }
        if let Some((uid, gid)) = self.owner(entry)
            && let Err(errno) = fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        {
            mask &= 0o1777;
            self.problem("give away", entry, errno);
        }
        if self.rules.xattrs {
            for (name, value) in &entry.xattrs {
                if let Err(errno) = fsetxattr(fd, name, value, XattrFlags::empty()) {
                    self.problem("set an attribute of", entry, errno);
                }
            }
        }
        if let Err(errno) = fchmod(fd, Mode::from_raw_mode(entry.mode & mask)) {
            self.problem("set the mode of", entry, errno);
        }
        if let Err(errno) = futimens(fd, &times(entry)) {
            self.problem("set the time of", entry, errno);
        }
    }

    /// Owner and time of what is not opened.
    fn dress_node(&mut self, name: &CStr, entry: &Entry) {
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        if let Some((uid, gid)) = self.owner(entry) {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            if let Err(errno) = chownat(self.dirs.here(), name, uid, gid, nofollow) {
                self.problem("give away", entry, errno);
            }
        }
        if let Err(errno) = utimensat(self.dirs.here(), name, &times(entry), nofollow) {
            self.problem("set the time of", entry, errno);
        }
    }

    fn problem(&mut self, doing: &'static str, entry: &Entry, errno: Errno) {
        self.report.problems.add(doing, entry.path.clone(), errno);
    }
}

fn times(entry: &Entry) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW as _,
        },
        last_modification: Timespec {
            tv_sec: entry.modified,
            tv_nsec: entry.modified_ns.into(),
        },
    }
}

fn split(path: &[u8]) -> Result<Vec<CString>, UnpackError> {
    names::split(path).map_err(|reason| UnpackError::Name {
        path: path.iter().take(4096).copied().collect(),
        reason,
    })
}

fn error(doing: &'static str, path: &[u8], errno: Errno) -> TreeError {
    TreeError {
        doing,
        path: path.to_vec(),
        errno,
    }
}

fn write_at(file: BorrowedFd<'_>, mut data: &[u8], mut offset: u64) -> Result<(), Errno> {
    while !data.is_empty() {
        match pwrite(file, data, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                offset = offset.saturating_add(count as u64);
                data = data.get(count..).unwrap_or_default();
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
