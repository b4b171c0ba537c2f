//! A sandbox goes back to a snapshot: name, id and directory stay, guest and disk are the snapshot's.
//!
//! A guest that was loaded from this very snapshot goes back where it is: its VMM drops the pages that it has
//! changed. Any other one is stopped, and the snapshot is loaded by a new VMM.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use belljar_keeper::client::Keeper;
use serde_json::json;

use super::restore::{Host, NewClone, Source, bring_up};
use super::{Loaded, Origin, SnapshotError};
use crate::layered::Layered;
use crate::lifecycle::{self, LifeError, Stop};
use crate::registry::Found;
use crate::sandbox::{NewDisk, Sandbox, Shape, adopt};
use crate::stages::Stages;
use crate::state;
use crate::state::spec::{Life, SandboxSpec};
use crate::vmm;

/// A supervisor writes down an end and leaves within this time.
const LOCK_LIMIT: Duration = Duration::from_secs(15);
/// A VMM has gone back within this time.
const GO_BACK_LIMIT: Duration = Duration::from_secs(20);

/// A sandbox that went back.
#[derive(Debug)]
pub enum Reset {
    /// Where it was; with what the guest could not be told.
    InPlace(Vec<String>),
    /// In a new VMM, and why.
    Anew(Box<Sandbox>, String),
}

/// Resets a sandbox to a snapshot; `None`: the one that it was restored from. What it has done since is lost.
///
/// # Errors
/// It belongs to a running command, there is no such snapshot, or it cannot be restored here: then it is as
/// before. If it fails later, the sandbox stays, stopped.
pub fn reset(
    host: Host<'_>,
    keeper: &Keeper,
    found: &Found,
    snapshot: Option<&str>,
    image: Option<&Path>,
    stages: &mut Stages,
) -> Result<Reset, SnapshotError> {
    let id = found.called();
    let spec = found.spec()?;
    let Some(spec) = spec.filter(|spec| spec.life != Life::Owned) else {
        return Err(SnapshotError::Owned(id));
    };
    let origin = Origin::of(found)?;
    let Some(snapshot) = snapshot.or(origin.snapshot.as_deref()) else {
        return Err(SnapshotError::NoOrigin(id));
    };
    let loaded = if found.state().is_up() {
        Loaded::of(found)?
    } else {
        None
    };
    // All that can be refused is, before anything is lost.
    let open = |disk_only: &dyn Fn(&str) -> bool| {
        let image = image.map(Path::to_path_buf);
        Source::open_for(keeper, snapshot, host.assets, image, None, disk_only)
    };
    let source = open(&|id| loaded.as_deref() == Some(id))?;
    stages.mark("template");
    let why = if source.snapshot == loaded {
        match in_place(found, &source, &spec, host, stages)? {
            Ok(warnings) => return Ok(Reset::InPlace(warnings)),
            Err(why) => why,
        }
    } else if !found.state().is_up() {
        "it was not running".to_owned()
    } else if loaded.is_some() {
        "it was running from another snapshot".to_owned()
    } else {
        "it was not loaded from a snapshot".to_owned()
    };
    let source = if source.machine.is_none() {
        open(&|_| false)?
    } else {
        source
    };
    let sandbox = anew(found, &source, &spec, host, stages)?;
    Ok(Reset::Anew(Box::new(sandbox), why))
}

/// In the VMM that runs it. The inner error says why that could not be; then the guest is lost, or as before.
fn in_place(
    found: &Found,
    source: &Source,
    spec: &SandboxSpec,
    host: Host<'_>,
    stages: &mut Stages,
) -> Result<Result<Vec<String>, String>, SnapshotError> {
    let dir = found.dir();
    let durably = spec.life == Life::Persistent;
    // The VMM that runs has one or the other.
    let shape = match Layered::of(dir)? {
        Some(_) => Shape::Layers,
        None => Shape::Raw,
    };
    let disk = source.prepare(dir, durably, shape)?;
    stages.mark("disk prepared");
    let discard = || disk.discard(dir);
    // Whoever is saving it needs it as it is.
    let Some(_turn) = dir.capture_turn(LOCK_LIMIT).inspect_err(|_| discard())? else {
        discard();
        return Err(SnapshotError::Busy(found.called()));
    };
    // It may have ended, or have been started anew, while others had their turn.
    if !found.state().is_up() || Loaded::of(found)? != source.snapshot {
        discard();
        return Ok(Err("it was stopped meanwhile".to_owned()));
    }
    let gone_back = go_back(found, source, &disk, durably);
    stages.mark("gone back");
    let told = gone_back.and_then(|()| {
        let told = adopt(dir, spec, Instant::now() + host.limits.boot, stages);
        told.map_err(|error| error.to_string())
    });
    if told.is_ok() {
        dir.remove_record(state::RESETTING)?;
    }
    Ok(told)
}

/// Takes memory, processors, devices and disk back; the guest runs, with its programs still held.
fn go_back(found: &Found, source: &Source, disk: &NewDisk, durably: bool) -> Result<(), String> {
    let dir = found.dir();
    let said = |error: &dyn std::fmt::Display| error.to_string();
    lifecycle::set_paused(found).map_err(|error| said(&error))?;
    // From here on memory and disk may be of different instants: until both have gone back, it must not run.
    dir.write_record(state::RESETTING, &json!({"version": 1}))
        .map_err(|error| said(&error))?;
    // What it has changed since its last snapshot is no longer known.
    dir.remove_record(state::LAST)
        .map_err(|error| said(&error))?;
    call(found, "PUT", "/snapshot/reset", r#"{"resume_vm":false}"#)?;
    let installed = source.install(dir, disk, durably);
    installed.map_err(|error| said(&error))?;
    let change = match disk {
        NewDisk::None => None,
        NewDisk::Raw => Some(json!({"drive_id": "disk", "path_on_host": state::DISK})),
        NewDisk::Layers(to) => {
            Some(json!({"drive_id": "disk", "path_on_host": to.base, "layers": to.layers}))
        }
    };
    if let Some(change) = change {
        call(found, "PATCH", "/drives/disk", &change.to_string())?;
    }
    lifecycle::set_running_again(found).map_err(|error| said(&error))
}

fn call(found: &Found, method: &'static str, path: &'static str, body: &str) -> Result<(), String> {
    let deadline = Instant::now() + GO_BACK_LIMIT;
    let mut api = found.api().map_err(|error| error.to_string())?;
    vmm::request(&mut api, method, path, body.as_bytes(), deadline)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// In a new VMM.
fn anew(
    found: &Found,
    source: &Source,
    spec: &SandboxSpec,
    host: Host<'_>,
    stages: &mut Stages,
) -> Result<Sandbox, SnapshotError> {
    let clone = NewClone {
        name: spec.name.clone(),
        labels: spec.labels.clone(),
        life: spec.life,
    };
    let mut restored = source.spec(&clone)?;
    restored.created_ms = spec.created_ms;
    let dir = found.dir();
    // The copy, which can fail and takes its time, is made while all is as it was.
    let disk = source.prepare(dir, true, Shape::Layers)?;
    let lock = stopped(found, spec).inspect_err(|_| disk.discard(dir))?;
    stages.mark("stopped");
    dir.forget_last_run()?;
    source.install(dir, &disk, true)?;
    restored.life = Life::Persistent;
    dir.write_record_durably(state::CONFIG, &restored)?;
    stages.mark("prepared");
    let sandbox = bring_up(host, source, (dir, lock), true, stages)?;
    // From now on it goes away with its guest, if it did before.
    restored.life = spec.life;
    dir.write_record(state::CONFIG, &restored)?;
    Ok(sandbox)
}

/// Stops the guest, so that its directory stays, and takes the sandbox's lock. If that cannot be, what is
/// written down about the sandbox is as before.
fn stopped(found: &Found, spec: &SandboxSpec) -> Result<File, SnapshotError> {
    let dir = found.dir();
    // Whoever is saving it needs it as it is.
    let Some(_turn) = dir.capture_turn(LOCK_LIMIT)? else {
        return Err(SnapshotError::Busy(found.called()));
    };
    // While nobody runs it, it must not go away.
    let mut kept = spec.clone();
    kept.life = Life::Persistent;
    dir.write_record_durably(state::CONFIG, &kept)?;
    let locked = || -> Result<File, SnapshotError> {
        if found.state().vmm().is_some() {
            lifecycle::stop(found, Stop::FORCE)?;
        }
        let lock = dir.lock_within(LOCK_LIMIT)?;
        lock.ok_or_else(|| LifeError::Busy(found.called()).into())
    };
    locked().inspect_err(|_| {
        let _ = dir.write_record_durably(state::CONFIG, spec);
    })
}
