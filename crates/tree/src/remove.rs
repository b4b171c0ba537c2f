//! Removing a tree: never through a symlink, never across a mount point, at any depth.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, RawDir, unlinkat};
use rustix::io::Errno;

use crate::dirs::{Dirs, open_directory};
use crate::walk::kind;
use crate::{TreeError, is_entry, join};

const BUFFER: usize = 32 << 10;

/// Removes `name` of the directory `at`, with all that is in it if it is a directory. Ends at the first
/// thing that cannot be removed; paths of errors begin with `name`.
pub fn remove_tree(at: BorrowedFd<'_>, name: &CStr) -> Result<(), TreeError> {
    let first = match unlinkat(at, name, AtFlags::empty()) {
        // EPERM: what some file systems say for a directory.
        Err(errno @ (Errno::ISDIR | Errno::PERM)) => errno,
        Err(errno) => return Err(error(name.to_bytes().to_vec(), errno)),
        Ok(()) => return Ok(()),
    };
    let root = open_directory(at, name, true).map_err(|errno| {
        let errno = if errno == Errno::NOTDIR { first } else { errno };
        error(name.to_bytes().to_vec(), errno)
    })?;
    let mut dirs = Dirs::new(root);
    let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
    let named = |path: &[u8]| join(name.to_bytes(), path);
    loop {
        if let Some(below) = empty(&dirs, &mut buffer).map_err(|mut failed| {
            failed.path = named(&failed.path);
            failed
        })? {
            dirs.enter(&below, true)
                .map_err(|errno| error(named(&join(dirs.path(), below.to_bytes())), errno))?;
            continue;
        }
        let last = dirs.name(dirs.depth()).unwrap_or_default();
        let last = CString::new(last).unwrap_or_default();
        match dirs.leave() {
            Ok(Some(_)) => unlinkat(dirs.here(), &last, AtFlags::REMOVEDIR)
                .map_err(|errno| error(named(&join(dirs.path(), last.to_bytes())), errno))?,
            Ok(None) => break,
            Err(errno) => return Err(error(named(&join(dirs.path(), last.to_bytes())), errno)),
        }
    }
    unlinkat(at, name, AtFlags::REMOVEDIR).map_err(|errno| error(name.to_bytes().to_vec(), errno))
}

/// Removes what is no directory from here, up to the first directory, which is returned.
fn empty(dirs: &Dirs, buffer: &mut [MaybeUninit<u8>]) -> Result<Option<CString>, TreeError> {
    let here = dirs.here();
    let failed = |name: &[u8], errno| error(join(dirs.path(), name), errno);
    // One comes back to a directory whose first part was read before.
    rustix::fs::seek(here, rustix::fs::SeekFrom::Start(0)).map_err(|errno| failed(b"", errno))?;
    let mut entries = RawDir::new(here, buffer);
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(|errno| failed(b"", errno))?;
        let name = entry.file_name();
        if !is_entry(name) {
            continue;
        }
        if kind(here, name, entry.file_type()) == FileType::Directory {
            return Ok(Some(name.to_owned()));
        }
        match unlinkat(here, name, AtFlags::empty()) {
            // Somebody else was faster, or put a directory in its place.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => return Ok(Some(name.to_owned())),
            Err(errno) => return Err(failed(name.to_bytes(), errno)),
        }
    }
    Ok(None)
}

const fn error(path: Vec<u8>, errno: Errno) -> TreeError {
    TreeError {
        doing: "remove",
        path,
        errno,
    }
}
