//! The rights of a call: those of the user it is made for, in its thread only.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use belljar_protocol::v1::{self, error::Code};
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
};

use super::info::{GROUP, PASSWD, database};
use super::path::GuestPath;
use crate::exec::users::{self, Identity};
use crate::sys;
use crate::worker::{refusal, system_error};

/// Asks for the numbers without changing them.
const UNCHANGED: u32 = u32::MAX;

/// What the thread had before.
#[derive(Debug)]
struct Before {
    uid: u32,
    gid: u32,
    groups: Vec<Gid>,
    capabilities: CapabilitySets,
}

/// Holds the rights of a user for the calling thread; gives the agent's own back when dropped.
#[derive(Debug)]
pub(in crate::worker) struct Rights {
    before: Option<Before>,
}

impl Rights {
    /// Of `USER[:GROUP]`, names or numbers; empty: the agent's own.
    pub(in crate::worker) fn of(user: &str) -> Result<Self, v1::Error> {
        if matches!(user, "" | "root" | "0") {
            return Ok(Self { before: None });
        }
        let identity = users::resolve(user, &database(PASSWD), &database(GROUP))
            .map_err(|error| refusal(Code::Invalid, error.to_string()))?;
        Self::take(&identity)
            .map_err(|errno| system_error(format_args!("cannot act as user {user}"), errno))
    }

    /// Whether files may be given to anybody.
    pub(super) fn is_root(&self) -> bool {
        match &self.before {
            None => rustix::process::geteuid().is_root(),
            Some(_) => sys::set_file_ids(UNCHANGED, UNCHANGED).0 == 0,
        }
    }

    fn take(identity: &Identity) -> Result<Self, Errno> {
        let (uid, gid) = sys::set_file_ids(UNCHANGED, UNCHANGED);
        let before = Before {
            uid,
            gid,
            groups: rustix::process::getgroups()?,
            capabilities: capabilities(None)?,
        };
        let groups: Vec<Gid> = identity
            .groups
            .iter()
            .map(|&gid| Gid::from_raw(gid))
            .collect();
        set_thread_groups(&groups)?;
        // From here on whatever fails is undone by the drop.
        let capabilities = before.capabilities;
        let rights = Self {
            before: Some(before),
        };
        // The group first: without the user's capabilities it could not be set any more.
        sys::set_file_ids(UNCHANGED, identity.gid);
        sys::set_file_ids(identity.uid, UNCHANGED);
        if sys::set_file_ids(UNCHANGED, UNCHANGED) != (identity.uid, identity.gid) {
            return Err(Errno::PERM);
        }
        if identity.uid != 0 {
            // The kernel drops those about files by itself; the others would still open doors
            // (`trusted` and `security` attributes, reserved blocks, other processes' /proc).
            set_capabilities(
                None,
                CapabilitySets {
                    effective: CapabilitySet::empty(),
                    ..capabilities
                },
            )?;
        }
        Ok(rights)
    }

    /// Opens a path. Users other than root do not get through the links of /proc, which lead to what
    /// the agent itself has open.
    pub(super) fn open(
        &self,
        path: &GuestPath,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        self.open_at(CWD, path.as_c_str(), flags, mode)
    }

    /// The same, from a directory.
    pub(super) fn open_at(
        &self,
        at: BorrowedFd<'_>,
        name: &CStr,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        let resolve = if self.before.is_some() {
            ResolveFlags::NO_MAGICLINKS
        } else {
            ResolveFlags::empty()
        };
        loop {
            match openat2(at, name, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    /// Finds what a path is, without opening it: a descriptor for calls that take one, or to be opened
    /// with [`reopen`].
    pub(super) fn find(&self, path: &GuestPath, follow: bool) -> Result<OwnedFd, Errno> {
        self.open(path, node_flags(follow), Mode::empty())
    }

    /// The directory of a path, and its name there.
    pub(super) fn parent(&self, path: &GuestPath) -> Result<(OwnedFd, CString), v1::Error> {
        let (above, name) = path.split()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = self
            .open(&above, flags, Mode::empty())
            .map_err(|errno| super::failed("open directory", &above, errno))?;
        Ok((fd, name))
    }
}

/// For [`Rights::find`].
const fn node_flags(follow: bool) -> OFlags {
    if follow {
        OFlags::PATH
    } else {
        OFlags::PATH.union(OFlags::NOFOLLOW)
    }
}

/// The path by which what a descriptor refers to can be named in calls that take no descriptor.
pub(super) fn descriptor_path(fd: impl AsFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).unwrap_or_default()
}

/// Opens what was found before, whatever its path leads to by now.
pub(super) fn reopen(found: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        descriptor_path(found),
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

impl Drop for Rights {
    fn drop(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        // Capabilities first: without them nothing else may be changed. The kernel adds those about
        // files with the user's number; in the end they are exactly what they were.
        let restored = set_capabilities(None, before.capabilities).is_ok() && {
            sys::set_file_ids(before.uid, UNCHANGED);
            sys::set_file_ids(UNCHANGED, before.gid);
            set_thread_groups(&before.groups).is_ok()
                && set_capabilities(None, before.capabilities).is_ok()
                && sys::set_file_ids(UNCHANGED, UNCHANGED) == (before.uid, before.gid)
        };
        if !restored {
            // A thread with wrong rights must not serve another call; the worker is replaced.
            crate::log!("cannot give up the rights of a user");
            std::process::abort();
        }
    }
}
