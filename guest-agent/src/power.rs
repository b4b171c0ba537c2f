//! The end of the guest: everything written is on its drive before the power goes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount_remount};
use rustix::system::RebootCommand;

use crate::holder::Ended;
use crate::log;

/// Writes everything out, makes the drive's file system clean and ends the guest. No process but
/// this one is left, or it did not go when killed.
pub(crate) fn end_guest(ended: Ended, disk: Option<&OwnedFd>) -> ! {
    if let Some(disk) = disk {
        // A frozen file system takes no last write, and cannot be made read-only.
        thaw(disk);
    }
    rustix::fs::sync();
    // The root cannot be unmounted while this process is in it; read-only it is as clean. It comes
    // first: as long as it can be written, so must be the drive below.
    if let Some(disk) = disk {
        remount_read_only("/");
        remount_read_only(&format!("/proc/self/fd/{}", disk.as_raw_fd()));
    }
    let command = match ended {
        Ended::PowerOff => RebootCommand::PowerOff,
        Ended::Reboot => RebootCommand::Restart,
    };
    loop {
        let error = rustix::system::reboot(command);
        log!("{ended:?} failed: {error:?}");
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// Thaws the drive's file system if it is frozen.
pub(crate) fn thaw(disk: &OwnedFd) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Ok(disk) = rustix::fs::openat(disk, c".", flags, Mode::empty()) {
        let _ = crate::sys::thaw_file_system(disk.as_fd());
    }
}

fn remount_read_only(path: &str) {
    if let Err(error) = mount_remount(path, MountFlags::RDONLY, c"") {
        log!("cannot make {path} read-only: {error}");
    }
}
