//! The root of the guest: the read-only image, overlaid with the writable drive.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};

use super::mounts::make_folder;
use super::{Attempt, BootError};
use crate::log;

const LOWER: &str = "/image";
const DISK: &str = "/disk";
const ROOT: &str = "/newroot";

/// Drives are there before PID 1 starts, unless a driver takes its time or is a module.
const DEVICE_TIME: Duration = Duration::from_secs(2);
const DEVICE_PAUSE: Duration = Duration::from_micros(500);

/// Depth of the initramfs that is freed.
const MAX_DEPTH: usize = 8;

/// Mounts `image` (EROFS) below `disk` (ext4; without one, memory) and makes it the root of this
/// process. Returns the mounted drive.
pub(super) fn switch_to(image: &str, disk: Option<&str>) -> Result<Option<OwnedFd>, BootError> {
    for folder in [LOWER, DISK, ROOT] {
        make_folder(folder, 0o755)
            .attempt("root", || format!("making {folder} in the initramfs"))?;
    }
    wait_for("image", image)?;
    mount(
        image,
        LOWER,
        "erofs",
        MountFlags::RDONLY | MountFlags::NODEV,
        c"",
    )
    .attempt("image", || format!("mounting {image} (erofs)"))?;
    match disk {
        Some(disk) => {
            wait_for("disk", disk)?;
            mount(disk, DISK, "ext4", MountFlags::NODEV, c"")
                .attempt("disk", || format!("mounting {disk} (ext4)"))?;
        }
        None => mount("tmpfs", DISK, "tmpfs", MountFlags::NODEV, c"mode=755")
            .attempt("disk", || "mounting tmpfs in place of a disk".to_owned())?,
    }
    for folder in ["/disk/upper", "/disk/work"] {
        make_folder(folder, 0o755).attempt("disk", || format!("making {folder} on the disk"))?;
    }
    let options = c"lowerdir=/image,upperdir=/disk/upper,workdir=/disk/work";
    mount("overlay", ROOT, "overlay", MountFlags::empty(), options)
        .attempt("overlay", || format!("joining {image} and the disk"))?;
    for folder in ["/dev", "/proc"] {
        let target = format!("{ROOT}{folder}");
        make_folder(&target, 0o755)
            .attempt("overlay", || format!("making {folder} in the root"))?;
        mount_move(folder, &target)
            .attempt("switch root", || format!("moving {folder} into the root"))?;
    }
    let kept = disk.map(|_| rustix::fs::open(DISK, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()));
    let kept = kept
        .transpose()
        .attempt("disk", || format!("opening {DISK}"))?;
    free_initramfs();
    let entered = rustix::process::chdir(ROOT)
        .and_then(|()| mount_move(".", "/"))
        .and_then(|()| rustix::process::chroot("."))
        .and_then(|()| rustix::process::chdir("/"));
    entered.attempt("switch root", || "moving the root to /".to_owned())?;
    Ok(kept)
}

fn wait_for(stage: &'static str, device: &str) -> Result<(), BootError> {
    let start = Instant::now();
    loop {
        let found = rustix::fs::stat(device);
        match found {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode).is_block_device() => return Ok(()),
            Ok(_) => {
                return Err(Errno::NOTBLK).attempt(stage, || format!("using {device} as a drive"));
            }
            Err(error) if start.elapsed() >= DEVICE_TIME => {
                let seconds = DEVICE_TIME.as_secs();
                return Err(error).attempt(stage, || {
                    format!("waiting {seconds} s for the drive {device}")
                });
            }
            Err(_) => std::thread::sleep(DEVICE_PAUSE),
        }
    }
}

/// Unlinks the files of the initramfs, whose memory would stay taken. Everything that is mounted on
/// it stays: only what lies on its own device is touched.
fn free_initramfs() {
    let freed = rustix::fs::open(
        "/",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|root| {
        let device = rustix::fs::fstat(&root)?.st_dev;
        free_folder(&root, device, MAX_DEPTH)
    });
    if let Err(error) = freed {
        log!("cannot free the memory of the initramfs: {error}");
    }
}

fn free_folder(folder: &OwnedFd, device: u64, depth: usize) -> rustix::io::Result<()> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_dev != device {
            continue;
        }
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            rustix::fs::unlinkat(folder, name, AtFlags::empty())?;
        } else if let Some(depth) = depth.checked_sub(1) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let inner = rustix::fs::openat(folder, name, flags, Mode::empty())?;
            free_folder(&inner, device, depth)?;
        }
    }
    Ok(())
}
