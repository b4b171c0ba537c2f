//! Saving a guest that stands still.
use std::io::{self, Write};
use std::time::Instant;

use super::guest::{Guest, PAUSE_WITHIN};
use crate::backend::aside::Aside;
use crate::backend::layers::{self, LayersError, Named, NextLayer};
use crate::config::{
    Descriptors, Expect, OpenError, SnapshotCreate, SnapshotType, Source, VmConfig,
};
use crate::kvm::{VcpuError, VmError};
use crate::log_info;
use crate::memory::dump::{self, Contents, Extent};
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
    let vcpus = guest.vcpus.iter().map(|vcpu| vcpu.save(deadline));
    Ok(Saved {
        config: config.clone(),
        vcpus: vcpus.collect::<Result<_, _>>()?,
        vm: guest.vm.save()?,
        devices: guest
            .devices
            .iter()
            .map(|device| lock(&device.transport).save())
            .collect(),
        serial: guest.serial.save(),
    })
}

/// Writes state and RAM. Both get their names when both are whole.
pub(super) fn create(
    guest: &Guest,
    config: &VmConfig,
    descriptors: &Descriptors,
    create: &SnapshotCreate,
) -> Result<(), SaveError> {
    let started = Instant::now();
    let next = next_layers(guest, descriptors, create)?;
    let state = snapshot::encode(&save(guest, config)?)?;
    let state_file = place("snapshot_path", &create.snapshot_path, descriptors)?;
    let ram_file = place("mem_file_path", &create.mem_file_path, descriptors)?;
    let extent = match create.snapshot_type {
        SnapshotType::Full => Extent::Full,
        SnapshotType::Diff => Extent::Diff,
    };
    let contents = Contents {
        ram: &guest.memory.ram,
        template: guest.memory.template.as_ref(),
        zeroed: &guest.memory.zeroed.get(),
    };
    let failed = |field, source: &Source| {
        let path = source.to_string();
        move |source| SaveError::Write {
            field,
            path,
            source,
        }
    };
    let ram_failed = || failed("mem_file_path", &create.mem_file_path);
    let state_failed = || failed("snapshot_path", &create.snapshot_path);
    let written = dump::write(&contents, extent, ram_file.file()).map_err(ram_failed())?;
    let mut out = state_file.file();
    out.write_all(&state).map_err(state_failed())?;
    ram_file.sync().map_err(ram_failed())?;
    state_file.sync().map_err(state_failed())?;
    // The guest has stood still all the time: this is the same instant.
    for (id, handle, layer) in next {
        handle
            .freeze(layer)
            .map_err(|source| SaveError::Layers { id, source })?;
    }
    // The state last: where it is, RAM is.
    ram_file.commit().map_err(ram_failed())?;
    state_file.commit().map_err(state_failed())?;
    log_info!(
        "snapshot: {} KiB of RAM and {} bytes of state in {} us",
        written >> 10,
        state.len(),
        started.elapsed().as_micros()
    );
    Ok(())
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
