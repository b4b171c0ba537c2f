//! The part of a start that needs only `/machine-config` and `/boot-source`: guest RAM with kernel
//! and initrd in it. It is made as soon as both have been set, so that `InstanceStart` finds it
//! done; whatever changes afterwards, the files included, makes it void.
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::assemble::AssembleError;
use crate::arch::x86_64::kernel::{self, LoadedKernel};
use crate::config::{BootProtocol, BootSource, Descriptors, Expect, Source, VmConfig};
use crate::memory::{self, GuestRam};

type Result<T> = std::result::Result<T, AssembleError>;

/// A kernel in RAM that no guest has seen.
pub(super) struct Image {
    pub(super) ram: Arc<GuestRam>,
    pub(super) kernel: LoadedKernel,
    /// Address and size.
    pub(super) initrd: Option<(u64, u64)>,
    origin: Origin,
}

/// What an image was made from.
#[derive(PartialEq, Eq)]
struct Origin {
    mem_size_mib: u32,
    entry: BootProtocol,
    kernel: FileState,
    initrd: Option<FileState>,
}

/// A file as it was when it was read.
#[derive(PartialEq, Eq)]
struct FileState {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileState {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// The files of a boot source, open, and how to know them again.
struct Opened {
    kernel: File,
    initrd: Option<File>,
    origin: Origin,
}

fn open(config: &VmConfig, boot: &BootSource, descriptors: &Descriptors) -> Result<Opened> {
    let open = |field: &'static str, source: &Source| -> Result<(File, FileState)> {
        let file = descriptors.open(field, source, Expect::ReadFile)?;
        let state = FileState::of(&file).map_err(|source| AssembleError::Device {
            what: field,
            source,
        })?;
        Ok((file, state))
    };
    let (kernel, kernel_state) = open("kernel_image_path", &boot.kernel_image_path)?;
    let initrd = boot
        .initrd_path
        .as_ref()
        .map(|source| open("initrd_path", source))
        .transpose()?;
    let (initrd, initrd_state) = initrd.unzip();
    Ok(Opened {
        kernel,
        initrd,
        origin: Origin {
            mem_size_mib: config.machine_config.mem_size_mib,
            entry: boot.entry,
            kernel: kernel_state,
            initrd: initrd_state,
        },
    })
}

impl Image {
    /// Maps RAM and loads what `config` names.
    pub(super) fn load(config: &VmConfig, descriptors: &Descriptors) -> Result<Self> {
        // The configurator starts no guest without a boot source.
        let boot = config.boot_source.as_ref().ok_or(AssembleError::NoKernel)?;
        let opened = open(config, boot, descriptors)?;
        let ram = memory::allocate(u64::from(config.machine_config.mem_size_mib))?;
        let loaded = load_files(&ram, boot, opened.kernel, opened.initrd);
        match loaded {
            Ok((kernel, initrd)) => Ok(Self {
                ram: Arc::new(ram),
                kernel,
                initrd,
                origin: opened.origin,
            }),
            Err(error) => {
                memory::give_back(&ram);
                Err(error)
            }
        }
    }

    /// Whether loading again would give the same.
    pub(super) fn is_current(&self, config: &VmConfig, descriptors: &Descriptors) -> bool {
        let Some(boot) = &config.boot_source else {
            return false;
        };
        open(config, boot, descriptors).is_ok_and(|opened| opened.origin == self.origin)
    }

    /// Gives the memory back.
    pub(super) fn discard(&self) {
        memory::give_back(&self.ram);
    }
}

fn load_files(
    ram: &GuestRam,
    boot: &BootSource,
    mut kernel_file: File,
    initrd_file: Option<File>,
) -> Result<(LoadedKernel, Option<(u64, u64)>)> {
    let kernel = kernel::load(ram, &mut kernel_file, boot.entry).map_err(|source| {
        AssembleError::Kernel {
            path: boot.kernel_image_path.to_string(),
            source,
        }
    })?;
    let initrd = initrd_file
        .map(|mut file| kernel::load_initrd(ram, &mut file, &kernel))
        .transpose()
        .map_err(|source| AssembleError::Initrd {
            path: boot
                .initrd_path
                .as_ref()
                .map(Source::to_string)
                .unwrap_or_default(),
            source,
        })?;
    Ok((kernel, initrd))
}
