//! The file systems that the kernel itself provides.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use super::{Attempt, BootError};
use crate::log;

const STAGE: &str = "first file systems";

/// Makes a folder that may be there already.
pub(super) fn make_folder(path: &str, mode: u32) -> rustix::io::Result<()> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// `/dev` and `/proc`: everything else needs them. From here on the log has a console.
pub(super) fn first_file_systems() -> Result<(), BootError> {
    mount_at("devtmpfs", "/dev", MountFlags::NOSUID, "mode=755")
        .attempt(STAGE, || "mounting devtmpfs at /dev".to_owned())?;
    log::open_console();
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("proc", "/proc", flags, "").attempt(STAGE, || "mounting proc at /proc".to_owned())
}

/// What programs expect besides. None of it keeps the agent from serving.
pub(super) fn user_file_systems() {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let quiet = flags | MountFlags::NOEXEC;
    let pts = MountFlags::NOSUID | MountFlags::NOEXEC;
    for (kind, path, flags, options) in [
        ("sysfs", "/sys", quiet, ""),
        ("cgroup2", "/sys/fs/cgroup", quiet, ""),
        ("devpts", "/dev/pts", pts, "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", flags, "mode=1777"),
        ("tmpfs", "/run", flags, "mode=755"),
        ("tmpfs", "/tmp", flags, "mode=1777"),
    ] {
        if let Err(error) = mount_at(kind, path, flags, options) {
            log!("cannot mount {kind} at {path}: {error}");
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match rustix::fs::symlink(target, link) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => log!("cannot make {link}: {error}"),
        }
    }
}

fn mount_at(kind: &str, path: &str, flags: MountFlags, options: &str) -> rustix::io::Result<()> {
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    match mount(kind, path, kind, flags, options.as_c_str()) {
        // Mounted by the kernel (CONFIG_DEVTMPFS_MOUNT), or by an agent before this one.
        Err(Errno::BUSY) => Ok(()),
        Err(Errno::NOENT) => {
            make_folder(path, 0o755)?;
            mount(kind, path, kind, flags, options.as_c_str())
        }
        other => other,
    }
}
