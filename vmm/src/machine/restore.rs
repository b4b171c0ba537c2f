//! Building a guest from a snapshot. Nothing of the file is trusted: see `snapshot`.
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use super::assemble::{AssembleError, Builder, Parts, Prepared, Result as Assembled};
use super::guest::{Guest, GuestMemory};
use crate::arch::x86_64::{cpuid, layout};
use crate::config::{
    Descriptors, Discovery, Drive, DriveOverride, Expect, Format, MAX_LAYERS, OpenError,
    SnapshotLoad, Source, VmConfig, Vsock,
};
use crate::kvm::Vcpu;
use crate::memory::template;
use crate::snapshot::{self, FormatError, Saved, format};
use crate::virtio::device::InterruptLine;
use crate::virtio::mmio::lock;

#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("snapshot_path: {path} cannot be read: {source}")]
    Read { path: String, source: io::Error },
    #[error("snapshot_path: {path}: {source}")]
    Format { path: String, source: FormatError },
    #[error(
        "mem_backend: {path} has {found} bytes, and the snapshot's guest {wanted} bytes of RAM: it is not the memory file of this snapshot"
    )]
    MemorySize {
        path: String,
        found: u64,
        wanted: u64,
    },
    #[error("drive_overrides: the snapshot has no drive {0:?}")]
    NoDrive(String),
    #[error("drive_overrides: drive {0:?} has no layers in the snapshot, or more than 8 are named")]
    Layers(String),
    #[error("only_overrides: the snapshot has a {0} for which no file of this machine was named")]
    NotOverridden(String),
    #[error("vsock_override: the snapshot has no vsock device")]
    NoVsock,
}

/// A snapshot whose files were looked at.
pub(super) struct Snapshot {
    saved: Saved,
    ram: File,
    advance: bool,
}

impl Snapshot {
    /// Reads the state, and sees whether the memory file fits. `own` is this process's
    /// configuration: logger, metrics, console and serial port are its own and not the snapshot's.
    pub(super) fn open(
        load: &SnapshotLoad,
        own: &VmConfig,
        descriptors: &Descriptors,
    ) -> Result<Self, LoadError> {
        let path = load.snapshot_path.to_string();
        let file = descriptors.open("snapshot_path", &load.snapshot_path, Expect::ReadFile)?;
        let mut bytes = Vec::new();
        // One byte more than there can be, so that it is noticed.
        let read = file
            .take(format::MAX_LEN as u64 + 1)
            .read_to_end(&mut bytes);
        if let Err(source) = read {
            return Err(LoadError::Read { path, source });
        }
        let mut saved =
            snapshot::decode(&bytes).map_err(|source| LoadError::Format { path, source })?;
        override_config(&mut saved.config, load, own)?;
        let ram = descriptors.open("mem_backend", &load.mem_file_path, Expect::ReadFile)?;
        let path = load.mem_file_path.to_string();
        let found = match ram.metadata() {
            Ok(metadata) => metadata.len(),
            Err(source) => return Err(LoadError::Read { path, source }),
        };
        let wanted = u64::from(saved.config.machine_config.mem_size_mib) << 20;
        if found != wanted {
            return Err(LoadError::MemorySize {
                path,
                found,
                wanted,
            });
        }
        Ok(Self {
            saved,
            ram,
            advance: load.clock_realtime,
        })
    }

    /// The guest's configuration, with the overrides.
    pub(super) fn config(&self) -> &VmConfig {
        &self.saved.config
    }

    /// Builds the guest; its vCPUs are paused.
    pub(super) fn restore(self, prepared: Prepared, parts: Parts<'_>) -> Assembled<Guest> {
        let saved = &self.saved;
        let Prepared {
            mut vm,
            vcpus,
            cpuid: here,
        } = prepared;
        for vcpu in &saved.vcpus {
            cpuid::check_portable(&vcpu.cpuid, &here)?;
        }
        let mib = u64::from(saved.config.machine_config.mem_size_mib);
        let ram = Arc::new(template::map_file(&self.ram, mib)?);
        let memory = GuestMemory::restored(Arc::clone(&ram), self.ram);
        let mut builder = Builder::new(&mut vm, memory, parts);
        let handles = builder.add_devices(&saved.serial)?;
        builder.vm.map_ram(&ram)?;
        restore_vcpus(&vcpus, saved)?;
        builder.vm.restore(&saved.vm, self.advance)?;
        // Devices last: restoring the interrupt controllers would overwrite what they raise.
        restore_devices(&builder, saved)?;
        tell_generation(&builder, saved)?;
        let running = builder.start(vcpus)?;
        Ok(running.into_guest(vm, handles))
    }
}

/// Drives and sockets by name: what a path meant where the snapshot was taken it need not mean
/// here.
fn override_config(
    config: &mut VmConfig,
    load: &SnapshotLoad,
    own: &VmConfig,
) -> Result<(), LoadError> {
    for (id, files) in &load.drives {
        let drive = config.drives.iter_mut().find(|d| d.drive_id == *id);
        let Some(drive) = drive else {
            return Err(LoadError::NoDrive(id.clone()));
        };
        override_drive(drive, files)?;
    }
    if load.only_overrides {
        let own = |drive: &Drive| {
            let files = load.drives.get(&drive.drive_id);
            files.is_some_and(|files| match drive.format {
                Format::Layers => !files.layers.is_empty(),
                _ => files.path_on_host.is_some(),
            })
        };
        if let Some(drive) = config.drives.iter().find(|drive| !own(drive)) {
            return Err(LoadError::NotOverridden(format!(
                "drive {:?}",
                drive.drive_id
            )));
        }
        if config.vsock.is_some() && load.vsock.is_none() {
            return Err(LoadError::NotOverridden("vsock device".to_owned()));
        }
    }
    match (&load.vsock, &mut config.vsock) {
        (None, _) => {}
        (Some(source), Some(vsock)) => override_vsock(vsock, source),
        (Some(_), None) => return Err(LoadError::NoVsock),
    }
    config.serial.clone_from(&own.serial);
    config.console.clone_from(&own.console);
    config.logger.clone_from(&own.logger);
    config.metrics.clone_from(&own.metrics);
    Ok(())
}

fn override_drive(drive: &mut Drive, files: &DriveOverride) -> Result<(), LoadError> {
    if !files.layers.is_empty() {
        if drive.format != Format::Layers || files.layers.len() > MAX_LAYERS {
            return Err(LoadError::Layers(drive.drive_id.clone()));
        }
        drive.layers.clone_from(&files.layers);
    }
    if let Some(source) = &files.path_on_host {
        drive.path_on_host.clone_from(source);
    }
    Ok(())
}

fn override_vsock(vsock: &mut Vsock, source: &Source) {
    vsock.uds_path.clone_from(source);
}

fn restore_vcpus(vcpus: &[Vcpu], saved: &Saved) -> Assembled<()> {
    for (vcpu, state) in vcpus.iter().zip(&saved.vcpus) {
        vcpu.restore(state)?;
    }
    Ok(())
}

fn restore_devices(builder: &Builder<'_>, saved: &Saved) -> Assembled<()> {
    let (saved, made) = (&saved.devices, &builder.devices);
    if saved.len() != made.len() {
        let (saved, made) = (saved.len(), made.len());
        return Err(AssembleError::DeviceCount { saved, made });
    }
    for (state, device) in saved.iter().zip(made) {
        let mut transport = lock(&device.transport);
        transport
            .restore(state)
            .map_err(|source| AssembleError::Restore {
                device: transport.name().to_owned(),
                source,
            })?;
    }
    Ok(())
}

/// A new generation id, and the interrupt that makes Linux look at it and reseed.
fn tell_generation(builder: &Builder<'_>, saved: &Saved) -> Assembled<()> {
    let boot = saved.config.boot_source.as_ref();
    if boot.is_none_or(|boot| boot.discovery != Discovery::Acpi) {
        return Ok(());
    }
    builder.write_generation_id()?;
    builder
        .vm
        .irq_line(layout::EVENT_DEVICE_GSI)
        .trigger()
        .map_err(|source| AssembleError::Device {
            what: "VM generation interrupt",
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    const SAVED: &[u8] =
        br#"{"drives": [{"drive_id": "a", "path_on_host": "/secret", "is_root_device": false}],
        "vsock": {"guest_cid": 3, "uds_path": "old"}}"#;

    fn overridden(more: &str) -> Result<VmConfig, LoadError> {
        let mut config: VmConfig = parse(SAVED).unwrap();
        let load = format!(r#"{{"snapshot_path": "s", "mem_file_path": "m"{more}}}"#);
        let load: SnapshotLoad = parse(load.as_bytes()).unwrap();
        override_config(&mut config, &load, &VmConfig::default()).map(|()| config)
    }

    #[test]
    fn with_only_overrides_no_path_of_the_snapshot_is_opened() {
        assert!(overridden("").is_ok());
        let only = r#", "only_overrides": true"#;
        let drive = r#", "drive_overrides": [{"drive_id": "a", "path_on_host": "mine"}]"#;
        let vsock = r#", "vsock_override": {"uds_path": "v"}"#;
        for more in [
            only.to_owned(),
            format!("{only}{drive}"),
            format!("{only}{vsock}"),
        ] {
            let error = overridden(&more).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("only_overrides"), "{error}");
        }
        let config = overridden(&format!("{only}{drive}{vsock}")).unwrap();
        assert_eq!(config.drives[0].path_on_host.to_string(), "mine");
    }
}
