//! The tree of [`super::tree`] on a real file system.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::super::procfs;
use super::tree::{Command, Out, Raw, Told, Tree, What};

/// Directories watched for one call: each costs the kernel about 2 KiB.
const MAX_DIRECTORIES: usize = 131_072;

/// Bytes of events taken in one read.
const BUFFER: usize = 16 << 10;

/// Events handled before other things are looked at.
const BATCH: usize = 4096;

/// The reason where a tree has more directories than can be watched.
pub(super) const TOO_MANY: &str = "there are too many directories to watch";

/// What the kernel's own limits are raised to. Events wait there while a tree is scanned.
const SYSCTLS: [(&str, u64); 3] = [
    ("/proc/sys/fs/inotify/max_user_watches", 1 << 20),
    ("/proc/sys/fs/inotify/max_queued_events", 131_072),
    ("/proc/sys/fs/inotify/max_user_instances", 1024),
];

/// Raises the kernel's limits, where this is allowed and they are lower.
pub(super) fn raise_limits() {
    for (path, wanted) in SYSCTLS {
        let now = procfs::text(path).and_then(|text| text.trim().parse::<u64>().ok());
        if now.is_some_and(|now| now < wanted) {
            let _ = std::fs::write(path, wanted.to_string());
        }
    }
}

/// What a watch is of.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// Absolute.
    pub(super) path: Vec<u8>,
    pub(super) recursive: bool,
}

/// A tree that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    spec: Spec,
    inotify: Arc<OwnedFd>,
    tree: Tree,
    /// Device and inode of what is watched.
    root: (u64, u64),
    mount: u64,
    begin: Instant,
    /// Why it must be built anew.
    stale: Option<&'static str>,
}

impl Watched {
    /// Begins to watch; whatever happens from the return on is told.
    pub(super) fn start(spec: &Spec) -> Result<Self, Errno> {
        let inotify = Arc::new(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // The links of /proc would lead to what the agent itself has open.
        let resolve = ResolveFlags::NO_MAGICLINKS;
        let path = spec.path.as_slice();
        let fd = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)?;
        let stat = rustix::fs::fstat(&fd)?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let wanted = if is_directory {
            in_directory()
        } else {
            of_file()
        };
        let wd = add_watch(&inotify, fd.as_fd(), wanted)?;
        let mut watched = Self {
            spec: spec.clone(),
            inotify,
            tree: Tree::new(wd, spec.recursive),
            root: (stat.st_dev, stat.st_ino),
            mount: mount_of(fd.as_fd())?,
            begin: Instant::now(),
            stale: None,
        };
        if is_directory && spec.recursive {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(descriptor_path(fd.as_fd()), flags, Mode::empty())?;
            let mut out = Out::default();
            watched.list(&folder, wd, false, &mut out)?;
            watched.carry_out(&mut out, false, &mut |_| {})?;
        }
        Ok(watched)
    }

    pub(super) fn directories(&self) -> usize {
        self.tree.directories()
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// When to call [`Self::take`] although the descriptor is not readable.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let due = self.tree.next_due(self.begin.elapsed())?;
        self.begin.checked_add(due)
    }

    /// Takes what has happened, a part of it if it is much. `Some`: everything must be begun anew, and why.
    pub(super) fn take(&mut self, mut tell: impl FnMut(Told)) -> Option<&'static str> {
        let inotify = Arc::clone(&self.inotify);
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(inotify.as_fd(), &mut buffer);
        let mut out = Out::default();
        let (mut taken, mut drained) = (0, false);
        while self.stale.is_none() && !(taken >= BATCH && reader.is_buffer_empty()) {
            match reader.next() {
                Ok(event) => {
                    let raw = Raw {
                        wd: event.wd(),
                        kind: event.events(),
                        cookie: event.cookie(),
                        name: event.file_name().map_or(&[], CStr::to_bytes),
                    };
                    self.tree.event(raw, self.begin.elapsed(), &mut out);
                    taken += 1;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !drained => {
                    drained = true;
                    self.tree.drained(&mut out);
                    self.tree.expire(self.begin.elapsed(), &mut out);
                }
                Err(Errno::AGAIN) => break,
                Err(_) => return Some("what happened cannot be read"),
            }
            if let Err(errno) = self.carry_out(&mut out, true, &mut tell) {
                return Some(if errno == Errno::NOSPC {
                    TOO_MANY
                } else {
                    "a directory cannot be watched"
                });
            }
        }
        self.stale
    }

    fn carry_out(
        &mut self,
        out: &mut Out,
        new: bool,
        tell: &mut dyn FnMut(Told),
    ) -> Result<(), Errno> {
        out.told.drain(..).for_each(&mut *tell);
        while let Some(command) = out.commands.pop_front() {
            match command {
                Command::Scan { parent, name } => self.scan(parent, &name, new, out)?,
                Command::Compare { parent, name } => self.compare(parent, &name, out)?,
                // It may have gone by itself.
                Command::Unwatch(wd) => drop(inotify::remove_watch(&*self.inotify, wd)),
                Command::CheckRoot if self.is_replaced() => tell(Told {
                    what: What::Gone("another file has taken its place"),
                    is_directory: false,
                }),
                Command::CheckRoot => {}
                Command::StartAnew(reason) => {
                    self.stale = Some(reason);
                    return Ok(());
                }
            }
            out.told.drain(..).for_each(&mut *tell);
        }
        Ok(())
    }

    fn is_replaced(&self) -> bool {
        let flags = AtFlags::empty();
        rustix::fs::statat(CWD, self.spec.path.as_slice(), flags)
            .map_or(true, |stat| (stat.st_dev, stat.st_ino) != self.root)
    }

    /// Watches a directory, then lists it.
    fn scan(&mut self, parent: i32, name: &[u8], new: bool, out: &mut Out) -> Result<(), Errno> {
        let path = [self.spec.path.as_slice(), &self.tree.path(parent, name)].join(&b'/');
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                self.tree.missed(parent, name, out);
                return Ok(());
            }
            // Whoever it is watched for has no business in there.
            Err(Errno::ACCESS | Errno::PERM | Errno::NAMETOOLONG) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        // Other file systems, and other views of this one, are not part of the tree.
        if mount_of(folder.as_fd())? != self.mount {
            return Ok(());
        }
        if self.tree.directories() >= MAX_DIRECTORIES {
            return Err(Errno::NOSPC);
        }
        let wd = match add_watch(&self.inotify, folder.as_fd(), in_directory()) {
            Err(Errno::ACCESS | Errno::PERM) => return Ok(()),
            other => other?,
        };
        if self.tree.added(parent, name, wd, out) {
            self.list(&folder, wd, new, out)?;
        }
        Ok(())
    }

    /// Sees which watch is that of the directory at a place.
    fn compare(&mut self, parent: i32, name: &[u8], out: &mut Out) -> Result<(), Errno> {
        let path = [self.spec.path.as_slice(), &self.tree.path(parent, name)].join(&b'/');
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let wd = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(folder) => match add_watch(&self.inotify, folder.as_fd(), in_directory()) {
                Err(Errno::ACCESS | Errno::PERM) => None,
                other => Some(other?),
            },
            Err(_) => None,
        };
        self.tree.is_at(parent, name, wd, out);
        Ok(())
    }

    fn list(&mut self, folder: &OwnedFd, wd: i32, new: bool, out: &mut Out) -> Result<(), Errno> {
        for entry in Dir::read_from(folder)? {
            // Removed while it is read.
            let Ok(entry) = entry else { break };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_or(FileType::Unknown, |stat| {
                        FileType::from_raw_mode(stat.st_mode)
                    }),
                kind => kind,
            };
            let is_directory = kind == FileType::Directory;
            self.tree.found(wd, name.to_bytes(), is_directory, new, out);
        }
        Ok(())
    }
}

fn in_directory() -> WatchFlags {
    WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MODIFY
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::EXCL_UNLINK
}

fn of_file() -> WatchFlags {
    WatchFlags::MODIFY
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ATTRIB
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
}

/// What the descriptor refers to, whatever its path leads to by now.
fn add_watch(inotify: &OwnedFd, fd: BorrowedFd<'_>, flags: WatchFlags) -> Result<i32, Errno> {
    inotify::add_watch(inotify, descriptor_path(fd), flags)
}

fn descriptor_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn mount_of(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
}
