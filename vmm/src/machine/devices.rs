//! Calls of the API that a device carries out, and the counters of devices.
use super::guest::Guest;
use crate::api::{Body, Effect, Fault};
use crate::backend::disk::FileId;
use crate::backend::layers::{self, LayersError, Named};
use crate::config::{Descriptors, DrivePatch, Expect, Source};
use crate::metrics::Registry;
use crate::virtio::balloon::BalloonHandle;

/// Carries out what `effect` asks of a device; nothing has changed if it fails.
pub(super) fn carry_out(
    guest: &Guest,
    descriptors: &Descriptors,
    effect: &Effect,
) -> Result<Body, Fault> {
    match effect {
        Effect::UpdateDrive(patch) => update_drive(guest, descriptors, patch)?,
        Effect::UpdateBalloon(update) => balloon(guest)?.set_target(update.amount_mib),
        Effect::UpdateBalloonStats(update) => balloon(guest)?
            .set_stats_interval(update.stats_polling_interval_s)
            .map_err(Fault::from_error)?,
        Effect::ReadBalloonStats => return Body::json(&balloon(guest)?.stats()),
        Effect::StartHinting(start) => balloon(guest)?.start_hinting(start.acknowledge_on_stop),
        Effect::StopHinting => balloon(guest)?.stop_hinting(),
        Effect::ReadHinting => return Body::json(&balloon(guest)?.hinting()),
        other => return Err(Fault::new(format!("{other:?} is no call of a device"))),
    }
    Ok(Body::Empty)
}

fn balloon(guest: &Guest) -> Result<&BalloonHandle, Fault> {
    guest
        .balloon
        .as_ref()
        .ok_or_else(|| Fault::new("there is no balloon device"))
}

fn update_drive(guest: &Guest, descriptors: &Descriptors, patch: &DrivePatch) -> Result<(), Fault> {
    let id = &patch.drive_id;
    let Some(drive) = guest.drives.get(id) else {
        return Err(Fault::new(format!("drive_id: there is no drive {id:?}")));
    };
    if let Some(handle) = &drive.layers {
        return update_layers(handle, drive.read_only, descriptors, patch);
    }
    if patch.merged_layers.is_some() || patch.next_layer.is_some() || !patch.layers.is_empty() {
        return Err(Fault::new(format!("drive {id:?} has no layers")));
    }
    let Some(path) = &patch.path_on_host else {
        drive.control.rescan();
        return Ok(());
    };
    let expect = if drive.read_only {
        Expect::ReadDisk
    } else {
        Expect::WriteDisk
    };
    let field = format!("drive {id:?}: path_on_host");
    let file = descriptors
        .open(&field, path, expect)
        .map_err(Fault::from_error)?;
    // Two drives on one open file share its lock, so the lock cannot tell.
    let wanted = FileId::of(&file).map_err(Fault::from_error)?;
    let other = guest.drives.iter().find(|(name, known)| {
        *name != id && known.control.file() == Some(wanted) && !(known.read_only && drive.read_only)
    });
    if let Some((other, _)) = other {
        return Err(Fault::new(format!(
            "drive {id:?}: {path} is drive {other:?} already; only read-only drives can share a file"
        )));
    }
    drive
        .control
        .replace(file, &path.to_string())
        .map_err(Fault::from_error)
}

/// Of a paused guest, unless layers are merged: its drives are drained.
fn update_layers(
    handle: &layers::Handle,
    read_only: bool,
    descriptors: &Descriptors,
    patch: &DrivePatch,
) -> Result<(), Fault> {
    let id = &patch.drive_id;
    let open = |field: &str, source: &Source, expect| {
        let field = format!("drive {id:?}: {field}");
        let file = descriptors.open(&field, source, expect);
        let name = source.to_string();
        file.map(|file| Named { file, name })
            .map_err(Fault::from_error)
    };
    let failed = |field: &'static str| {
        move |error: LayersError| Fault::new(format!("drive {id:?}: {field}: {error}"))
    };
    if let Some(merged) = &patch.merged_layers {
        let file = open("merged_layers", &merged.path_on_host, Expect::ReadFile)?;
        let done = handle.replace_merged(file);
        return done.map(drop).map_err(failed("merged_layers"));
    }
    if let Some(next) = &patch.next_layer {
        let file = open("next_layer", next, Expect::WriteDisk)?;
        let done = handle.next(file).and_then(|next| handle.freeze(next));
        return done.map_err(failed("next_layer"));
    }
    let (Some(base), [_, ..]) = (&patch.path_on_host, patch.layers.as_slice()) else {
        return Err(Fault::new(format!(
            "drive {id:?}: a layered drive keeps its size and its image; layers, next_layer or merged_layers can be set"
        )));
    };
    let base = open("path_on_host", base, Expect::ReadDisk)?;
    let top = patch.layers.len().checked_sub(1).filter(|_| !read_only);
    let layers = patch.layers.iter().enumerate().map(|(index, layer)| {
        let expect = match Some(index) == top {
            true => Expect::WriteDisk,
            false => Expect::ReadDisk,
        };
        open("layers", layer, expect)
    });
    let layers = layers.collect::<Result<_, _>>()?;
    let done = handle.replace(base, layers, read_only);
    done.map_err(failed("layers"))
}

/// Copies what devices count into the metrics; before every line that is written.
pub(super) fn update_metrics(guest: &Guest, registry: &Registry) {
    use std::sync::atomic::Ordering::Relaxed;
    let set = |group: &str, name: &str, value: u64| registry.gauge(group, name).set(value);
    let exits = &guest.bus.exits;
    set("vcpu", "exit_mmio_read", exits.mmio_read.load(Relaxed));
    set("vcpu", "exit_mmio_write", exits.mmio_write.load(Relaxed));
    set("vcpu", "exit_io_in", exits.port_in.load(Relaxed));
    set("vcpu", "exit_io_out", exits.port_out.load(Relaxed));
    set("vcpu", "exit_interrupted", exits.interrupted.load(Relaxed));
    for (id, drive) in &guest.drives {
        let group = format!("block_{id}");
        let stats = &drive.stats;
        set(&group, "read_count", stats.reads.load(Relaxed));
        set(&group, "write_count", stats.writes.load(Relaxed));
        set(&group, "flush_count", stats.flushes.load(Relaxed));
        set(&group, "discard_count", stats.discards.load(Relaxed));
        set(&group, "read_bytes", stats.read_bytes.load(Relaxed));
        set(&group, "write_bytes", stats.write_bytes.load(Relaxed));
        set(&group, "failed_count", stats.failed.load(Relaxed));
    }
}
