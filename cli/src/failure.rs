//! What ends a verb early: one readable line, what to do about it, and an exit status.

use belljar_node::files::CopyError;
use belljar_node::guest::GuestError;
use belljar_node::lifecycle::{LifeError, StartError};
use belljar_node::registry::{ConnectError, FindError, Found};
use belljar_node::sandbox::BootError;
use belljar_node::snapshots::{KeeperError, SnapshotError};
use belljar_node::state::StateError;

use crate::OURS;
use crate::output::escaped;
use crate::report;

/// Why a verb did not do what it was asked to.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A boot has more to quote than a line.
    Boot(BootError),
    Other {
        status: u8,
        message: String,
        remedy: Option<String>,
    },
}

impl Failure {
    /// A failure of ours.
    pub(crate) fn new(message: impl std::fmt::Display) -> Self {
        Self::Other {
            status: OURS,
            message: message.to_string(),
            remedy: None,
        }
    }

    /// A failure of ours that something can be done about.
    pub(crate) fn with_remedy(message: impl std::fmt::Display, remedy: impl Into<String>) -> Self {
        Self::Other {
            status: OURS,
            message: message.to_string(),
            remedy: Some(remedy.into()),
        }
    }

    /// Prints it. Returns the exit status.
    pub(crate) fn tell(&self) -> u8 {
        match self {
            Self::Boot(error) => {
                report::boot_failure(error);
                OURS
            }
            Self::Other {
                status,
                message,
                remedy,
            } => {
                report::failure(message, remedy.as_deref());
                *status
            }
        }
    }
}

/// The exit status of a verb; a failure is told.
pub(crate) fn status_of(outcome: Result<u8, Failure>) -> u8 {
    outcome.unwrap_or_else(|failure| failure.tell())
}

/// Does something to each of several sandboxes: a failure with one is told, and does not keep the others
/// waiting. The exit status is that of the last failure.
pub(crate) fn each(
    found: Result<Vec<Found>, Failure>,
    mut act: impl FnMut(&Found) -> Result<(), Failure>,
) -> u8 {
    let found = match found {
        Ok(found) => found,
        Err(failure) => return failure.tell(),
    };
    let failed = found.iter().filter_map(|found| act(found).err());
    failed.fold(0, |_, failure| failure.tell())
}

/// Does something for each of several words: a failure with one is told, and does not keep the others
/// waiting. The exit status is that of the last failure.
pub(crate) fn each_of(words: &[String], mut act: impl FnMut(&String) -> Result<(), Failure>) -> u8 {
    let failed = words.iter().filter_map(|word| act(word).err());
    failed.fold(0, |_, failure| failure.tell())
}

impl From<SnapshotError> for Failure {
    fn from(error: SnapshotError) -> Self {
        let remedy = error.remedy();
        match error {
            SnapshotError::Boot(error) => Self::Boot(error),
            other => Self::Other {
                status: OURS,
                message: escaped(&other.to_string()).into_owned(),
                remedy,
            },
        }
    }
}

impl From<KeeperError> for Failure {
    fn from(error: KeeperError) -> Self {
        SnapshotError::from(error).into()
    }
}

impl From<LifeError> for Failure {
    fn from(error: LifeError) -> Self {
        let remedy = error.remedy();
        Self::Other {
            status: OURS,
            message: error.to_string(),
            remedy,
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Life(error) => error.into(),
            StartError::Boot(error) => error.into(),
        }
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        Self::Boot(error)
    }
}

impl From<FindError> for Failure {
    fn from(error: FindError) -> Self {
        Self::with_remedy(&error, error.remedy())
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        Self::with_remedy(&error, error.remedy())
    }
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        // The guest's own words, and names of its files.
        let message = escaped(&error.to_string()).into_owned();
        match error.remedy() {
            Some(remedy) => Self::with_remedy(message, remedy),
            None => Self::new(message),
        }
    }
}

impl From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Guest(error) => error.into(),
            other => Self::new(escaped(&other.to_string())),
        }
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::with_remedy(&error, "'belljar doctor' checks the state directory")
    }
}

impl From<belljar_node::assets::AssetError> for Failure {
    fn from(error: belljar_node::assets::AssetError) -> Self {
        Self::Boot(error.into())
    }
}
