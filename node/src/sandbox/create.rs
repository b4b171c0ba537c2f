//! Making a sandbox without starting it.

use std::fs::File;

use super::BootError;
use super::plan::{self, NewSandbox};
use crate::disk::{empty_of, private_copy};
use crate::size::Size;
use crate::state::spec::Life;
use crate::state::{self, SandboxDir, StateRoot};

/// Makes the directory of a sandbox with its disk and its configuration, and keeps it locked. The
/// configuration is written last, so that a sandbox without one is known as half made.
///
/// # Errors
/// What is asked for cannot be; nothing is left behind then.
pub fn create(root: &StateRoot, new: &NewSandbox) -> Result<(SandboxDir, File), BootError> {
    let spec = plan::specify(new)?;
    let empty = spec
        .disk
        .map(|bytes| empty_of(Size(bytes), &new.guest.assets))
        .transpose()?;
    let (dir, lock) = root.create()?;
    let fill = || -> Result<(), BootError> {
        if let Some(name) = &new.name {
            root.claim_name(name, &dir)?;
        }
        if let Some(empty) = &empty {
            private_copy(empty, &dir.file(state::DISK))?;
        }
        if new.life == Life::Persistent {
            dir.write_record_durably(state::CONFIG, &spec)?;
        } else {
            dir.write_record(state::CONFIG, &spec)?;
        }
        Ok(())
    };
    match fill() {
        Ok(()) => Ok((dir, lock)),
        Err(error) => {
            if let Some(name) = &new.name {
                root.release_name(name, dir.id());
            }
            let _ = dir.remove();
            Err(error)
        }
    }
}
