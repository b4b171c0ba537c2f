//! The configuration of one microVM: plain types that are valid once they exist.
//!
//! Every document comes in as JSON (one API call each, or all of them in a `--config-file`)
//! and is checked while it is parsed: a misspelt field, a value out of range or a field that
//! we do not offer is an error that names the field, never something ignored. Names and
//! meanings are Firecracker v1.x's; what is ours alone says so. `docs/api.md` is the reference.
//!
//! Nothing here touches a file: whether a drive exists is found out when it is opened
//! (see [`Descriptors::open`]).

mod balloon;
mod boot;
mod descriptors;
mod drive;
mod machine;
mod output;
mod snapshot;
mod source;
mod vm;
mod vsock;

#[cfg(test)]
mod tests;

pub use balloon::{
    Balloon, BalloonStats, BalloonStatsUpdate, BalloonUpdate, GuestStats, HintingStart,
    HintingStatus,
};
pub use boot::{BootProtocol, BootSource, DEFAULT_BOOT_ARGS, Discovery, MAX_BOOT_ARGS};
pub use descriptors::{Descriptors, Expect, OpenError};
pub use drive::{
    CacheType, Drive, DrivePatch, Format, IoEngine, MAX_LAYERS, MAX_SERIAL, MergedLayers,
};
pub use machine::{
    CpuBaseline, HugePages, MAX_MEM_MIB, MAX_VCPUS, MIN_MEM_MIB, MachineConfig, MachinePatch,
};
pub use output::{Console, Logger, Metrics, Serial};
pub use snapshot::{
    DriveOverride, MemoryBackend, SnapshotCreate, SnapshotLoad, SnapshotLookAhead, SnapshotReset,
    SnapshotType, WorkingSetRecord,
};
pub use source::Source;
pub(crate) use source::check_fd_name;
pub(crate) use vm::is_instance_id;
pub use vm::{Entropy, Prepare, PreparedMemory, VmConfig, Workplace};
pub use vsock::Vsock;

use serde::de::{DeserializeOwned, IgnoredAny};

/// A document or one field of it is wrong: `vcpu_count: 33 is not in 1..=32`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    /// `field` as it is spelt in JSON.
    pub(crate) fn new(field: &str, what: impl std::fmt::Display) -> Self {
        Self(format!("{field}: {what}"))
    }
}

/// Parses one JSON document. The error names the field, with its path inside the document.
pub fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, ConfigError> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner();
        if path == "." {
            ConfigError(inner.to_string())
        } else {
            ConfigError(format!("{path}: {inner}"))
        }
    })?;
    reader
        .end()
        .map_err(|e| ConfigError(format!("text after the JSON document: {e}")))?;
    Ok(value)
}

/// A field of Firecracker's that is not offered: JSON `null` counts as absent, as its clients send it.
fn refuse(field: &str, value: Option<&IgnoredAny>, why: &str) -> Result<(), ConfigError> {
    match value {
        Some(_) => Err(ConfigError::new(field, format_args!("not offered: {why}"))),
        None => Ok(()),
    }
}

/// Why a rate limiter is refused, for every device that has one in Firecracker.
const NO_RATE_LIMITER: &str = "this version has no rate limiters; leave the field out";

/// Names of drives: letters, digits and `_`, as Firecracker has it, at most 64.
fn check_id(field: &str, id: &str) -> Result<(), ConfigError> {
    if id.is_empty() || id.len() > 64 {
        return Err(ConfigError::new(field, "must have 1 to 64 characters"));
    }
    if !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(ConfigError::new(
            field,
            "only ASCII letters, digits and '_' are allowed",
        ));
    }
    Ok(())
}
