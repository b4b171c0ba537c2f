//! What the machine shows to the API thread, so that GETs never need the machine.
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::config::VmConfig;

/// `state` of `GET /`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum InstanceState {
    #[default]
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// Last applied configuration and state. The machine calls [`Published::set_config`] and
/// [`Published::set_state`] after it has carried something out; locks are held for a copy only.
#[derive(Debug)]
pub struct Published {
    id: Mutex<String>,
    inner: Mutex<(InstanceState, VmConfig)>,
}

impl Published {
    /// `id` is `--id`.
    pub fn new(id: String) -> Self {
        Self {
            id: Mutex::new(id),
            inner: Mutex::new((InstanceState::NotStarted, VmConfig::default())),
        }
    }

    pub fn id(&self) -> String {
        let id = self.id.lock().unwrap_or_else(PoisonError::into_inner);
        id.clone()
    }

    /// From `/workplace`.
    pub fn set_id(&self, id: &str) {
        let mut now = self.id.lock().unwrap_or_else(PoisonError::into_inner);
        id.clone_into(&mut now);
    }

    pub fn set_state(&self, state: InstanceState) {
        self.lock().0 = state;
    }

    pub fn set_config(&self, config: &VmConfig) {
        self.lock().1.clone_from(config);
    }

    pub fn state(&self) -> InstanceState {
        self.lock().0
    }

    pub fn config(&self) -> VmConfig {
        self.lock().1.clone()
    }

    fn lock(&self) -> MutexGuard<'_, (InstanceState, VmConfig)> {
        // Every write is one assignment: a panic elsewhere leaves nothing half done.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
