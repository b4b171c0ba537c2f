//! What the caller wants of a guest, and what that means for its directory and its VMM.

use std::path::{Path, PathBuf};

use super::BootError;
use crate::assets::{Assets, DEFAULT_DISK, absolute_file};
use crate::disk::private_copy;
use crate::drive::{DriveSpec, assign_ids};
use crate::size::{MIB, Size};
use crate::state::{self, SandboxDir};
use crate::vmm::{CacheType, Config, Drive};

/// Names of the drives that are not the user's.
const IMAGE: &str = "image";
const DISK: &str = "disk";
/// What every guest is told. Notices and worse reach the console: a sign of life, and the cause of an
/// end. After a panic the VMM ends the guest; it is not restarted.
const BOOT_ARGS: &str = "console=hvc0 loglevel=6 panic=-1 reboot=k";

/// The guest's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ImageChoice {
    /// The one from the assets.
    #[default]
    Default,
    /// Run in the initramfs.
    None,
    Path(PathBuf),
}

/// The guest's writable disk, which goes away with the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DiskChoice {
    #[default]
    Default,
    /// What is written goes to the guest's memory.
    None,
    Size(Size),
}

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    pub assets: Assets,
    pub kernel: Option<PathBuf>,
    pub initramfs: Option<PathBuf>,
    pub image: ImageChoice,
    pub disk: DiskChoice,
    pub drives: Vec<DriveSpec>,
    pub vcpus: u32,
    pub memory: Size,
    /// Appended to the kernel's command line.
    pub boot_args: Option<String>,
}

/// A checked specification: every file is there.
pub(super) struct Plan {
    config: Config,
    disk: Option<PathBuf>,
}

impl Plan {
    pub(super) fn new(spec: &GuestSpec) -> Result<Self, BootError> {
        if spec.memory.0 == 0 || !spec.memory.0.is_multiple_of(MIB) {
            return Err(BootError::Invalid(format!(
                "{} of memory is not a whole number of MiB; write for example --memory 512M",
                spec.memory
            )));
        }
        let kernel = match &spec.kernel {
            Some(path) => absolute_file("kernel", path)?,
            None => spec.assets.kernel()?,
        };
        let initramfs = match &spec.initramfs {
            Some(path) => absolute_file("initramfs", path)?,
            None => spec.assets.initramfs()?,
        };
        let image = match &spec.image {
            ImageChoice::Default => Some(spec.assets.image()?),
            ImageChoice::None => None,
            ImageChoice::Path(path) => Some(absolute_file("image", path)?),
        };
        let disk = match &spec.disk {
            // Without an image there is nothing to lay the disk over.
            DiskChoice::Default if image.is_none() => None,
            DiskChoice::Default => Some(spec.assets.disk(DEFAULT_DISK)?),
            DiskChoice::None => None,
            DiskChoice::Size(size) => Some(spec.assets.disk(*size)?),
        };
        let mut boot_args = BOOT_ARGS.to_owned();
        let mut drives = Vec::new();
        if let Some(image) = &image {
            drives.push(drive(IMAGE, utf8(image)?, true, CacheType::Unsafe));
            boot_args.push_str(" belljar.image=/dev/vda");
        }
        if disk.is_some() {
            let device = if image.is_some() { 'b' } else { 'a' };
            boot_args.push_str(&format!(" belljar.disk=/dev/vd{device}"));
            drives.push(drive(
                DISK,
                state::DISK.to_owned(),
                false,
                CacheType::Unsafe,
            ));
        }
        let ids = assign_ids(&spec.drives, &[IMAGE, DISK])?;
        for (extra, id) in spec.drives.iter().zip(ids) {
            let path = utf8(&absolute_file("drive", &extra.path)?)?;
            drives.push(drive(&id, path, extra.read_only, CacheType::Writeback));
        }
        if let Some(more) = &spec.boot_args {
            boot_args.push(' ');
            boot_args.push_str(more);
        }
        let config = Config {
            vcpus: spec.vcpus,
            memory_mib: spec.memory.0 / MIB,
            kernel: utf8(&kernel)?,
            initramfs: Some(utf8(&initramfs)?),
            boot_args,
            drives,
            vsock_path: state::VSOCK_SOCKET.to_owned(),
            console_path: state::CONSOLE_SOCKET.to_owned(),
        };
        Ok(Self { config, disk })
    }

    /// Puts into the directory what the guest needs there.
    pub(super) fn write(self, dir: &SandboxDir) -> Result<Config, BootError> {
        if let Some(empty) = &self.disk {
            private_copy(empty, &dir.file(state::DISK))?;
        }
        Ok(self.config)
    }
}

fn drive(id: &str, path_on_host: String, is_read_only: bool, cache_type: CacheType) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        path_on_host,
        is_read_only,
        is_root_device: false,
        cache_type,
    }
}

/// The API is JSON, so its paths are text.
fn utf8(path: &Path) -> Result<String, BootError> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        BootError::Invalid(format!(
            "the path {} is not UTF-8, which the VMM's API needs",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(names: &[&str]) -> (tempfile::TempDir, GuestSpec) {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        let spec = GuestSpec {
            assets: Assets::locate(Some(dir.path())).unwrap(),
            kernel: None,
            initramfs: None,
            image: ImageChoice::Default,
            disk: DiskChoice::Default,
            drives: Vec::new(),
            vcpus: 1,
            memory: Size(256 * MIB),
            boot_args: None,
        };
        (dir, spec)
    }

    #[test]
    fn image_and_disk_come_first_and_the_agent_is_told() {
        let (dir, mut spec) = spec(&["vmlinux", "initramfs", "image", "disk-1G", "data"]);
        spec.drives = vec![DriveSpec {
            path: dir.path().join("data"),
            read_only: true,
            id: None,
        }];
        let config = Plan::new(&spec).unwrap().config;
        let ids: Vec<_> = config
            .drives
            .iter()
            .map(|drive| (drive.drive_id.as_str(), drive.is_read_only))
            .collect();
        assert_eq!(ids, [("image", true), ("disk", false), ("drive0", true)]);
        assert!(
            config
                .boot_args
                .ends_with("belljar.image=/dev/vda belljar.disk=/dev/vdb"),
            "{}",
            config.boot_args
        );
    }

    #[test]
    fn without_an_image_there_is_no_disk_unless_asked_for() {
        let (_dir, mut spec) = spec(&["vmlinux", "initramfs", "disk-1G"]);
        spec.image = ImageChoice::None;
        assert!(Plan::new(&spec).unwrap().config.drives.is_empty());
        spec.disk = DiskChoice::Size(Size(1 << 30));
        let config = Plan::new(&spec).unwrap().config;
        assert!(config.boot_args.ends_with("belljar.disk=/dev/vda"));
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_is_made() {
        let (_dir, mut spec) = spec(&["vmlinux", "initramfs"]);
        assert!(matches!(Plan::new(&spec), Err(BootError::Asset(_))));
        spec.image = ImageChoice::None;
        spec.memory = Size(1000);
        assert!(matches!(Plan::new(&spec), Err(BootError::Invalid(_))));
        spec.memory = Size(0);
        assert!(matches!(Plan::new(&spec), Err(BootError::Invalid(_))));
    }
}
