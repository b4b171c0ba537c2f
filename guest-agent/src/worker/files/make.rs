//! Names: directories, links, other names, and none at all.

use std::ffi::CString;
use std::os::fd::AsFd;

use belljar_protocol::v1::{self, error::Code};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

use super::change::{Owner, set_permissions};
use super::path::GuestPath;
use super::rights::Rights;
use super::{failed, failed_below, refusal};

/// Of a new directory, unless the call says.
const DEFAULT_MODE: u32 = 0o755;

/// What `mkdir(2)` takes of a mode.
const MKDIR_MODE: u32 = 0o1777;

pub(super) fn uid(number: u32) -> Uid {
    Uid::from_raw(number)
}

pub(super) fn gid(number: u32) -> Gid {
    Gid::from_raw(number)
}

pub(super) fn directory(call: &v1::MakeDirectory) -> Result<(), v1::Error> {
    let path = GuestPath::new(&call.path)?;
    let owner = Owner::parse(&call.owner, true)?;
    let rights = Rights::of(&call.user)?;
    if call.parents {
        return directories(&rights, &path, call.permissions, owner);
    }
    let (folder, name) = rights.parent(&path)?;
    let make = || {
        let mode = call.permissions.unwrap_or(DEFAULT_MODE) & 0o7777;
        rustix::fs::mkdirat(&folder, &name, Mode::from_raw_mode(mode & MKDIR_MODE))?;
        finish(&rights, folder.as_fd(), &name, mode, owner)
    };
    make().map_err(|errno| failed("make directory", &path, errno))
}

/// What `mkdir` does not do.
fn finish(
    rights: &Rights,
    folder: std::os::fd::BorrowedFd<'_>,
    name: &std::ffi::CStr,
    mode: u32,
    owner: Owner,
) -> Result<(), Errno> {
    if mode & !MKDIR_MODE == 0 && !owner.is_given() {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY;
    let made = rights.open_at(folder, name, flags, Mode::empty())?;
    owner.apply_to(made.as_fd())?;
    set_permissions(made.as_fd(), mode)
}

/// Makes a directory and those above it that are missing; `permissions` are those of the last one.
pub(super) fn directories(
    rights: &Rights,
    path: &GuestPath,
    permissions: Option<u32>,
    owner: Owner,
) -> Result<(), v1::Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let error = |errno| failed("make directory", path, errno);
    let mut here = rustix::fs::open(c"/", flags | OFlags::CLOEXEC, Mode::empty()).map_err(error)?;
    let names = || {
        path.bytes()
            .split(|&byte| byte == b'/')
            .filter(|name| !name.is_empty())
    };
    let last = names().count();
    for (at, name) in names().enumerate() {
        let name = CString::new(name).map_err(|_| error(Errno::INVAL))?;
        let mut entered = rights.open_at(here.as_fd(), &name, flags, Mode::empty());
        if matches!(entered, Err(Errno::NOENT)) {
            let mode = permissions
                .filter(|_| at + 1 == last)
                .unwrap_or(DEFAULT_MODE)
                & 0o7777;
            match rustix::fs::mkdirat(&here, &name, Mode::from_raw_mode(mode & MKDIR_MODE)) {
                Ok(()) => finish(rights, here.as_fd(), &name, mode, owner).map_err(error)?,
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(error(errno)),
            }
            entered = rights.open_at(here.as_fd(), &name, flags, Mode::empty());
        }
        here = entered.map_err(error)?;
    }
    Ok(())
}

pub(super) fn remove(call: &v1::Remove) -> Result<(), v1::Error> {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let result = remove_path(&rights, &path, call.recursive);
    match result {
        Err(error)
            if call.missing_ok
                && error.errno == Errno::NOENT.raw_os_error().unsigned_abs()
                && rights.find(&path, false).err() == Some(Errno::NOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn remove_path(rights: &Rights, path: &GuestPath, recursive: bool) -> Result<(), v1::Error> {
    let (folder, name) = rights.parent(path)?;
    if recursive {
        return belljar_tree::remove::remove_tree(folder.as_fd(), &name).map_err(|mut error| {
            // Its path begins with the name, which `path` ends with.
            error
                .path
                .drain(..name.as_bytes().len().min(error.path.len()));
            if error.path.first() == Some(&b'/') {
                error.path.remove(0);
            }
            failed_below(path, &error)
        });
    }
    let removed = match rustix::fs::unlinkat(&folder, &name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => rustix::fs::unlinkat(&folder, &name, AtFlags::REMOVEDIR)
            .map_err(|errno| {
                if errno == Errno::NOTDIR {
                    Errno::PERM
                } else {
                    errno
                }
            }),
        other => other,
    };
    removed.map_err(|errno| failed("remove", path, errno))
}

pub(super) fn rename(call: &v1::Rename) -> Result<(), v1::Error> {
    let from = GuestPath::new(&call.from)?;
    let to = GuestPath::new(&call.to)?;
    if call.no_replace && call.exchange {
        return Err(refusal(
            Code::Invalid,
            "no_replace and exchange exclude each other",
        ));
    }
    let rights = Rights::of(&call.user)?;
    let (from_folder, from_name) = rights.parent(&from)?;
    let (to_folder, to_name) = rights.parent(&to)?;
    let flags = match (call.no_replace, call.exchange) {
        (true, _) => RenameFlags::NOREPLACE,
        (_, true) => RenameFlags::EXCHANGE,
        _ => RenameFlags::empty(),
    };
    rustix::fs::renameat_with(&from_folder, &from_name, &to_folder, &to_name, flags)
        .map_err(|errno| failed(&format!("rename {from} to"), &to, errno))
}

pub(super) fn link(call: &v1::MakeLink) -> Result<(), v1::Error> {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let (folder, name) = rights.parent(&path)?;
    if call.hard {
        let target = GuestPath::new(&call.target)?;
        let (target_folder, target_name) = rights.parent(&target)?;
        let none = AtFlags::empty();
        return rustix::fs::linkat(&target_folder, &target_name, &folder, &name, none)
            .map_err(|errno| failed(&format!("link {target} as"), &path, errno));
    }
    if call.target.is_empty() {
        return Err(refusal(Code::Invalid, "the target of a symlink is empty"));
    }
    let target = CString::new(call.target.as_slice())
        .map_err(|_| refusal(Code::Invalid, "the target of a symlink holds a NUL byte"))?;
    rustix::fs::symlinkat(&target, &folder, &name)
        .map_err(|errno| failed("make symlink", &path, errno))
}
