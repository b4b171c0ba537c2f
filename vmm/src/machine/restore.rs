//! Building a guest from a snapshot. Nothing of the file is trusted: see `snapshot`.
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use super::assemble::{
    AssembleError, Builder, Parts, Prepared, Result as Assembled, pre_fault, write_generation_id,
};
use super::events::DeviceEvents;
use super::events::Notifier;
use super::faults::{self, EndNow};
use super::guest::{Guest, GuestMemory, Origin, PAUSE_WITHIN};
use crate::api::Fault;
use crate::arch::x86_64::{cpuid, layout};
use crate::backend::page_handler::{HandlerError, PageHandler};
use crate::config::{
    CacheType, Descriptors, Discovery, Drive, DriveOverride, Expect, Format, MAX_LAYERS,
    MemoryBackend, OpenError, SnapshotLoad, Source, VmConfig, Vsock,
};
use crate::kvm::{Vcpu, Vm};
use crate::log_debug;
use crate::memory::handled::{self, Faults};
use crate::memory::working_set::{self, Copied, WorkingSet, WorkingSetError};
use crate::memory::{self, GuestRam, MemoryError, template};
use crate::snapshot::{self, FormatError, Saved, format};
use crate::virtio::device::{InterruptLine, RestoreError};
use crate::virtio::mmio::{Transport, TransportState, lock};

#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{path} cannot be read: {source}")]
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
    #[error("mem_backend: {path}: {source}")]
    Handler { path: String, source: HandlerError },
    #[error("mem_file_path: {path}: {source}")]
    Map { path: String, source: MemoryError },
    #[error(
        "/snapshot/load: this VMM was prepared with another memory file than {0}; start another one"
    )]
    OtherMemory(String),
    #[error("working_set: {path}: {source}")]
    WorkingSet {
        path: String,
        source: WorkingSetError,
    },
    #[error("drive_overrides: the snapshot has no drive {0:?}")]
    NoDrive(String),
    #[error(
        "drive_overrides: drive {0:?} cannot have layers: it is read-only or \"Unsafe\" in the snapshot, or more than 8 are named"
    )]
    Layers(String),
    #[error("only_overrides: the snapshot has a {0} for which no file of this machine was named")]
    NotOverridden(String),
    #[error("vsock_override: the snapshot has no vsock device")]
    NoVsock,
}

/// A snapshot whose files were looked at.
pub(super) struct Snapshot {
    saved: Saved,
    ram: Ram,
    working_set: WorkingSet,
    track: bool,
    advance: bool,
}

/// Where RAM comes from.
enum Ram {
    File {
        /// For messages.
        path: String,
        file: File,
    },
    Handled {
        /// For messages.
        path: String,
        handler: PageHandler,
        /// What the handler fills, if it is not RAM itself.
        template: Option<File>,
    },
}

impl Ram {
    fn open(
        backend: &MemoryBackend,
        wanted: u64,
        descriptors: &Descriptors,
    ) -> Result<Self, LoadError> {
        match backend {
            MemoryBackend::File(source) => {
                let file = memory_file("mem_backend", source, Some(wanted), descriptors)?;
                let path = source.to_string();
                Ok(Self::File { path, file })
            }
            MemoryBackend::Handler { socket, template } => {
                let template = template.as_ref().map(|source| {
                    memory_file(
                        "mem_backend.template_path",
                        source,
                        Some(wanted),
                        descriptors,
                    )
                });
                let template = template.transpose()?;
                let path = socket.to_string();
                let handler = match socket {
                    Source::Path(path) => PageHandler::connect(path),
                    Source::Fd(name) => {
                        PageHandler::from_fd(descriptors.duplicate("mem_backend", name)?)
                    }
                };
                match handler {
                    Ok(handler) => Ok(Self::Handled {
                        path,
                        handler,
                        template,
                    }),
                    Err(source) => Err(LoadError::Handler { path, source }),
                }
            }
        }
    }

    /// Maps it. Also whom to ask for its pages, and that one's name.
    fn map(self, mib: u64) -> Assembled<(GuestMemory, Option<(String, PageHandler)>)> {
        let (path, handler, template) = match self {
            Self::File { file, .. } => {
                let ram = Arc::new(template::map_file(&file, mib)?);
                return Ok((GuestMemory::restored(ram, file), None));
            }
            Self::Handled {
                path,
                handler,
                template,
            } => (path, handler, template),
        };
        let ram = Arc::new(match &template {
            Some(file) => template::map_file(file, mib)?,
            None => memory::allocate(mib)?,
        });
        let faults = Faults::begin(&ram, template.is_none())?;
        let memory = GuestMemory::handled(ram, template, Arc::new(faults))?;
        Ok((memory, Some((path, handler))))
    }
}

/// Has the handler bring pages in from now on.
fn hand_over(
    memory: &mut GuestMemory,
    path: String,
    handler: PageHandler,
    notifier: Notifier,
    end_now: EndNow,
) -> Assembled<()> {
    if let Some(faults) = &memory.faults {
        let regions = handled::regions(&memory.ram);
        let message = serde_json::to_vec(&regions).map_err(|e| AssembleError::Device {
            what: "regions of guest RAM",
            source: e.into(),
        })?;
        handler
            .hand_over(&message, faults.as_fd())
            .map_err(|source| AssembleError::Handler { path, source })?;
        // Before anything touches a page.
        let watching = faults::watch(handler, regions, notifier, end_now).map_err(|source| {
            AssembleError::Device {
                what: "page-fault handler",
                source,
            }
        })?;
        memory.watching = Some(watching);
    }
    Ok(())
}

/// A file as long as RAM, if it is known how long that is.
pub(super) fn memory_file(
    field: &str,
    source: &Source,
    wanted: Option<u64>,
    descriptors: &Descriptors,
) -> Result<File, LoadError> {
    let file = descriptors.open(field, source, Expect::ReadFile)?;
    let path = source.to_string();
    let found = match file.metadata() {
        Ok(metadata) => metadata.len(),
        Err(source) => return Err(LoadError::Read { path, source }),
    };
    if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
        return Err(LoadError::MemorySize {
            path,
            found,
            wanted,
        });
    }
    Ok(file)
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
        let wanted = u64::from(saved.config.machine_config.mem_size_mib) << 20;
        let working_set = match &load.working_set {
            Some(source) => read_working_set(source, descriptors)?,
            None => WorkingSet::default(),
        };
        // A handler is told last, when nothing else can be wrong.
        let ram = Ram::open(&load.memory, wanted, descriptors)?;
        Ok(Self {
            saved,
            ram,
            working_set,
            track: load.track_dirty_pages,
            advance: load.clock_realtime,
        })
    }

    /// The guest's configuration, with the overrides.
    pub(super) fn config(&self) -> &VmConfig {
        &self.saved.config
    }

    /// Whether RAM that was mapped ahead is this snapshot's.
    pub(super) fn check_ready(&self, prepared: &Prepared) -> Result<(), LoadError> {
        match (&prepared.memory, &self.ram) {
            (None, _) => Ok(()),
            (Some(ready), Ram::File { file, .. }) if ready.is_of(file) => Ok(()),
            (Some(_), Ram::File { path, .. } | Ram::Handled { path, .. }) => {
                Err(LoadError::OtherMemory(path.clone()))
            }
        }
    }

    /// Builds the guest; its vCPUs are paused. RAM that was mapped ahead fits.
    pub(super) fn restore(
        self,
        prepared: Prepared,
        parts: Parts<'_>,
        end_now: EndNow,
    ) -> Assembled<Guest> {
        let saved = &self.saved;
        let Prepared {
            mut vm,
            vcpus,
            cpuid: here,
            memory: ready,
        } = prepared;
        for vcpu in &saved.vcpus {
            cpuid::check_portable(&vcpu.cpuid, &here)?;
        }
        let started = Instant::now();
        let stage = |what: &str| {
            log_debug!("{what}: {} us into the load", started.elapsed().as_micros());
        };
        let mib = u64::from(saved.config.machine_config.mem_size_mib);
        let (is_mapped, is_there) = match &ready {
            Some(ready) => (true, ready.has_working_set),
            None => (false, false),
        };
        let (memory, handler) = match ready {
            Some(ready) => (ready.memory, None),
            None => self.ram.map(mib)?,
        };
        let notifier = parts.notifier.clone();
        let ram = Arc::clone(&memory.ram);
        // Before RAM is watched, or a device looks into it.
        let copied = match (&memory.template, &memory.faults) {
            (Some(file), None) if !is_there => self.working_set.copy_ahead(&ram, file),
            _ => Copied::default(),
        };
        if self.track {
            memory.watch()?;
        }
        let mut builder = Builder::new(&mut vm, memory, parts);
        let handles = builder.add_devices(&saved.serial)?;
        // When all files are there: a load that is refused for one of them can be made again.
        if let Some((path, handler)) = handler {
            hand_over(&mut builder.memory, path, handler, notifier, end_now)?;
        }
        stage("devices made");
        if !is_mapped {
            builder.vm.map_ram(&ram)?;
        }
        let tsc_set = restore_vcpus(&vcpus, saved)?;
        builder.vm.restore(&saved.vm, self.advance, tsc_set)?;
        stage("vCPUs restored");
        // Devices last: restoring the interrupt controllers would overwrite what they raise.
        restore_devices(&builder.devices, saved, Transport::restore)?;
        tell_generation(builder.vm, &ram, saved)?;
        stage("devices restored");
        if !is_there {
            self.working_set.bring_in(&ram, &copied, pre_fault(&vcpus));
            stage("working set brought in");
        }
        let running = builder.start(vcpus)?;
        let mut guest = running.into_guest(vm, handles);
        guest.origin = Some(Origin {
            saved: self.saved,
            working_set: self.working_set,
        });
        Ok(guest)
    }
}

/// Makes a paused guest, whose devices are drained, what it was when it was loaded.
pub(super) fn go_back(guest: &mut Guest) -> Result<(), Fault> {
    let Some(origin) = guest.origin.take() else {
        return Err(Fault::new(
            "/snapshot/reset: this guest was not loaded from a snapshot",
        ));
    };
    let done = go_back_to(guest, &origin).map_err(Fault::from_error);
    guest.origin = Some(origin);
    done
}

fn go_back_to(guest: &mut Guest, origin: &Origin) -> Assembled<()> {
    let Origin { saved, working_set } = origin;
    guest.memory.go_back()?;
    let deadline = Instant::now() + PAUSE_WITHIN;
    let mut tsc_set = None;
    for (vcpu, state) in guest.vcpus.iter().zip(&saved.vcpus) {
        let set = vcpu.restore(state, deadline)?;
        tsc_set.get_or_insert(set);
    }
    let tsc_set = tsc_set.unwrap_or_else(Instant::now);
    guest.vm.restore(&saved.vm, false, tsc_set)?;
    restore_devices(&guest.devices, saved, Transport::go_back)?;
    tell_generation(&guest.vm, &guest.memory.ram, saved)?;
    working_set.bring_in(&guest.memory.ram, &Copied::default(), |_, _| {});
    Ok(())
}

pub(super) fn read_working_set(
    source: &Source,
    descriptors: &Descriptors,
) -> Result<WorkingSet, LoadError> {
    let path = source.to_string();
    let file = descriptors.open("working_set", source, Expect::ReadFile)?;
    let mut bytes = Vec::new();
    let read = file
        .take(working_set::MAX_LEN as u64 + 1)
        .read_to_end(&mut bytes);
    match read {
        Ok(_) => {
            WorkingSet::decode(&bytes).map_err(|source| LoadError::WorkingSet { path, source })
        }
        Err(source) => Err(LoadError::Read { path, source }),
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
            files.is_some_and(|files| {
                // A layered drive's image is a path of the snapshot too.
                let layers = drive.format == Format::Raw || !files.layers.is_empty();
                files.path_on_host.is_some() && layers
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
        // To its guest a raw drive that is written, with flushes, is the same.
        let fits = drive.format == Format::Layers
            || !drive.is_read_only && drive.cache_type != CacheType::Unsafe;
        if !fits || files.layers.len() > MAX_LAYERS {
            return Err(LoadError::Layers(drive.drive_id.clone()));
        }
        drive.format = Format::Layers;
        drive.layers.clone_from(&files.layers);
    }
    if let Some(source) = &files.path_on_host {
        drive.path_on_host.clone_from(source);
    }
    if let Some(cache_type) = files.cache_type
        && (drive.format == Format::Raw || cache_type != CacheType::Unsafe)
    {
        drive.cache_type = cache_type;
    }
    Ok(())
}

fn override_vsock(vsock: &mut Vsock, source: &Source) {
    vsock.uds_path.clone_from(source);
}

/// Returns when the first one's TSC was set.
fn restore_vcpus(vcpus: &[Vcpu], saved: &Saved) -> Assembled<Instant> {
    let mut tsc_set = None;
    for (vcpu, state) in vcpus.iter().zip(&saved.vcpus) {
        let set = vcpu.restore(state)?;
        tsc_set.get_or_insert(set);
    }
    Ok(tsc_set.unwrap_or_else(Instant::now))
}

fn restore_devices(
    made: &[DeviceEvents],
    saved: &Saved,
    restore: fn(&mut Transport, &TransportState) -> Result<(), RestoreError>,
) -> Assembled<()> {
    let saved = &saved.devices;
    if saved.len() != made.len() {
        let (saved, made) = (saved.len(), made.len());
        return Err(AssembleError::DeviceCount { saved, made });
    }
    for (state, device) in saved.iter().zip(made) {
        let mut transport = lock(&device.transport);
        restore(&mut transport, state).map_err(|source| AssembleError::Restore {
            device: transport.name().to_owned(),
            source,
        })?;
    }
    Ok(())
}

/// A new generation id, and the interrupt that makes Linux look at it and reseed.
fn tell_generation(vm: &Vm, ram: &GuestRam, saved: &Saved) -> Assembled<()> {
    let boot = saved.config.boot_source.as_ref();
    if boot.is_none_or(|boot| boot.discovery != Discovery::Acpi) {
        return Ok(());
    }
    write_generation_id(ram)?;
    vm.irq_line(layout::EVENT_DEVICE_GSI)
        .trigger()
        .map_err(|source| AssembleError::Device {
            what: "VM generation interrupt",
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CacheType, parse};

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
        assert_eq!(config.drives[0].cache_type, CacheType::Unsafe);
    }

    #[test]
    fn what_is_kept_may_flush_though_the_saved_one_did_not_need_to() {
        let drive = r#", "drive_overrides": [{"drive_id": "a", "path_on_host": "mine",
            "cache_type": "Writeback"}]"#;
        let config = overridden(drive).unwrap();
        assert_eq!(config.drives[0].cache_type, CacheType::Writeback);
    }

    #[test]
    fn a_layered_drive_needs_an_image_and_layers_of_its_own() {
        let saved =
            br#"{"drives": [{"drive_id": "a", "path_on_host": "/secret", "is_root_device": false,
            "format": "layers", "layers": ["/other"]}]}"#;
        let overridden = |fields: &str| {
            let mut config: VmConfig = parse(saved).unwrap();
            let load = format!(
                r#"{{"snapshot_path": "s", "mem_file_path": "m", "only_overrides": true,
                "drive_overrides": [{{"drive_id": "a", {fields}}}]}}"#
            );
            let load: SnapshotLoad = parse(load.as_bytes()).unwrap();
            override_config(&mut config, &load, &VmConfig::default())
        };
        assert!(overridden(r#""layers": ["mine"]"#).is_err());
        assert!(overridden(r#""path_on_host": "mine""#).is_err());
        assert!(overridden(r#""path_on_host": "mine", "layers": ["mine"]"#).is_ok());
    }

    #[test]
    fn a_raw_drive_with_flushes_becomes_a_layered_one() {
        let overridden = |cache: &str| {
            let saved = format!(
                r#"{{"drives": [{{"drive_id": "a", "path_on_host": "/old", "is_root_device": false,
                "cache_type": "{cache}"}}]}}"#
            );
            let mut config: VmConfig = parse(saved.as_bytes()).unwrap();
            let load = br#"{"snapshot_path": "s", "mem_file_path": "m", "drive_overrides": [{"drive_id": "a",
                "path_on_host": "base", "layers": ["top"], "cache_type": "Writeback"}]}"#;
            let load: SnapshotLoad = parse(load).unwrap();
            override_config(&mut config, &load, &VmConfig::default()).map(|()| config)
        };
        let config = overridden("Volatile").unwrap();
        assert_eq!(config.drives[0].format, Format::Layers);
        assert_eq!(config.drives[0].cache_type, CacheType::Writeback);
        assert_eq!(config.drives[0].layers.len(), 1);
        assert!(overridden("Unsafe").is_err());
    }
}
