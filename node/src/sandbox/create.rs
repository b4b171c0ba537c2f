//! Making a sandbox without starting it.

use std::fs::File;

use super::BootError;
use super::plan::{self, NewSandbox};
use crate::disk::{empty_of, private_copy};
use crate::layered::{Layered, fits};
use crate::size::Size;
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, SandboxDir, StateError, StateRoot};

/// Makes the directory of a sandbox with its disk and its configuration, and keeps it locked.
///
/// # Errors
/// What is asked for cannot be; nothing is left behind then.
pub fn create(root: &StateRoot, new: &NewSandbox) -> Result<(SandboxDir, File), BootError> {
    let spec = plan::specify(new)?;
    let empty = spec
        .disk
        .map(|bytes| empty_of(Size(bytes), &new.guest.assets))
        .transpose()?;
    create_with(root, &spec, |dir| {
        let (Some(empty), Some(bytes)) = (&empty, spec.disk) else {
            return Ok(());
        };
        if !fits(bytes) {
            return Ok(private_copy(empty, &dir.file(state::DISK))?);
        }
        let durably = spec.life == Life::Persistent;
        let image = File::open(empty).map_err(|source| StateError::Io {
            what: "open the empty disk",
            path: empty.clone(),
            source,
        })?;
        let disk = Layered::make(dir, &image, &[], durably)?;
        Ok(disk.install(dir, durably)?)
    })
}

/// Makes the directory of a sandbox, has `fill` put into it what belongs to it, and keeps it locked. The
/// configuration is written last, so that a sandbox without one is known as half made.
///
/// # Errors
/// Something cannot be made; nothing is left behind then.
pub(crate) fn create_with(
    root: &StateRoot,
    spec: &SandboxSpec,
    fill: impl FnOnce(&SandboxDir) -> Result<(), BootError>,
) -> Result<(SandboxDir, File), BootError> {
    let (dir, lock) = root.create()?;
    let make = || -> Result<(), BootError> {
        if let Some(name) = &spec.name {
            root.claim_name(name, &dir)?;
        }
        fill(&dir)?;
        if spec.life == Life::Persistent {
            dir.write_record_durably(state::CONFIG, spec)?;
        } else {
            dir.write_record(state::CONFIG, spec)?;
        }
        Ok(())
    };
    match make() {
        Ok(()) => Ok((dir, lock)),
        Err(error) => {
            if let Some(name) = &spec.name {
                root.release_name(name, dir.id());
            }
            let _ = dir.remove();
            Err(error)
        }
    }
}
