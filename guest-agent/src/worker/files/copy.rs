//! Copies within the guest: shared extents where the file system can, holes kept.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use belljar_protocol::v1;
use belljar_tree::dirs::Dirs;
use belljar_tree::walk::{Visitor, walk};
use belljar_tree::{TreeError, attributes};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, Statx, Timespec, Timestamps, XattrFlags, chownat,
    copy_file_range, fchmod, fchown, fsetxattr, ftruncate, futimens, ioctl_ficlone, mkdirat,
    mknodat, readlinkat, seek, statx, symlinkat, utimensat,
};
use rustix::io::{Errno, pread, pwrite};

use super::change::below;
use super::info::{STATX, file_type, of_descriptor};
use super::path::GuestPath;
use super::read::READ;
use super::rights::{Rights, reopen};
use super::{failed, failed_below, make};

/// Bytes copied by hand at a time.
const BUFFER: usize = 128 << 10;

/// Bytes the kernel copies at a time.
const RANGE: usize = 64 << 20;

pub(super) fn copy(call: &v1::CopyPath) -> Result<(), v1::Error> {
    let from = GuestPath::new(&call.from)?;
    let to = GuestPath::new(&call.to)?;
    let rights = Rights::of(&call.user)?;
    let doing = format!("copy {from} to");
    let error = |errno| failed(&doing, &to, errno);
    let found = rights
        .find(&from, call.follow)
        .map_err(|errno| failed("copy", &from, errno))?;
    let what = of_descriptor(found.as_fd()).map_err(error)?;
    let (folder, name) = rights.parent(&to)?;
    match file_type(&what) {
        FileType::Directory if !call.recursive => Err(failed("copy", &from, Errno::ISDIR)),
        FileType::Directory => {
            let root = reopen(&found, OFlags::RDONLY | OFlags::DIRECTORY).map_err(error)?;
            match mkdirat(&folder, &name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(error(errno)),
            }
            let target =
                belljar_tree::dirs::open_directory(folder.as_fd(), &name, true).map_err(error)?;
            let made = of_descriptor(target.as_fd()).map_err(error)?;
            let source = root.try_clone().map_err(|_| error(Errno::MFILE))?;
            let mut tree = Tree {
                target: Dirs::new(target),
                made: (made.stx_dev_major, made.stx_dev_minor, made.stx_ino),
                rights: &rights,
            };
            walk(root, &mut tree).map_err(|error| failed_below(&from, &error))?;
            dress(tree.target.root(), &what, Some(source.as_fd())).map_err(error)
        }
        FileType::RegularFile => {
            let source = reopen(&found, READ.difference(OFlags::NOFOLLOW)).map_err(error)?;
            copy_file(&rights, source.as_fd(), &what, folder.as_fd(), &name).map_err(error)
        }
        kind => {
            let (above, source) = rights.parent(&from)?;
            copy_node(above.as_fd(), &source, kind, &what, folder.as_fd(), &name).map_err(error)
        }
    }
}

struct Tree<'a> {
    target: Dirs,
    /// The directory that is copied to: not to be copied itself.
    made: (u32, u32, u64),
    rights: &'a Rights,
}

impl Visitor for Tree<'_> {
    type Error = TreeError;

    fn file(&mut self, dirs: &Dirs, name: &CStr, kind: FileType) -> Result<(), TreeError> {
        let copy = || {
            if kind != FileType::RegularFile {
                let what = statx(dirs.here(), name, AtFlags::SYMLINK_NOFOLLOW, STATX)?;
                let target = self.target.here();
                return copy_node(dirs.here(), name, kind, &what, target, name);
            }
            let source = self
                .rights
                .open_at(dirs.here(), name, READ, Mode::empty())?;
            let what = of_descriptor(source.as_fd())?;
            copy_file(self.rights, source.as_fd(), &what, self.target.here(), name)
        };
        copy().map_err(|errno| below("copy", dirs, name, errno))
    }

    fn enter(&mut self, dirs: &Dirs, name: &CStr) -> Result<bool, TreeError> {
        let mut enter = || {
            let what = statx(dirs.here(), name, AtFlags::SYMLINK_NOFOLLOW, STATX)?;
            if (what.stx_dev_major, what.stx_dev_minor, what.stx_ino) == self.made {
                // A directory into itself.
                return Err(Errno::INVAL);
            }
            match mkdirat(self.target.here(), name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
            self.target.enter(name, true)
        };
        enter().map_err(|errno| below("copy", dirs, name, errno))?;
        Ok(true)
    }

    fn leave(&mut self, dirs: &Dirs, name: &CStr, left: BorrowedFd<'_>) -> Result<(), TreeError> {
        let mut leave = || {
            let made = self.target.leave()?.ok_or(Errno::STALE)?;
            dress(made.as_fd(), &of_descriptor(left)?, Some(left))
        };
        leave().map_err(|errno| below("copy", dirs, name, errno))
    }
}

fn copy_file(
    rights: &Rights,
    source: BorrowedFd<'_>,
    what: &Statx,
    folder: BorrowedFd<'_>,
    name: &CStr,
) -> Result<(), Errno> {
    if file_type(what) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let target = open_target(rights, folder, name)?;
    let made = of_descriptor(target.as_fd())?;
    if made.stx_ino == what.stx_ino
        && (made.stx_dev_major, made.stx_dev_minor) == (what.stx_dev_major, what.stx_dev_minor)
    {
        // The same file by another name: truncating it would lose it.
        return Err(Errno::INVAL);
    }
    ftruncate(&target, 0)?;
    if ioctl_ficlone(&target, source).is_err() {
        copy_content(source, target.as_fd(), what)?;
    }
    dress(target.as_fd(), what, Some(source))
}

fn open_target(rights: &Rights, folder: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags =
        OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let target = rights.open_at(folder, name, flags, Mode::from_raw_mode(0o600))?;
    if file_type(&of_descriptor(target.as_fd())?) != FileType::RegularFile {
        return Err(Errno::EXIST);
    }
    Ok(target)
}

fn copy_content(source: BorrowedFd<'_>, target: BorrowedFd<'_>, what: &Statx) -> Result<(), Errno> {
    let size = what.stx_size;
    if what.stx_blocks.saturating_mul(512) >= size {
        copy_range(source, target, 0, if size == 0 { u64::MAX } else { size })?;
        return Ok(());
    }
    let mut at = 0;
    while at < size {
        let data = match seek(source, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let hole = seek(source, SeekFrom::Hole(data))?.min(size);
        if !copy_range(source, target, data, hole)? {
            break;
        }
        at = hole;
    }
    ftruncate(target, size)
}

/// False: the source ended before.
fn copy_range(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    from: u64,
    to: u64,
) -> Result<bool, Errno> {
    let mut at = from;
    while at < to {
        let (mut read, mut written) = (at, at);
        let wanted = usize::try_from(to - at).unwrap_or(RANGE).min(RANGE);
        match copy_file_range(source, Some(&mut read), target, Some(&mut written), wanted) {
            // The end, or a file of the kernel, which has no size.
            Ok(0) if at == from => return copy_by_hand(source, target, at, to),
            Ok(0) => return Ok(false),
            Ok(count) => at = at.saturating_add(count as u64),
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::BADF) => {
                return copy_by_hand(source, target, at, to);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(true)
}

fn copy_by_hand(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    mut at: u64,
    to: u64,
) -> Result<bool, Errno> {
    let mut buffer = vec![0; BUFFER];
    while at < to {
        let wanted = usize::try_from(to - at).unwrap_or(BUFFER).min(BUFFER);
        let got = pread(source, buffer.get_mut(..wanted).unwrap_or_default(), at)?;
        if got == 0 {
            return Ok(false);
        }
        let mut data = buffer.get(..got).unwrap_or_default();
        while !data.is_empty() {
            let count = pwrite(target, data, at)?;
            at = at.saturating_add(count as u64);
            data = data.get(count..).unwrap_or_default();
        }
    }
    Ok(true)
}

/// Owner (as far as allowed), attributes, mode and times.
fn dress(
    target: BorrowedFd<'_>,
    what: &Statx,
    source: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut mode = u32::from(what.stx_mode) & 0o7777;
    let (uid, gid) = (make::uid(what.stx_uid), make::gid(what.stx_gid));
    if fchown(target, Some(uid), Some(gid)).is_err() {
        // Not the owner's any more: set-id bits would mean somebody else.
        mode &= 0o1777;
    }
    if let Some(source) = source {
        for (name, value) in attributes::of_file(source)? {
            match fsetxattr(target, &name, &value, XattrFlags::empty()) {
                // Another file system, or attributes that are not this user's to set.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    fchmod(target, Mode::from_raw_mode(mode))?;
    futimens(target, &times(what))
}

fn times(what: &Statx) -> Timestamps {
    let time = |time: rustix::fs::StatxTimestamp| Timespec {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_nsec.into(),
    };
    Timestamps {
        last_access: time(what.stx_atime),
        last_modification: time(what.stx_mtime),
    }
}

/// Symlinks, FIFOs, devices.
fn copy_node(
    from: BorrowedFd<'_>,
    from_name: &CStr,
    kind: FileType,
    what: &Statx,
    to: BorrowedFd<'_>,
    to_name: &CStr,
) -> Result<(), Errno> {
    if kind == FileType::Symlink {
        symlinkat(readlinkat(from, from_name, Vec::new())?, to, to_name)?;
    } else {
        let mode = Mode::from_raw_mode(u32::from(what.stx_mode) & 0o777);
        let device = rustix::fs::makedev(what.stx_rdev_major, what.stx_rdev_minor);
        mknodat(to, to_name, kind, mode, device)?;
    }
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    let (uid, gid) = (make::uid(what.stx_uid), make::gid(what.stx_gid));
    // Whoever may not give files away keeps them.
    let _ = chownat(to, to_name, Some(uid), Some(gid), nofollow);
    utimensat(to, to_name, &times(what), nofollow)
}
