//! From the store's types and errors to those of the protocol.

use belljar_store as store;

use crate::v1::{self, error::Code};

/// A refusal.
pub(super) fn refusal(code: Code, message: impl Into<String>) -> v1::Error {
    v1::Error {
        code: code.into(),
        message: message.into(),
    }
}

impl From<store::Error> for v1::Error {
    fn from(error: store::Error) -> Self {
        let code = match &error {
            store::Error::NoSnapshot(_) => Code::NoSnapshot,
            store::Error::Ambiguous(_) => Code::Ambiguous,
            store::Error::Kept { .. } => Code::Kept,
            store::Error::Name { .. } => Code::Invalid,
            store::Error::OverBudget { .. } => Code::NoSpace,
            store::Error::Damaged { .. }
            | store::Error::ChunkMissing(_)
            | store::Error::ChunkDamaged { .. }
            | store::Error::NoImage { .. }
            | store::Error::Version { .. } => Code::Damaged,
            store::Error::Io { source, .. }
            | store::Error::Sink { source, .. }
            | store::Error::Source { source, .. } => code_of(source),
            _ => Code::Failed,
        };
        refusal(code, error.to_string())
    }
}

fn code_of(error: &std::io::Error) -> Code {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::NoSpace,
        _ => Code::Failed,
    }
}

/// A failed system call; `what` was attempted.
pub(super) fn io_error(what: &str) -> impl FnOnce(std::io::Error) -> v1::Error + use<'_> {
    move |error| refusal(code_of(&error), format!("cannot {what}: {error}"))
}

/// A snapshot in the list.
pub(super) fn snapshot(from: store::Snapshot) -> v1::Snapshot {
    v1::Snapshot {
        id: from.id.to_string(),
        created_ms: from.created_ms,
        parents: from.parents.iter().map(ToString::to_string).collect(),
        tags: from.tags,
        labels: from.labels,
        pinned: from.pinned,
        bytes: from.bytes,
        data_bytes: from.data_bytes,
        ..v1::Snapshot::default()
    }
}
