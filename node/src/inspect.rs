//! All that the host knows about a sandbox, in one document.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::accounting::{self, CpuTimes};
use crate::layered::Layered;
use crate::registry::{Found, State};
use crate::state::spec::SandboxSpec;
use crate::state::{self, Owner};

/// See the module. What is not there, or not known, is `None`.
#[derive(Debug, Serialize)]
pub struct Inspected {
    pub id: String,
    pub state: State,
    pub reason: String,
    pub remedy: Option<String>,
    pub config: Option<SandboxSpec>,
    pub dir: PathBuf,
    pub owner: Option<Owner>,
    /// The records as they stand in the sandbox's directory.
    pub origin: Option<Value>,
    pub boot: Option<Value>,
    pub ended: Option<Value>,
    pub sockets: Sockets,
    pub logs: Logs,
    /// The host's own count: nothing in the guest can falsify it.
    pub cpu_time: Option<CpuTimes>,
    /// Bytes of the VMM, guest RAM included.
    pub resident: Option<u64>,
    /// Bytes of the host's disk that the writable disk takes; what it shares with others is not counted.
    pub disk_used: Option<u64>,
}

/// The Unix sockets of a sandbox.
#[derive(Debug, Serialize)]
pub struct Sockets {
    pub api: Option<PathBuf>,
    pub vsock: Option<PathBuf>,
    pub console: Option<PathBuf>,
    pub control: Option<PathBuf>,
}

/// The newest files of its logs.
#[derive(Debug, Serialize)]
pub struct Logs {
    pub console: Option<PathBuf>,
    pub vmm: Option<PathBuf>,
}

/// Looks at everything; asks the VMM only whether the guest is paused, and the guest nothing.
#[must_use]
pub fn inspect(found: &Found) -> Inspected {
    let listed = found.look();
    let vmm = listed.state.vmm();
    let existing = |name: &str| {
        let path = found.dir().file(name);
        path.exists().then_some(path)
    };
    let record = |name| found.dir().read_record::<Value>(name).unwrap_or_default();
    Inspected {
        id: found.id().to_owned(),
        reason: listed.state.reason(),
        remedy: listed.state.remedy(found.id()),
        state: listed.state,
        config: listed.spec,
        dir: found.dir().path().to_owned(),
        owner: found.owner(),
        origin: record(state::ORIGIN),
        boot: record(state::BOOT),
        ended: record(state::ENDED),
        sockets: Sockets {
            api: existing(state::API_SOCKET),
            vsock: existing(state::VSOCK_SOCKET),
            console: existing(state::CONSOLE_SOCKET),
            control: existing(state::CONTROL_SOCKET),
        },
        logs: Logs {
            console: existing(state::CONSOLE_LOG),
            vmm: existing(state::VMM_LOG),
        },
        cpu_time: vmm.and_then(accounting::cpu_times),
        resident: vmm.and_then(accounting::resident),
        disk_used: disk_used(found),
    }
}

/// See [`Inspected::disk_used`].
pub(crate) fn disk_used(found: &Found) -> Option<u64> {
    if let Ok(Some(layered)) = Layered::of(found.dir()) {
        return Some(layered.used(found.dir()));
    }
    let metadata = std::fs::metadata(found.dir().file(state::DISK)).ok()?;
    Some(metadata.blocks().saturating_mul(512))
}
