//! The store: snapshots as content-addressed zstd chunks in packs, named by manifests.
//!
//! `docs/snapshot-format.md` describes every byte, and in which order they are made durable. In short: what
//! a crash leaves is either the old list of snapshots or the new one; nothing is believed that is read; what a
//! manifest names is never deleted.
//!
//! One process has a store open for writing; it may use it from many threads. Others may open it for reading.
#![forbid(unsafe_code)]

mod budget;
mod codec;
mod cut;
mod envelope;
mod error;
pub mod fs;
mod gc;
mod id;
pub mod manifest;
mod names;
mod pack;
#[doc(hidden)]
pub mod probe;
mod read;
mod renew;
mod source;
mod state;
mod store;
mod transfer;
mod work;
mod write;

#[cfg(test)]
mod tests;

/// The messages of the small files, from `proto/`.
#[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/belljar.store.v1.rs"));
}

pub use budget::{Eviction, SnapshotUsage, Usage};
pub use error::{Error, Result};
pub use gc::{Collected, Verified};
pub use id::{ChunkId, NotAnId, PackId, SnapshotId, StoreId};
pub use manifest::{Extent, Image, Kind, Manifest, Requirements};
pub use read::{Reader, Sink};
pub use source::{FileSource, Source};
pub use state::{Problem, Snapshot};
pub use store::{Settings, Store};
pub use transfer::Imported;
pub use write::{Options, Stored, Writer};

/// Bytes of a page: what extents count in.
pub const PAGE: u64 = 4096;
/// Most bytes of a chunk.
pub const MAX_CHUNK: usize = 1 << 20;
