//! Why a sandbox could not be brought up.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::assets::AssetError;
use crate::diagnosis::{Progress, progress};
use crate::disk::{CopyError, MakeError};
use crate::drive::DriveError;
use crate::ending::{Ended, Meaning};
use crate::layered::LayersError;
use crate::state::{ClaimError, StateError};
use crate::vmm::ApiError;

/// Where a boot ended early, and what there is to see.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Asset(#[from] AssetError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Disk(#[from] CopyError),
    #[error(transparent)]
    MakeDisk(#[from] MakeError),
    #[error(transparent)]
    Layers(#[from] LayersError),
    #[error(transparent)]
    Name(#[from] ClaimError),
    #[error(transparent)]
    Drive(#[from] DriveError),
    #[error("{0}")]
    Invalid(String),
    #[error("there is no VMM at {}", .0.display())]
    NoVmm(PathBuf),
    #[error("the supervisor cannot be used ({doing}): {source}")]
    Supervisor {
        doing: &'static str,
        source: io::Error,
    },
    #[error("{0}")]
    NotStarted(String),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("{}", ended_early(stage, ended))]
    Ended {
        /// What was waited for.
        stage: &'static str,
        ended: Box<Ended>,
    },
    #[error("{progress} within {} s", limit.as_secs_f32())]
    NotReady {
        progress: Progress,
        limit: Duration,
        console: Vec<String>,
    },
    #[error("the guest came up, but not as asked: {0}")]
    Degraded(String),
    #[error("the guest's agent did not take over: {0}")]
    NotAdopted(String),
    #[error("interrupted while the guest was booting")]
    Cancelled,
}

fn ended_early(stage: &str, ended: &Ended) -> String {
    let mut text = match (ended.meaning, progress(&ended.console)) {
        (Meaning::Panicked | Meaning::Rebooted, panicked @ Progress::KernelPanicked(_)) => {
            panicked.to_string()
        }
        (meaning, _) => meaning.to_string(),
    };
    let _ = write!(text, " {stage}");
    // The VMM says in one line why it gave up.
    let failed = matches!(ended.meaning, Meaning::Failed | Meaning::BadCommandLine);
    if let Some(line) = ended.log.last().filter(|_| failed) {
        let _ = write!(text, ": {line}");
    }
    text
}

impl BootError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            Self::Asset(error) => return Some(error.remedy()),
            Self::State(_) => "'belljar doctor' checks the state directory",
            Self::MakeDisk(error) => return Some(error.remedy()),
            Self::Name(ClaimError::Taken { .. }) => {
                "choose another name, or remove that sandbox with 'belljar rm'"
            }
            Self::Disk(_) | Self::Layers(_) => {
                "check the space below the state directory (BELLJAR_STATE)"
            }
            Self::NotAdopted(_) => {
                "the snapshot may be of a guest that hung; restore an older one, or boot a new guest"
            }
            Self::Name(_) | Self::Drive(_) | Self::Invalid(_) | Self::Cancelled => return None,
            Self::NoVmm(_) => "run 'make build', or name it with --vmm",
            Self::Supervisor { .. } | Self::NotStarted(_) => "'belljar doctor' checks this machine",
            Self::Api(ApiError::Refused { path, .. }) => refused_remedy(path),
            Self::Api(_) => "its log is quoted here if it said anything",
            Self::Ended { ended, .. } => ended_remedy(ended),
            Self::NotReady { progress, .. } => progress.remedy(),
            Self::Degraded(_) => {
                "check --image (an EROFS image) and --disk; --image none runs in the initramfs"
            }
        };
        Some(text.to_owned())
    }

    /// The last lines of the guest's console.
    #[must_use]
    pub fn console(&self) -> &[String] {
        match self {
            Self::Ended { ended, .. } => &ended.console,
            Self::NotReady { console, .. } => console,
            _ => &[],
        }
    }

    /// The last lines of the VMM's log.
    #[must_use]
    pub fn log(&self) -> &[String] {
        match self {
            Self::Ended { ended, .. } => &ended.log,
            _ => &[],
        }
    }
}

fn refused_remedy(path: &str) -> &'static str {
    match path {
        "/boot-source" => "name an x86-64 vmlinux or bzImage with --kernel, or run 'make kernel'",
        "/machine-config" => "--cpus takes 1 to 32, --memory 32M to 512G",
        "/snapshot/load" => {
            "'belljar inspect SNAPSHOT' tells what it needs; this machine's processor or VMM may be another"
        }
        "/actions" => "'belljar doctor' checks kernel, memory and /dev/kvm",
        _ if path.starts_with("/drives/") => {
            "check the files given with --image, --disk and --drive"
        }
        _ => "the VMM may be of another version; 'belljar doctor' tells",
    }
}

fn ended_remedy(ended: &Ended) -> &'static str {
    match ended.meaning {
        Meaning::Panicked => match progress(&ended.console) {
            Progress::KernelPanicked(reason) => Progress::KernelPanicked(reason).remedy(),
            _ => "try more memory (--memory), or another kernel",
        },
        Meaning::Signalled(9) => "if nobody killed it, the host ran out of memory",
        Meaning::Signalled(31) => "a system call was refused; please report this with its log",
        Meaning::Signalled(_) => "this is an error in the VMM; please report it with its log",
        Meaning::TripleFault | Meaning::KvmFailed => {
            "the kernel does not run on this (virtual) processor; 'belljar doctor' checks it"
        }
        Meaning::Rebooted | Meaning::PoweredOff => {
            "the initramfs must hold the agent as /init; 'make image' builds it"
        }
        _ => "'belljar doctor' checks this machine",
    }
}
