//! What is written down about a start, for whoever asks later how it went.

use std::time::Duration;

use belljar_protocol::v1;
use serde::{Deserialize, Serialize};

use crate::stages::Stages;
use crate::state::{self, SandboxDir, StateError};

/// How the last start went (`boot.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRecord {
    pub version: u32,
    pub stages: Vec<StageRecord>,
    /// What the guest says about itself: not to be trusted.
    pub kernel: String,
    pub agent_generation: u32,
    pub guest_boot_id: String,
}

impl BootRecord {
    /// Of a guest that is ready.
    pub(super) fn new(ready: &v1::Ready, stages: &Stages) -> Self {
        Self {
            version: 1,
            stages: stages
                .rows()
                .map(|(stage, took, at)| StageRecord {
                    stage: stage.to_owned(),
                    took_us: micros(took),
                    at_us: micros(at),
                })
                .collect(),
            kernel: ready.kernel_release.clone(),
            agent_generation: ready.generation,
            guest_boot_id: ready.boot_id.clone(),
        }
    }

    pub(super) fn write(&self, dir: &SandboxDir) -> Result<(), StateError> {
        dir.write_record(state::BOOT, self)
    }
}

/// A stage of a boot, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageRecord {
    pub stage: String,
    pub took_us: u64,
    /// Since the command began.
    pub at_us: u64,
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
