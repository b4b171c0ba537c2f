//! A tree as a tar stream: holes and hard links kept, larger than memory.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, readlinkat, seek, statat,
};
use rustix::io::{Errno, pread};

use crate::dirs::Dirs;
use crate::problems::Report;
use crate::tar::{self, Entry, Kind};
use crate::walk::{Visitor, walk};
use crate::{TreeError, attributes, join};

/// Segments of one sparse file; what is behind them is stored with its holes.
const MAX_SEGMENTS: usize = 64 << 10;

/// Files with several names whose first name is remembered.
const MAX_LINKS: usize = 1 << 20;

/// Where a stream goes.
pub trait Sink {
    /// Why it takes no more.
    type Error;

    /// Room for the next bytes, so that files are read straight to where they are sent from; never empty.
    fn space(&mut self) -> &mut [u8];

    /// So many bytes were put into [`Self::space`].
    fn filled(&mut self, count: usize) -> Result<(), Self::Error>;

    /// Takes bytes from elsewhere.
    fn put(&mut self, mut data: &[u8]) -> Result<(), Self::Error> {
        while !data.is_empty() {
            let space = self.space();
            let count = space.len().min(data.len());
            let (now, rest) = data.split_at(count);
            if let Some(room) = space.get_mut(..count) {
                room.copy_from_slice(now);
            }
            self.filled(count)?;
            data = rest;
        }
        Ok(())
    }
}

/// What is packed.
#[derive(Debug)]
pub enum Root {
    /// A directory that can be listed, with all below it on its file system.
    Directory(OwnedFd),
    /// An open regular file.
    File(OwnedFd),
    /// Something else, by its name in a directory: a symlink, a device.
    Node(OwnedFd, CString),
}

/// How.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Path of the first entry; "." puts what is in a directory at the top.
    pub name: Vec<u8>,
    /// With extended attributes.
    pub xattrs: bool,
}

/// Why packing ended early.
#[derive(Debug)]
pub enum PackError<E> {
    /// The tree cannot be read.
    Tree(TreeError),
    /// The stream cannot be written.
    Sink(E),
}

impl<E> From<TreeError> for PackError<E> {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

/// Packs a tree and tells what could not be read. The stream ends with its end marker.
pub fn pack<S: Sink>(
    root: Root,
    options: &Options,
    sink: &mut S,
) -> Result<Report, PackError<S::Error>> {
    let mut packer = Packer {
        sink,
        options,
        links: HashMap::new(),
        report: Report::default(),
        header: Vec::new(),
    };
    let at_root = |errno| TreeError {
        doing: "read",
        path: Vec::new(),
        errno,
    };
    match root {
        Root::Directory(fd) => {
            let stat = fstat(&fd).map_err(at_root)?;
            let path = options.name.clone();
            packer.directory(path, &stat, fd.as_fd())?;
            walk(fd, &mut packer)?;
        }
        Root::File(fd) => {
            let stat = fstat(&fd).map_err(at_root)?;
            packer.regular(options.name.clone(), &stat, fd.as_fd())?;
        }
        Root::Node(folder, name) => {
            let stat = statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(at_root)?;
            packer.node(options.name.clone(), &stat, folder.as_fd(), &name)?;
        }
    }
    packer.sink.put(&tar::END).map_err(PackError::Sink)?;
    Ok(packer.report)
}

struct Packer<'a, S> {
    sink: &'a mut S,
    options: &'a Options,
    /// Files with several names: (device, inode) to the first path.
    links: HashMap<(u64, u64), Vec<u8>>,
    report: Report,
    header: Vec<u8>,
}

fn entry(path: Vec<u8>, kind: Kind, stat: &Stat) -> Entry {
    Entry {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified: stat.st_mtime,
        modified_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ..Entry::new(path, kind)
    }
}

impl<S: Sink> Packer<'_, S> {
    fn path(&self, dirs: &Dirs, name: &CStr) -> Vec<u8> {
        join(&join(&self.options.name, dirs.path()), name.to_bytes())
    }

    fn put(
        &mut self,
        entry: &Entry,
        stored: u64,
        is_sparse: bool,
    ) -> Result<(), PackError<S::Error>> {
        if entry.path.len() > tar::MAX_PATH || entry.link.len() > tar::MAX_PATH {
            // Only trees that no path can name are that deep.
            return Err(PackError::Tree(TreeError {
                doing: "put into a tar stream",
                path: entry.path.clone(),
                errno: Errno::NAMETOOLONG,
            }));
        }
        self.header.clear();
        tar::encode(entry, stored, is_sparse, &mut self.header);
        self.report.entries = self.report.entries.saturating_add(1);
        self.sink.put(&self.header).map_err(PackError::Sink)
    }

    /// Paths of problems begin at the root of the tree, whatever it is called in the stream.
    fn problem(&mut self, doing: &'static str, path: &[u8], errno: Errno) {
        let name = &self.options.name;
        let below = path.strip_prefix(name.as_slice()).unwrap_or(path);
        let below = below.strip_prefix(b"/").unwrap_or(below).to_vec();
        self.report.problems.add(doing, below, errno);
    }

    fn xattrs(&mut self, path: &[u8], file: BorrowedFd<'_>) -> Vec<(CString, Vec<u8>)> {
        if !self.options.xattrs {
            return Vec::new();
        }
        attributes::of_file(file).unwrap_or_else(|errno| {
            self.problem("read the attributes of", path, errno);
            Vec::new()
        })
    }

    fn directory(
        &mut self,
        path: Vec<u8>,
        stat: &Stat,
        fd: BorrowedFd<'_>,
    ) -> Result<(), PackError<S::Error>> {
        let mut entry = entry(path, Kind::Directory, stat);
        entry.xattrs = self.xattrs(&entry.path, fd);
        self.put(&entry, 0, false)
    }

    /// What has no content.
    fn node(
        &mut self,
        path: Vec<u8>,
        stat: &Stat,
        folder: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<(), PackError<S::Error>> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            FileType::CharacterDevice => Kind::CharacterDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            // A socket means nothing elsewhere; the rest changed its type meanwhile.
            _ => {
                let errno = Errno::OPNOTSUPP;
                self.problem("pack", &path, errno);
                return Ok(());
            }
        };
        let mut entry = entry(path, kind, stat);
        match kind {
            Kind::Symlink => match readlinkat(folder, name, Vec::new()) {
                Ok(target) => entry.link = target.into_bytes(),
                Err(errno) => {
                    self.problem("read", &entry.path, errno);
                    return Ok(());
                }
            },
            Kind::CharacterDevice | Kind::BlockDevice => {
                let device = stat.st_rdev;
                entry.device = (rustix::fs::major(device), rustix::fs::minor(device));
            }
            _ => {}
        }
        self.put(&entry, 0, false)
    }

    fn regular(
        &mut self,
        path: Vec<u8>,
        stat: &Stat,
        file: BorrowedFd<'_>,
    ) -> Result<(), PackError<S::Error>> {
        if stat.st_nlink > 1 {
            let id = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&id) {
                let mut entry = entry(path, Kind::HardLink, stat);
                entry.link.clone_from(first);
                return self.put(&entry, 0, false);
            }
            if self.links.len() < MAX_LINKS {
                self.links.insert(id, path.clone());
            }
        }
        let mut entry = entry(path, Kind::Regular, stat);
        entry.size = u64::try_from(stat.st_size).unwrap_or(0);
        entry.xattrs = self.xattrs(&entry.path, file);
        let allocated = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let segments = if allocated < entry.size {
            segments(file, entry.size)
        } else {
            None
        };
        let Some(segments) = segments else {
            self.put(&entry, entry.size, false)?;
            self.content(&entry.path, file, 0, entry.size)?;
            return self.pad(entry.size);
        };
        let map = tar::sparse_map(&segments, entry.size);
        let data = segments
            .iter()
            .fold(0_u64, |sum, (_, length)| sum.saturating_add(*length));
        self.put(&entry, data.saturating_add(map.len() as u64), true)?;
        self.sink.put(&map).map_err(PackError::Sink)?;
        for (offset, length) in segments {
            self.content(&entry.path, file, offset, length)?;
        }
        self.pad(data)
    }

    /// Exactly `length` bytes: the header has promised them. What is missing by now is zeros, and a problem.
    fn content(
        &mut self,
        path: &[u8],
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
    ) -> Result<(), PackError<S::Error>> {
        let mut at = offset;
        let end = offset.saturating_add(length);
        while at < end {
            let space = self.sink.space();
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX);
            let room = space.len().min(wanted);
            let space = space.get_mut(..room).unwrap_or_default();
            match pread(file, space, at) {
                Err(Errno::INTR) => {}
                Ok(got) if got > 0 => {
                    at = at.saturating_add(got as u64);
                    self.report.bytes = self.report.bytes.saturating_add(got as u64);
                    self.sink.filled(got).map_err(PackError::Sink)?;
                }
                ended => {
                    let errno = ended.err().unwrap_or(Errno::NODATA);
                    self.problem("read to its end", path, errno);
                    return self.zeros(end - at);
                }
            }
        }
        Ok(())
    }

    fn zeros(&mut self, mut count: u64) -> Result<(), PackError<S::Error>> {
        while count > 0 {
            let space = self.sink.space();
            let room = usize::try_from(count)
                .unwrap_or(usize::MAX)
                .min(space.len());
            space.get_mut(..room).unwrap_or_default().fill(0);
            self.sink.filled(room).map_err(PackError::Sink)?;
            count = count.saturating_sub(room as u64);
        }
        Ok(())
    }

    fn pad(&mut self, length: u64) -> Result<(), PackError<S::Error>> {
        self.zeros(tar::padding(length) as u64)
    }
}

/// Where data lies; `None`: the file system does not say, or there are no holes.
fn segments(file: BorrowedFd<'_>, size: u64) -> Option<Vec<(u64, u64)>> {
    let mut segments = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        if data >= size {
            break;
        }
        if segments.len() >= MAX_SEGMENTS {
            segments.push((data, size - data));
            break;
        }
        let hole = seek(file, SeekFrom::Hole(data)).ok()?.min(size);
        if hole <= data {
            return None;
        }
        segments.push((data, hole - data));
        at = hole;
    }
    (segments != [(0, size)]).then_some(segments)
}

impl<S: Sink> Visitor for Packer<'_, S> {
    type Error = PackError<S::Error>;

    fn file(&mut self, dirs: &Dirs, name: &CStr, kind: FileType) -> Result<(), Self::Error> {
        let path = self.path(dirs, name);
        let here = dirs.here();
        if kind != FileType::RegularFile {
            return match statat(here, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => self.node(path, &stat, here, name),
                Err(errno) => {
                    self.problem("read", &path, errno);
                    Ok(())
                }
            };
        }
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = || {
            let file = openat(here, name, flags, Mode::empty())?;
            let stat = fstat(&file)?;
            Ok((file, stat))
        };
        match open() {
            Ok((file, stat)) if FileType::from_raw_mode(stat.st_mode) == kind => {
                self.regular(path, &stat, file.as_fd())
            }
            // It changed its type meanwhile.
            Ok(_) => {
                self.problem("read", &path, Errno::STALE);
                Ok(())
            }
            Err(errno) => {
                self.problem("read", &path, errno);
                Ok(())
            }
        }
    }

    fn enter(&mut self, dirs: &Dirs, name: &CStr) -> Result<bool, Self::Error> {
        let path = self.path(dirs, name);
        let here = dirs.here();
        let stat = match statat(here, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => stat,
            Ok(_) => {
                self.problem("read", &path, Errno::STALE);
                return Ok(false);
            }
            Err(errno) => {
                self.problem("read", &path, errno);
                return Ok(false);
            }
        };
        let mut entry = entry(path, Kind::Directory, &stat);
        if self.options.xattrs
            && let Ok(fd) = crate::dirs::open_directory(here, name, true)
        {
            entry.xattrs = self.xattrs(&entry.path, fd.as_fd());
        }
        self.put(&entry, 0, false)?;
        Ok(true)
    }

    fn leave(&mut self, _: &Dirs, _: &CStr, _: BorrowedFd<'_>) -> Result<(), Self::Error> {
        Ok(())
    }

    fn failed(&mut self, error: TreeError) -> Result<(), Self::Error> {
        // Another file system is not part of the tree.
        if error.errno != Errno::XDEV {
            self.report.problems.note(error);
        }
        Ok(())
    }
}
