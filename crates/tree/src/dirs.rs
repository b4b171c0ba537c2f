//! A position in a tree: the directories from its root down to where one is, at any depth.
//!
//! Only the innermost directories are held open. Going up beyond them opens `..` and checks that it is the
//! directory one came from, so that moving a directory away meanwhile leads nowhere else.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;

/// Directories held open: enough for ordinary trees, few enough for many calls at a time.
const OPEN: usize = 24;

/// How a directory of the tree is opened.
const FLAGS: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Which directory it is, whatever its name.
type Id = (u32, u32, u64);

#[derive(Debug)]
struct Level {
    id: Id,
    fd: Option<OwnedFd>,
    readable: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Dirs {
    root: OwnedFd,
    below: Vec<Level>,
    /// The path from the root, and where each level's name begins in it.
    path: Vec<u8>,
    starts: Vec<usize>,
}

impl Dirs {
    /// At the root.
    #[must_use]
    pub const fn new(root: OwnedFd) -> Self {
        Self {
            root,
            below: Vec::new(),
            path: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// The root itself.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Where one is.
    #[must_use]
    pub fn here(&self) -> BorrowedFd<'_> {
        self.below
            .last()
            .and_then(|level| level.fd.as_ref())
            .unwrap_or(&self.root)
            .as_fd()
    }

    /// Directories below the root.
    #[must_use]
    pub const fn depth(&self) -> usize {
        self.below.len()
    }

    /// The path from the root to here; empty at the root.
    #[must_use]
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    /// The name of the directory at `depth`, counted from 1.
    #[must_use]
    pub fn name(&self, depth: usize) -> Option<&[u8]> {
        let at = depth.checked_sub(1)?;
        let start = *self.starts.get(at)?;
        let end = self
            .starts
            .get(depth)
            .map_or(self.path.len(), |next| next.saturating_sub(1));
        self.path.get(start..end)
    }

    /// Goes into the directory `name` of here. Symlinks and mount points are errors: ENOTDIR, EXDEV.
    /// With `readable` it can be listed; otherwise the right to search it is enough.
    pub fn enter(&mut self, name: &CStr, readable: bool) -> Result<(), Errno> {
        let fd = open_directory(self.here(), name, readable)?;
        self.push(fd, name.to_bytes(), readable)
    }

    /// Goes into a directory that was opened from here.
    pub fn push(&mut self, fd: OwnedFd, name: &[u8], readable: bool) -> Result<(), Errno> {
        let id = identify(fd.as_fd())?;
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.starts.push(self.path.len());
        self.path.extend_from_slice(name);
        self.below.push(Level {
            id,
            fd: Some(fd),
            readable,
        });
        if let Some(level) = self
            .below
            .len()
            .checked_sub(OPEN + 1)
            .and_then(|at| self.below.get_mut(at))
        {
            level.fd = None;
        }
        Ok(())
    }

    /// Goes back up; the directory that is left stays open in the caller's hands. ESTALE: `..` is not
    /// where one came from any more.
    pub fn leave(&mut self) -> Result<Option<OwnedFd>, Errno> {
        let Some(left) = self.below.pop() else {
            return Ok(None);
        };
        let start = self.starts.pop().unwrap_or(0);
        self.path.truncate(start.saturating_sub(1));
        let fd = left.fd.ok_or(Errno::STALE)?;
        if let Some(level) = self.below.last_mut()
            && level.fd.is_none()
        {
            let above = open_directory(fd.as_fd(), c"..", level.readable)?;
            if identify(above.as_fd())? != level.id {
                return Err(Errno::STALE);
            }
            level.fd = Some(above);
        }
        Ok(Some(fd))
    }

    /// Goes back to the root without looking at what is in between.
    pub fn reset(&mut self) {
        self.below.clear();
        self.starts.clear();
        self.path.clear();
    }
}

/// Opens a directory of `at` by its single name, neither through a symlink nor across a mount point.
pub fn open_directory(at: BorrowedFd<'_>, name: &CStr, readable: bool) -> Result<OwnedFd, Errno> {
    let access = if readable {
        OFlags::RDONLY
    } else {
        OFlags::PATH
    };
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    openat2(at, name, FLAGS | access, Mode::empty(), resolve)
}

fn identify(fd: BorrowedFd<'_>) -> Result<Id, Errno> {
    let found = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
    Ok((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_tree_is_walked_down_and_up_with_few_descriptors() {
        let folder = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(folder.path()).unwrap();
        let mut dirs = Dirs::new(root.into());
        for depth in 1..=2000 {
            rustix::fs::mkdirat(dirs.here(), c"down", 0o700.into()).unwrap();
            dirs.enter(c"down", true).unwrap();
            assert_eq!(dirs.depth(), depth);
        }
        assert_eq!(dirs.path().len(), 2000 * 5 - 1);
        assert_eq!(dirs.name(1), Some(&b"down"[..]));
        assert_eq!(dirs.name(2000), Some(&b"down"[..]));
        let open = dirs.below.iter().filter(|level| level.fd.is_some()).count();
        assert_eq!(open, OPEN);
        while dirs.leave().unwrap().is_some() {
            rustix::fs::unlinkat(dirs.here(), c"down", AtFlags::REMOVEDIR).unwrap();
        }
        assert_eq!((dirs.depth(), dirs.path()), (0, &b""[..]));
    }

    #[test]
    fn symlinks_are_not_entered() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", folder.path().join("out")).unwrap();
        let root = std::fs::File::open(folder.path()).unwrap();
        let mut dirs = Dirs::new(root.into());
        for readable in [true, false] {
            let refused = dirs.enter(c"out", readable).unwrap_err();
            assert!(matches!(refused, Errno::LOOP | Errno::NOTDIR), "{refused}");
        }
        assert_eq!(dirs.depth(), 0);
    }

    #[test]
    fn a_directory_that_was_moved_away_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let deep = "d/".repeat(OPEN + 5);
        std::fs::create_dir_all(folder.path().join(&deep)).unwrap();
        let root = std::fs::File::open(folder.path()).unwrap();
        let mut dirs = Dirs::new(root.into());
        for _ in 0..OPEN + 5 {
            dirs.enter(c"d", true).unwrap();
        }
        // The fourth goes elsewhere while one is far below it.
        let moved = tempfile::tempdir_in(folder.path()).unwrap();
        std::fs::rename(folder.path().join("d/d/d/d"), moved.path().join("d")).unwrap();
        let mut left = Ok(None);
        for _ in 0..OPEN + 5 {
            left = dirs.leave();
            if left.is_err() {
                break;
            }
        }
        assert_eq!(left.unwrap_err(), Errno::STALE);
    }
}
