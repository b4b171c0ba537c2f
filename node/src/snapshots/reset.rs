//! A sandbox goes back to a snapshot: name, id and directory stay, guest and disk are the snapshot's.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use belljar_keeper::client::Keeper;

use super::restore::{Host, NewClone, Source, bring_up};
use super::{Origin, SnapshotError};
use crate::lifecycle::{self, LifeError, Stop};
use crate::registry::Found;
use crate::sandbox::Sandbox;
use crate::stages::Stages;
use crate::state;
use crate::state::spec::{Life, SandboxSpec};

/// A supervisor writes down an end and leaves within this time.
const LOCK_LIMIT: Duration = Duration::from_secs(15);

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
    image: Option<PathBuf>,
    stages: &mut Stages,
) -> Result<Sandbox, SnapshotError> {
    let id = found.called();
    let spec = found.spec()?;
    let Some(spec) = spec.filter(|spec| spec.life != Life::Owned) else {
        return Err(SnapshotError::Owned(id));
    };
    let origin = Origin::of(found)?;
    let Some(snapshot) = snapshot.or(origin.snapshot.as_deref()) else {
        return Err(SnapshotError::NoOrigin(id));
    };
    // All that can be refused is, before anything is lost.
    let source = Source::open(keeper, snapshot, host.assets, image)?;
    stages.mark("template");
    let clone = NewClone {
        name: spec.name.clone(),
        labels: spec.labels.clone(),
        life: spec.life,
    };
    let mut restored = source.spec(&clone)?;
    restored.created_ms = spec.created_ms;
    let dir = found.dir();
    // The copy, which can fail and takes its time, is made while all is as it was.
    source.prepare(dir, true)?;
    let lock = match stopped(found, &spec) {
        Ok(lock) => lock,
        Err(error) => {
            let _ = std::fs::remove_file(dir.file(state::NEW_DISK));
            return Err(error);
        }
    };
    stages.mark("stopped");
    dir.forget_last_run()?;
    source.install(dir, true)?;
    restored.life = Life::Persistent;
    dir.write_record_durably(state::CONFIG, &restored)?;
    stages.mark("prepared");
    let sandbox = bring_up(host, &source, (dir, lock), true, stages)?;
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
