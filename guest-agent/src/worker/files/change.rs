//! Mode, owner, times, length.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

use belljar_protocol::v1::{self, error::Code};
use belljar_tree::TreeError;
use belljar_tree::dirs::Dirs;
use belljar_tree::walk::{Visitor, walk};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, chownat, ftruncate,
    utimensat,
};
use rustix::io::Errno;

use super::info::{self, GROUP, PASSWD, database};
use super::path::GuestPath;
use super::read::check_regular;
use super::rights::{Rights, descriptor_path, reopen};
use super::{failed, failed_below, make, refusal};
use crate::exec::users;

/// Whom a file is given to; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) user: Option<u32>,
    pub(super) group: Option<u32>,
}

impl Owner {
    /// From `USER`, `USER:GROUP` or `:GROUP`; empty: nobody. With `own_group` a user without a group brings
    /// the one that passwd says.
    pub(super) fn parse(spec: &str, own_group: bool) -> Result<Self, v1::Error> {
        if spec.is_empty() {
            return Ok(Self::default());
        }
        let invalid = |error: users::UserError| refusal(Code::Invalid, error.to_string());
        if let Some(group) = spec.strip_prefix(':') {
            let group = users::group_number(&database(GROUP), group).map_err(invalid)?;
            return Ok(Self {
                user: None,
                group: Some(group),
            });
        }
        let identity =
            users::resolve(spec, &database(PASSWD), &database(GROUP)).map_err(invalid)?;
        let has_group = own_group || spec.contains(':');
        Ok(Self {
            user: Some(identity.uid),
            group: has_group.then_some(identity.gid),
        })
    }

    pub(super) fn is_given(self) -> bool {
        self != Self::default()
    }

    /// On a descriptor of any kind.
    pub(super) fn apply_to(self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        if !self.is_given() {
            return Ok(());
        }
        let (user, group) = (self.user.map(make::uid), self.group.map(make::gid));
        chownat(fd, c"", user, group, AtFlags::EMPTY_PATH)
    }
}

/// Sets the mode of what a descriptor of any kind refers to.
pub(super) fn set_permissions(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    rustix::fs::chmod(descriptor_path(fd), Mode::from_raw_mode(mode & 0o7777))
}

/// A time of the protocol for the kernel.
pub(super) fn timespec(ns: i64) -> Timespec {
    Timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    }
}

const KEEP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: UTIME_OMIT as _,
};

pub(super) fn set_modified(fd: BorrowedFd<'_>, ns: i64) -> Result<(), Errno> {
    set_times(fd, Some(ns), None)
}

fn set_times(
    fd: BorrowedFd<'_>,
    modified: Option<i64>,
    accessed: Option<i64>,
) -> Result<(), Errno> {
    if modified.is_none() && accessed.is_none() {
        return Ok(());
    }
    let times = Timestamps {
        last_access: accessed.map_or(KEEP, timespec),
        last_modification: modified.map_or(KEEP, timespec),
    };
    match utimensat(fd, c"", &times, AtFlags::EMPTY_PATH) {
        // Kernels before 5.8.
        Err(Errno::INVAL | Errno::NOENT) => utimensat(
            rustix::fs::CWD,
            descriptor_path(fd),
            &times,
            AtFlags::empty(),
        ),
        other => other,
    }
}

pub(super) fn change(call: &v1::Change) -> Result<(), v1::Error> {
    let path = GuestPath::new(&call.path)?;
    if call.recursive && call.size.is_some() {
        return Err(refusal(
            Code::Invalid,
            "a length is set on one file, not on a tree",
        ));
    }
    let what = What {
        owner: Owner::parse(&call.owner, false)?,
        permissions: call.permissions,
        modified: call.modified_ns,
        accessed: call.accessed_ns,
    };
    let rights = Rights::of(&call.user)?;
    let error = |errno| failed("change", &path, errno);
    let found = rights.find(&path, call.follow).map_err(error)?;
    let kind = info::file_type(&info::of_descriptor(found.as_fd()).map_err(error)?);
    if let Some(size) = call.size {
        check_regular("change the length of", &path, kind)?;
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = reopen(&found, flags).map_err(error)?;
        ftruncate(&file, size).map_err(error)?;
    }
    let is_tree = call.recursive && kind == FileType::Directory;
    if !is_tree || what.comes_first() {
        what.apply(found.as_fd(), kind).map_err(error)?;
    }
    if is_tree {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let root = reopen(&found, flags).map_err(error)?;
        let mut tree = Tree {
            what: &what,
            rights: &rights,
        };
        walk(root, &mut tree).map_err(|error| failed_below(&path, &error))?;
        if !what.comes_first() {
            what.apply(found.as_fd(), kind).map_err(error)?;
        }
    }
    Ok(())
}

struct What {
    owner: Owner,
    permissions: Option<u32>,
    modified: Option<i64>,
    accessed: Option<i64>,
}

impl What {
    fn apply(&self, fd: BorrowedFd<'_>, kind: FileType) -> Result<(), Errno> {
        // Giving a file away clears its set-id bits: the mode comes after.
        self.owner.apply_to(fd)?;
        if let Some(mode) = self.permissions {
            // Linux has no mode on symlinks.
            if kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            set_permissions(fd, mode)?;
        }
        set_times(fd, self.modified, self.accessed)
    }

    /// A directory is changed before what is in it if that does not lock its owner out.
    const fn comes_first(&self) -> bool {
        match self.permissions {
            Some(mode) => mode & 0o500 == 0o500,
            None => true,
        }
    }
}

struct Tree<'a> {
    what: &'a What,
    rights: &'a Rights,
}

impl Tree<'_> {
    fn apply(&self, dirs: &Dirs, name: &CStr) -> Result<(), TreeError> {
        let change = || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let found = self
                .rights
                .open_at(dirs.here(), name, flags, Mode::empty())?;
            let kind = info::file_type(&info::of_descriptor(found.as_fd())?);
            if kind == FileType::Symlink && self.what.permissions.is_some() {
                self.what.owner.apply_to(found.as_fd())?;
                return set_times(found.as_fd(), self.what.modified, self.what.accessed);
            }
            self.what.apply(found.as_fd(), kind)
        };
        change().map_err(|errno| below("change", dirs, name, errno))
    }
}

/// An error at a name of the directory one is in.
pub(super) fn below(doing: &'static str, dirs: &Dirs, name: &CStr, errno: Errno) -> TreeError {
    let mut path = dirs.path().to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name.to_bytes());
    TreeError { doing, path, errno }
}

impl Visitor for Tree<'_> {
    type Error = TreeError;

    fn file(&mut self, dirs: &Dirs, name: &CStr, _: FileType) -> Result<(), TreeError> {
        self.apply(dirs, name)
    }

    fn enter(&mut self, dirs: &Dirs, name: &CStr) -> Result<bool, TreeError> {
        if self.what.comes_first() {
            self.apply(dirs, name)?;
        }
        Ok(true)
    }

    fn leave(&mut self, dirs: &Dirs, name: &CStr, _: BorrowedFd<'_>) -> Result<(), TreeError> {
        if self.what.comes_first() {
            return Ok(());
        }
        self.apply(dirs, name)
    }
}
