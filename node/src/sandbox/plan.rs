//! What the caller wants of a guest, and what that means for its directory and its VMM.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::BootError;
use crate::assets::{AssetError, Assets, DEFAULT_DISK, absolute_file};
use crate::drive::{DriveSpec, assign_ids};
use crate::layered::Layered;
use crate::size::{MIB, Size};
use crate::state;
use crate::state::spec::{DriveRecord, Life, SPEC_VERSION, SandboxSpec, now_ms};
use crate::vmm::{CacheType, Config, Drive, Format};

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
    /// Thousandths of a host CPU that the guest may use.
    pub cpu_limit_milli: Option<u32>,
    pub memory: Size,
    /// Appended to the kernel's command line.
    pub boot_args: Option<String>,
}

/// A sandbox to make.
#[derive(Debug, Clone)]
pub struct NewSandbox {
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub life: Life,
    pub guest: GuestSpec,
}

impl NewSandbox {
    /// One that goes away with its owner.
    #[must_use]
    pub fn owned(guest: GuestSpec) -> Self {
        Self {
            name: None,
            labels: BTreeMap::new(),
            life: Life::Owned,
            guest,
        }
    }
}

/// What is written down about a new sandbox: every file is there, and named so that it will be found
/// from anywhere. The image is pinned, because the disk's content belongs to it; kernel and initramfs
/// may become newer.
pub(super) fn specify(new: &NewSandbox) -> Result<SandboxSpec, BootError> {
    let guest = &new.guest;
    if guest.memory.0 == 0 || !guest.memory.0.is_multiple_of(MIB) {
        return Err(BootError::Invalid(format!(
            "{} of memory is not a whole number of MiB; write for example --memory 512M",
            guest.memory
        )));
    }
    let named = |what, path: &Option<PathBuf>| {
        path.as_deref()
            .map(|path| absolute_file(what, path))
            .transpose()
    };
    let image = match &guest.image {
        ImageChoice::Default => {
            let link = guest.assets.image()?;
            Some(link.canonicalize().unwrap_or(link))
        }
        ImageChoice::None => None,
        ImageChoice::Path(path) => Some(absolute_file("image", path)?),
    };
    let disk = match &guest.disk {
        // Without an image there is nothing to lay the disk over.
        DiskChoice::Default if image.is_none() => None,
        DiskChoice::Default => Some(DEFAULT_DISK.0),
        DiskChoice::None => None,
        DiskChoice::Size(size) => Some(size.0),
    };
    let spec = SandboxSpec {
        version: SPEC_VERSION,
        name: new.name.clone(),
        labels: new.labels.clone(),
        created_ms: now_ms(),
        life: new.life,
        vcpus: guest.vcpus,
        cpu_limit_milli: guest.cpu_limit_milli,
        memory: guest.memory.0,
        disk,
        image,
        kernel: named("kernel", &guest.kernel)?,
        initramfs: named("initramfs", &guest.initramfs)?,
        drives: guest
            .drives
            .iter()
            .map(|drive| {
                Ok(DriveRecord {
                    path: absolute_file("drive", &drive.path)?,
                    read_only: drive.read_only,
                    id: drive.id.clone(),
                })
            })
            .collect::<Result<_, AssetError>>()?,
        boot_args: guest.boot_args.clone(),
    };
    // What could not be started is not made.
    configure(&spec, None, &guest.assets)?;
    Ok(spec)
}

/// What the VMM is told. `disk`: the files of its disk, if that has layers.
pub(super) fn configure(
    spec: &SandboxSpec,
    disk: Option<&Layered>,
    assets: &Assets,
) -> Result<Config, BootError> {
    let file = |what,
                path: &Option<PathBuf>,
                default: fn(&Assets) -> Result<PathBuf, AssetError>| match path {
        Some(path) => absolute_file(what, path),
        None => default(assets),
    };
    let kernel = file("kernel", &spec.kernel, Assets::kernel)?;
    let initramfs = file("initramfs", &spec.initramfs, Assets::initramfs)?;
    let mut boot_args = BOOT_ARGS.to_owned();
    if spec.image.is_some() {
        boot_args.push_str(" belljar.image=/dev/vda");
    }
    if spec.disk.is_some() {
        let device = if spec.image.is_some() { 'b' } else { 'a' };
        boot_args.push_str(&format!(" belljar.disk=/dev/vd{device}"));
    }
    let drives = drives(spec, disk, spec.life == Life::Persistent)?;
    if let Some(name) = &spec.name {
        boot_args.push_str(&format!(" belljar.hostname={}", host_name(name)));
    }
    if let Some(more) = &spec.boot_args {
        boot_args.push(' ');
        boot_args.push_str(more);
    }
    Ok(Config {
        vcpus: spec.vcpus,
        memory_mib: spec.memory / MIB,
        kernel: utf8(&kernel)?,
        initramfs: Some(utf8(&initramfs)?),
        boot_args,
        drives,
        vsock_path: state::VSOCK_SOCKET.to_owned(),
        console_path: state::CONSOLE_SOCKET.to_owned(),
    })
}

/// Its drives, in the order the guest sees; `disk`: the files of its disk, if that has layers; `stays`: the disk
/// outlives the guest.
pub(super) fn drives(
    spec: &SandboxSpec,
    disk: Option<&Layered>,
    stays: bool,
) -> Result<Vec<Drive>, BootError> {
    let mut drives = Vec::new();
    if let Some(image) = &spec.image {
        let image = absolute_file("image", image)?;
        drives.push(drive(IMAGE, utf8(&image)?, true, CacheType::Unsafe));
    }
    if spec.disk.is_some() {
        // What must outlive the VMM has to reach the host's disk when the guest says so. The guest says so in
        // either case: a clone of one that goes away may stay.
        let cache = if stays {
            CacheType::Writeback
        } else {
            CacheType::Volatile
        };
        let mut own = drive(DISK, state::DISK.to_owned(), false, cache);
        if let Some(disk) = disk {
            own.format = Format::Layers;
            own.path_on_host.clone_from(&disk.base);
            own.layers.clone_from(&disk.layers);
        }
        drives.push(own);
    }
    let extra: Vec<DriveSpec> = spec.drives.iter().map(drive_spec).collect();
    let ids = assign_ids(&extra, &[IMAGE, DISK])?;
    for (extra, id) in extra.iter().zip(ids) {
        let path = utf8(&absolute_file("drive", &extra.path)?)?;
        drives.push(drive(&id, path, extra.read_only, CacheType::Writeback));
    }
    Ok(drives)
}

/// A sandbox's name as a host name: RFC 1123 knows no underscore and no dot in a label's place.
pub(super) fn host_name(name: &str) -> String {
    name.replace(['_', '.'], "-")
        .trim_end_matches('-')
        .to_owned()
}

fn drive_spec(record: &DriveRecord) -> DriveSpec {
    DriveSpec {
        path: record.path.clone(),
        read_only: record.read_only,
        id: record.id.clone(),
    }
}

fn drive(id: &str, path_on_host: String, is_read_only: bool, cache_type: CacheType) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        path_on_host,
        is_read_only,
        is_root_device: false,
        cache_type,
        format: Format::Raw,
        layers: Vec::new(),
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
            cpu_limit_milli: None,
            memory: Size(256 * MIB),
            boot_args: None,
        };
        (dir, spec)
    }

    fn config(guest: &GuestSpec) -> Result<Config, BootError> {
        let spec = specify(&NewSandbox::owned(guest.clone()))?;
        configure(&spec, None, &guest.assets)
    }

    #[test]
    fn image_and_disk_come_first_and_the_agent_is_told() {
        let (dir, mut spec) = spec(&["vmlinux", "initramfs", "image", "disk-1G", "data"]);
        spec.drives = vec![DriveSpec {
            path: dir.path().join("data"),
            read_only: true,
            id: None,
        }];
        let config = config(&spec).unwrap();
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
        assert!(config(&spec).unwrap().drives.is_empty());
        spec.disk = DiskChoice::Size(Size(1 << 30));
        let config = config(&spec).unwrap();
        assert!(config.boot_args.ends_with("belljar.disk=/dev/vda"));
    }

    #[test]
    fn a_persistent_one_is_pinned_to_its_image_and_flushes() {
        let (dir, guest) = spec(&["vmlinux", "initramfs", "image-1", "disk-1G"]);
        std::os::unix::fs::symlink("image-1", dir.path().join("image")).unwrap();
        let new = NewSandbox {
            name: Some("my_box".into()),
            life: Life::Persistent,
            ..NewSandbox::owned(guest.clone())
        };
        let made = specify(&new).unwrap();
        assert!(made.image.as_ref().unwrap().ends_with("image-1"));
        let config = configure(&made, None, &guest.assets).unwrap();
        assert!(config.boot_args.contains("belljar.hostname=my-box"));
        assert_eq!(config.drives[1].cache_type, CacheType::Writeback);
        // One that goes away flushes, too: its clones may stay.
        let owned = specify(&NewSandbox::owned(guest.clone())).unwrap();
        let config = configure(&owned, None, &guest.assets).unwrap();
        assert_eq!(config.drives[1].cache_type, CacheType::Volatile);
        std::fs::remove_file(dir.path().join("image-1")).unwrap();
        let error = configure(&made, None, &guest.assets).unwrap_err();
        assert!(error.to_string().contains("image-1"), "{error}");
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_is_made() {
        let (_dir, mut spec) = spec(&["vmlinux", "initramfs"]);
        assert!(matches!(config(&spec), Err(BootError::Asset(_))));
        spec.image = ImageChoice::None;
        spec.memory = Size(1000);
        assert!(matches!(config(&spec), Err(BootError::Invalid(_))));
        spec.memory = Size(0);
        assert!(matches!(config(&spec), Err(BootError::Invalid(_))));
    }
}
