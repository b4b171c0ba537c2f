//! Why a snapshot could not be taken, restored or found.

use std::io;

use belljar_keeper::client::KeeperError;
use belljar_protocol::client::CallError;

use crate::layered::LayersError;
use crate::lifecycle::LifeError;
use crate::registry::{ConnectError, State};
use crate::sandbox::BootError;
use crate::state::StateError;
use crate::vmm::ApiError;

/// Where it ended early.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Life(#[from] LifeError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Layers(#[from] LayersError),
    #[error("sandbox {id} is {}", state.word())]
    WrongState { id: String, state: State },
    #[error("sandbox {id}: the guest's programs cannot be held still: {source}")]
    Quiesce { id: String, source: CallError },
    #[error("sandbox {id}: {source}")]
    Api { id: String, source: ApiError },
    #[error("cannot {doing}: {source}")]
    Io {
        doing: &'static str,
        source: io::Error,
    },
    #[error("sandbox {0} belongs to a command that runs")]
    Owned(String),
    #[error("sandbox {0} does not come from a snapshot")]
    NoOrigin(String),
    #[error("somebody else is taking a snapshot of sandbox {0}")]
    Busy(String),
    #[error("sandbox {0} has no disk")]
    NoDisk(String),
    #[error("sandbox {0} was resumed, stopped or restarted while the snapshot was taken")]
    Disturbed(String),
    #[error(
        "sandbox {id} has the writable drive '{drive}', which does not belong to it alone: a clone would share it"
    )]
    WritableDrive { id: String, drive: String },
    #[error("sandbox {id}: '{path}' is no longer the file that the guest uses: {why}")]
    Replaced {
        id: String,
        path: String,
        why: String,
    },
    #[error("snapshot {id} cannot be restored: {why}")]
    Unfit {
        id: String,
        why: String,
        remedy: String,
    },
}

impl SnapshotError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            Self::Keeper(error) => return error.remedy().map(str::to_owned),
            Self::Life(error) => return error.remedy(),
            Self::Connect(error) => return Some(error.remedy()),
            Self::Boot(error) => return error.remedy(),
            Self::WrongState { id, state } => {
                return Some(
                    state
                        .remedy(id)
                        .unwrap_or_else(|| format!("'belljar start {id}' starts it")),
                );
            }
            Self::State(_) => "'belljar doctor' checks the state directory",
            Self::Quiesce { source, .. } => match source {
                CallError::TooOld { .. } => "a new sandbox has the present agent",
                _ => "try again; a program that waits for a broken device cannot be stopped",
            },
            Self::Api { id, .. } => return Some(format!("'belljar debug log {id}' tells more")),
            Self::Io { .. } | Self::Layers(_) => {
                "check the space below the state directory (BELLJAR_STATE)"
            }
            Self::Busy(_) | Self::Disturbed(_) => "try again",
            Self::NoDisk(_) => "leave out --disk-only: its memory is all there is",
            Self::Owned(_) => "'belljar restore' makes another one from a snapshot",
            Self::NoOrigin(_) => "name a snapshot; 'belljar snapshots' lists them",
            Self::WritableDrive { .. } => {
                "give it read-only (--drive PATH:ro), or copy what is needed to the sandbox's own disk"
            }
            Self::Replaced { .. } => {
                "put the file back in its place (a copy is another one); a clone would see the wrong content"
            }
            Self::Unfit { remedy, .. } => return Some(remedy.clone()),
        };
        Some(text.to_owned())
    }
}

/// A failed system call.
pub(super) fn io_failed(doing: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { doing, source }
}
