//! Going through a tree, the files of a directory before the directories in it, at any depth.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, RawDir, StatxFlags, statx};
use rustix::io::Errno;

use crate::dirs::Dirs;
use crate::{TreeError, is_entry, join};

/// Bytes of directory entries asked for at once.
const BUFFER: usize = 32 << 10;

/// What is done with the entries of a tree.
pub trait Visitor {
    /// Why the walk ends early.
    type Error: From<TreeError>;

    /// Something that is no directory.
    fn file(&mut self, dirs: &Dirs, name: &CStr, kind: FileType) -> Result<(), Self::Error>;

    /// A directory, before it is entered. False: leave it out.
    fn enter(&mut self, dirs: &Dirs, name: &CStr) -> Result<bool, Self::Error>;

    /// The same directory when all in it was visited; `dirs` is where it lies.
    fn leave(&mut self, dirs: &Dirs, name: &CStr, left: BorrowedFd<'_>) -> Result<(), Self::Error>;

    /// A directory cannot be entered or read. `Ok` goes on without it.
    fn failed(&mut self, error: TreeError) -> Result<(), Self::Error> {
        Err(error.into())
    }
}

/// Visits all below `root`, not `root` itself. Never follows symlinks; mount points are told to
/// [`Visitor::failed`] as EXDEV.
pub fn walk<V: Visitor>(root: OwnedFd, visitor: &mut V) -> Result<(), V::Error> {
    let mut dirs = Dirs::new(root);
    let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
    // For each level the directories that are still to be visited, in reverse.
    let mut pending = vec![list(&dirs, &mut buffer, visitor)?];
    while let Some(level) = pending.last_mut() {
        if let Some(name) = level.pop() {
            if !visitor.enter(&dirs, &name)? {
                continue;
            }
            match dirs.enter(&name, true) {
                Ok(()) => pending.push(list(&dirs, &mut buffer, visitor)?),
                Err(errno) => {
                    let path = join(dirs.path(), name.to_bytes());
                    visitor.failed(error("open directory", path, errno))?;
                }
            }
            continue;
        }
        pending.pop();
        if pending.is_empty() {
            break;
        }
        let name = dirs.name(dirs.depth()).unwrap_or_default();
        let name = CString::new(name).unwrap_or_default();
        match dirs.leave() {
            Ok(Some(left)) => visitor.leave(&dirs, &name, left.as_fd())?,
            Ok(None) => break,
            Err(errno) => {
                let path = join(dirs.path(), name.to_bytes());
                return Err(error("go back up from", path, errno).into());
            }
        }
    }
    Ok(())
}

const fn error(doing: &'static str, path: Vec<u8>, errno: Errno) -> TreeError {
    TreeError { doing, path, errno }
}

/// Visits the files of the directory one is in; returns its directories in reverse.
fn list<V: Visitor>(
    dirs: &Dirs,
    buffer: &mut [MaybeUninit<u8>],
    visitor: &mut V,
) -> Result<Vec<CString>, V::Error> {
    let mut below = Vec::new();
    let mut entries = RawDir::new(dirs.here(), buffer);
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            Err(errno) => {
                visitor.failed(error("list directory", dirs.path().to_vec(), errno))?;
                break;
            }
        };
        let name = entry.file_name();
        if !is_entry(name) {
            continue;
        }
        match kind(dirs.here(), name, entry.file_type()) {
            FileType::Directory => below.push(name.to_owned()),
            kind => visitor.file(dirs, name, kind)?,
        }
    }
    below.reverse();
    Ok(below)
}

/// The type of an entry, asked for where the directory does not say.
#[must_use]
pub fn kind(at: BorrowedFd<'_>, name: &CStr, said: FileType) -> FileType {
    if said != FileType::Unknown {
        return said;
    }
    statx(at, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE)
        .map_or(FileType::Unknown, |found| {
            FileType::from_raw_mode(u32::from(found.stx_mode))
        })
}
