//! What can go wrong, each with what was attempted and with what.

use std::io;

use crate::id::{ChunkId, SnapshotId};

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("{path} is damaged: {what}")]
    Damaged { path: String, what: String },
    #[error("{path} has format version {found}; this program reads up to {known}: use a newer one")]
    Version {
        path: String,
        found: u32,
        known: u32,
    },
    #[error("the store is in use by another process; only one may open it for writing")]
    Locked,
    #[error("the store was opened for reading only")]
    ReadOnly,
    #[error("there is a store already")]
    Exists,
    #[error("there is no store here")]
    NoStore,
    #[error("no snapshot is called {0}")]
    NoSnapshot(String),
    #[error("{0} is the beginning of several snapshots' ids; give more of it")]
    Ambiguous(String),
    #[error("snapshot {id} is kept: {why}")]
    Kept { id: SnapshotId, why: String },
    #[error("{what} {name:?}: {rule}")]
    Name {
        what: &'static str,
        name: String,
        rule: &'static str,
    },
    #[error("snapshot {snapshot} has no image called {name}")]
    NoImage { snapshot: SnapshotId, name: String },
    #[error("bytes {offset}+{length} are outside image {name} of {size} bytes")]
    OutOfRange {
        name: String,
        offset: u64,
        length: u64,
        size: u64,
    },
    #[error(
        "chunk {0} is missing from the store; `belljar store verify` tells which snapshots need it"
    )]
    ChunkMissing(ChunkId),
    #[error("chunk {id} in {path} is damaged: {what}")]
    ChunkDamaged {
        id: ChunkId,
        path: String,
        what: &'static str,
    },
    #[error(
        "the store's budget of {budget} bytes does not suffice: {used} are in use, {wanted} more are needed; \
         evict snapshots, run gc, or raise the budget"
    )]
    OverBudget { budget: u64, used: u64, wanted: u64 },
    #[error("cannot read the image {name} to be stored: {source}")]
    Source { name: String, source: io::Error },
    #[error("cannot write what was restored at {offset}: {source}")]
    Sink { offset: u64, source: io::Error },
    #[error("an earlier write of this snapshot failed; begin it anew")]
    Poisoned,
    #[error("the import stream is not good: {0}")]
    Stream(String),
    #[error(
        "the stream begins at record {first}, but only {have} are here: export again from {have}"
    )]
    StreamGap { first: u64, have: u64 },
    #[error("the compressor failed: {0}")]
    Compress(io::Error),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    pub(crate) fn damaged(path: &str, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    /// Whether it is only that a file is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Shorthand of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
