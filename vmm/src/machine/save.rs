//! Saving a guest that stands still.
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::guest::{Guest, PAUSE_WITHIN};
use crate::backend::aside::Aside;
use crate::backend::behind::{self, Child};
use crate::backend::layers::{self, LayersError, Named, NextLayer};
use crate::config::{
    Descriptors, Expect, OpenError, SnapshotCreate, SnapshotLookAhead, SnapshotType, Source,
    VmConfig, WorkingSetRecord,
};
use crate::kvm::{VcpuError, VmError};
use crate::log_info;
use crate::memory::broken;
use crate::memory::changes::{Ahead, Changes, Taken};
use crate::memory::dump::{self, Contents, Copied, Extent, Plan};
use crate::memory::room::Room;
use crate::memory::slots;
use crate::memory::working_set::WorkingSet;
use crate::snapshot::{self, FormatError, Saved};
use crate::virtio::mmio::lock;

#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("the state of the machine cannot be written down: {0}")]
    Format(#[from] FormatError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("next_layers: there is no drive {0:?} with layers")]
    NoLayers(String),
    #[error("next_layers: drive {id:?}: {source}")]
    Layers { id: String, source: LayersError },
    #[error("the kernel does not tell which pages the guest has changed: {source}")]
    Scan { source: io::Error },
    #[error("no process can be made that writes the memory file: {0}")]
    Fork(io::Error),
    #[error("{field}: {path} cannot be written: {source}; what was there before is untouched")]
    Write {
        field: &'static str,
        path: String,
        source: io::Error,
    },
}

/// The state of a paused guest whose devices are drained.
fn save(guest: &Guest, config: &VmConfig) -> Result<Saved, SaveError> {
    let deadline = Instant::now() + PAUSE_WITHIN;
    // The vCPUs first: what waits for them becomes part of the interrupt controllers' state.
    let mut vcpus = Vec::with_capacity(guest.vcpus.len());
    let mut tsc_read = None;
    for vcpu in &guest.vcpus {
        let (state, read) = vcpu.save(deadline)?;
        tsc_read.get_or_insert(read);
        vcpus.push(state);
    }
    Ok(Saved {
        config: config.clone(),
        vcpus,
        vm: guest.vm.save(tsc_read.unwrap_or_else(Instant::now))?,
        devices: guest
            .devices
            .iter()
            .map(|device| lock(&device.transport).save())
            .collect(),
        serial: guest.serial.save(),
    })
}

/// Where a snapshot goes: made before the guest has to stand still.
pub(super) struct Files {
    state: Aside,
    ram: Aside,
    /// Who wants to know when the guest runs on.
    taken: Option<File>,
    /// Drives whose layers will be frozen, and what is written then.
    next_layers: Vec<(String, layers::Handle, NextLayer)>,
}

impl Files {
    pub(super) fn new(
        guest: &Guest,
        descriptors: &Descriptors,
        create: &SnapshotCreate,
    ) -> Result<Self, SaveError> {
        Ok(Self {
            next_layers: next_layers(guest, descriptors, create)?,
            state: place("snapshot_path", &create.snapshot_path, descriptors)?,
            ram: place("mem_file_path", &create.mem_file_path, descriptors)?,
            taken: create
                .taken
                .as_ref()
                .map(|source| descriptors.open("taken", source, Expect::Output))
                .transpose()?,
        })
    }
}

/// More than this is not copied while the guest stands still, but by a copy of the process.
const COPIED: u64 = 64 << 20;
/// The time of a copy of the process is that of all RAM, of which copying so much takes as long.
const COPIED_PART: u64 = 8;
/// What the guest may change between a look ahead and its standing still.
const MORE: u64 = 2 << 20;

/// What was made before the guest has to stand still.
#[derive(Default)]
pub(super) struct Beforehand {
    found: Option<Ahead>,
    room: Option<Room>,
}

/// Shortens the pause of a guest that still runs.
pub(super) fn look_ahead(guest: &Guest, create: &SnapshotCreate) -> Result<Beforehand, SaveError> {
    let memory = &guest.memory;
    let all = create.snapshot_type != SnapshotType::Increment;
    let found = changes_of(&memory.changes)
        .look_ahead(&memory.ram, all)
        .map_err(|source| SaveError::Scan { source })?;
    let size: u64 = slots(&memory.ram).iter().map(|slot| slot.len).sum();
    let wanted = found.changed().saturating_add(MORE);
    let fits = !all && wanted <= COPIED.min(size / COPIED_PART);
    Ok(Beforehand {
        // Without memory for it a copy of the process does as well.
        room: fits.then(|| Room::of(wanted).ok()).flatten(),
        found: Some(found),
    })
}

/// The same some time before: what is found now need not be looked for again.
pub(super) fn look_early(guest: &Guest, look: SnapshotLookAhead) -> Result<(), SaveError> {
    let memory = &guest.memory;
    let all = look.snapshot_type != SnapshotType::Increment;
    changes_of(&memory.changes)
        .look_early(&memory.ram, all)
        .map_err(|source| SaveError::Scan { source })
}

/// How long the parts of a capture took, in microseconds.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(super) struct Phases {
    /// From the call until the guest stood still.
    pub(super) stop_us: u64,
    /// State of vCPUs and devices.
    pub(super) state_us: u64,
    /// Finding, and protecting again, the pages to write.
    pub(super) scan_us: u64,
    /// The frozen copy.
    pub(super) copy_us: u64,
    /// Freezing layers of drives, when vCPUs run on and nothing is taken from them yet.
    pub(super) layers_us: u64,
    /// All the time in which the guest did not run.
    pub(super) paused_us: u64,
}

pub(super) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A frozen copy of what is to be written.
pub(super) enum Behind {
    /// A copy of this process, which writes it.
    Child(Child),
    Copied(Copied),
}

/// A snapshot whose moment has been, but that is not written yet.
pub(super) struct Capture {
    create: SnapshotCreate,
    saved: Saved,
    files: Files,
    plan: Plan,
    room: Option<Room>,
    /// Somebody else brings pages in, and may not have some.
    is_handled: bool,
    /// What became of drives' layers, if they were frozen behind the guest.
    frozen: Result<(), SaveError>,
    pub(super) phases: Phases,
    changes: Arc<Mutex<Changes>>,
    /// Taken when it is written, or has failed.
    taken: Option<Taken>,
    started: Instant,
}

impl Capture {
    /// Of a guest that is paused.
    pub(super) fn begin(
        guest: &Guest,
        config: &VmConfig,
        files: Files,
        create: &SnapshotCreate,
        before: Beforehand,
    ) -> Result<Self, SaveError> {
        let started = Instant::now();
        let saved = save(guest, config)?;
        let state_us = us(started.elapsed());
        let extent = match create.snapshot_type {
            SnapshotType::Full => Extent::Full,
            SnapshotType::Diff | SnapshotType::Increment => Extent::Diff,
        };
        let memory = &guest.memory;
        let mut changes = changes_of(&memory.changes);
        let taken = changes
            .take(&memory.ram, before.found)
            .map_err(|source| SaveError::Scan { source })?;
        let planned = dump::plan(
            &Contents {
                ram: &memory.ram,
                template: memory.template.as_ref(),
                zeroed: &memory.zeroed.get(),
                changed: taken
                    .ranges()
                    .filter(|_| create.snapshot_type == SnapshotType::Increment),
                own: taken.own(),
            },
            extent,
        );
        let plan = match planned {
            Ok(plan) => plan,
            Err(source) => {
                changes.finish(taken, false);
                return Err(SaveError::Scan { source });
            }
        };
        Ok(Self {
            create: create.clone(),
            saved,
            files,
            plan,
            // Pages that somebody else brings in may be among what has become zero; nobody waits for them here.
            room: before
                .room
                .filter(|_| memory.faults.is_none() || taken.is_there()),
            is_handled: memory.faults.is_some(),
            frozen: Ok(()),
            phases: Phases {
                state_us,
                scan_us: us(started.elapsed()).saturating_sub(state_us),
                ..Phases::default()
            },
            changes: Arc::clone(&memory.changes),
            taken: Some(taken),
            started,
        })
    }

    /// Writes it, while the guest stands still.
    pub(super) fn write(self) -> Result<(), SaveError> {
        let written = self.plan.write(self.files.ram.file());
        self.complete(written)
    }

    /// Has it written from a frozen copy of RAM: vCPUs may run on when this returns, and devices after
    /// [`Capture::freeze_disk`].
    pub(super) fn begin_to_write(&mut self) -> Result<Behind, SaveError> {
        let started = Instant::now();
        if self.is_handled && self.room.is_some() && !self.plan.can_be_had() {
            // Copying it here would end the guest; a copy of this process fails, and says why.
            self.room = None;
        }
        let behind = match self.room.take().and_then(|room| self.plan.copy(room)) {
            Some(copied) => Behind::Copied(copied),
            None => {
                let (plan, out) = (&self.plan, self.files.ram.file());
                let child = behind::begin(|| plan.write(out)).map_err(SaveError::Fork)?;
                Behind::Child(child)
            }
        };
        self.phases.copy_us = us(started.elapsed());
        Ok(behind)
    }

    /// Has drives go on with their next layers. No device has taken anything from the guest since it stood still: so
    /// what they froze is of the same instant as RAM. This waits for the host's disk; what fails is told in the end.
    pub(super) fn freeze_disk(&mut self) {
        let started = Instant::now();
        self.frozen = self.freeze_layers();
        self.phases.layers_us = us(started.elapsed());
    }

    /// The guest runs on.
    pub(super) fn tell(&mut self) {
        if let Some(mut taken) = self.files.taken.take() {
            // Whoever does not listen any more does without.
            let _ = taken.write_all(&[1]);
        }
    }

    /// Waits until it is written.
    pub(super) fn complete_behind(self, behind: Behind) -> Result<(), SaveError> {
        let written = match behind {
            Behind::Child(child) => child.wait(),
            Behind::Copied(copied) => copied.write(self.files.ram.file()),
        };
        self.complete(written)
    }

    /// Drives have nothing in flight.
    fn freeze_layers(&mut self) -> Result<(), SaveError> {
        for (id, handle, layer) in self.files.next_layers.drain(..) {
            handle
                .freeze(layer)
                .map_err(|source| SaveError::Layers { id, source })?;
        }
        Ok(())
    }

    /// Both files get their names when both are whole.
    fn complete(mut self, written: io::Result<u64>) -> Result<(), SaveError> {
        let done = self.finish_files(written);
        if let Some(taken) = self.taken.take() {
            changes_of(&self.changes).finish(taken, done.is_ok());
        }
        let (written, state) = done?;
        log_info!(
            "snapshot: {} KiB of RAM and {state} bytes of state in {} us",
            written >> 10,
            self.started.elapsed().as_micros()
        );
        Ok(())
    }

    /// (bytes of RAM, bytes of state)
    fn finish_files(&mut self, written: io::Result<u64>) -> Result<(u64, usize), SaveError> {
        let failed = |field, source: &Source| {
            let path = source.to_string();
            move |source| SaveError::Write {
                field,
                path,
                source,
            }
        };
        let create = self.create.clone();
        let ram_failed = || failed("mem_file_path", &create.mem_file_path);
        let state_failed = || failed("snapshot_path", &create.snapshot_path);
        // RAM is what is read from, so it is RAM that is missing.
        let told = |error: io::Error| match error.raw_os_error() {
            Some(libc::EFAULT) => io::Error::other(broken::NOT_THERE),
            _ => error,
        };
        let written = written.map_err(told).map_err(ram_failed())?;
        let state = snapshot::encode(&self.saved)?;
        let mut out = self.files.state.file();
        out.write_all(&state).map_err(state_failed())?;
        self.files.ram.sync().map_err(ram_failed())?;
        self.files.state.sync().map_err(state_failed())?;
        std::mem::replace(&mut self.frozen, Ok(()))?;
        // Of a guest that has stood still all the time; of others it was done.
        self.freeze_layers()?;
        // The state last: where it is, its RAM is. So what is replaced goes first: a crash in between must not
        // leave the new RAM beside the old state.
        let before = self.files.state.withdraw().map_err(state_failed())?;
        self.files.ram.commit().map_err(ram_failed())?;
        before.forget();
        self.files.state.commit().map_err(state_failed())?;
        Ok((written, state.len()))
    }
}

/// What was taken is not lost with a capture that came to nothing.
impl Drop for Capture {
    fn drop(&mut self) {
        if let Some(taken) = self.taken.take() {
            changes_of(&self.changes).finish(taken, false);
        }
    }
}

/// Writes down which pages the guest has touched.
pub(super) fn record_working_set(
    guest: &Guest,
    descriptors: &Descriptors,
    record: &WorkingSetRecord,
) -> Result<(), SaveError> {
    let set = WorkingSet::record(&guest.memory.ram).map_err(|source| SaveError::Scan { source })?;
    let mut out = place("path", &record.path, descriptors)?;
    let written = out
        .file()
        .write_all(&set.encode())
        .and_then(|()| out.commit());
    written.map_err(|source| SaveError::Write {
        field: "path",
        path: record.path.to_string(),
        source,
    })
}

fn changes_of(changes: &Mutex<Changes>) -> MutexGuard<'_, Changes> {
    changes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens what will be written after the snapshot, before anything has changed.
fn next_layers(
    guest: &Guest,
    descriptors: &Descriptors,
    create: &SnapshotCreate,
) -> Result<Vec<(String, layers::Handle, NextLayer)>, SaveError> {
    let mut next = Vec::new();
    for (id, source) in &create.next_layers {
        let handle = guest.drives.get(id).and_then(|drive| drive.layers.as_ref());
        let handle = handle.ok_or_else(|| SaveError::NoLayers(id.clone()))?;
        let field = format!("next_layers: {id}");
        let file = descriptors.open(&field, source, Expect::WriteDisk)?;
        let name = source.to_string();
        let layer = handle
            .next(Named { file, name })
            .map_err(|source| SaveError::Layers {
                id: id.clone(),
                source,
            })?;
        next.push((id.clone(), handle.clone(), layer));
    }
    Ok(next)
}

fn place(
    field: &'static str,
    source: &Source,
    descriptors: &Descriptors,
) -> Result<Aside, SaveError> {
    match source {
        Source::Path(path) => Aside::create(path).map_err(|error| SaveError::Write {
            field,
            path: source.to_string(),
            source: error,
        }),
        Source::Fd(_) => {
            let file = descriptors.open(field, source, Expect::EmptyFile)?;
            Ok(Aside::given(file))
        }
    }
}
