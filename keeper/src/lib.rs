//! The keeper of a trust domain: the only opener of its store (`belljar-store`). It keeps captures behind the
//! resumed guest, fills templates for restores, and answers questions about what is stored.
//!
//! One process for each state root, started by whoever needs it first ([`client`]), gone when nobody has
//! needed it for a while ([`server`]). What it holds on disk is in `keeper/` of the state root:
//!
//! | | |
//! | --- | --- |
//! | `lock` | locked (flock) by the keeper that runs |
//! | `keeper.sock` | where it listens |
//! | `keeper.log` | what it had to say; begun anew when it is long, and the one before is `keeper.log.old` |
//! | `store/` | the store, see `docs/snapshot-format.md` |
//! | `templates/ID.memory`, `ID.disk` | complete images of snapshot ID, sparse, read-only, each with a record `.ok`: a cache |
//! | `touched/ID` | which pages the guests of snapshot ID needed first: a hint |
//! | `touched/ID.pages` | these pages, at most 8 MiB, with a record `.ok`: a cache |
//! | `ready/N/` | where a ready VMM and its supervisor wait |
//! | `recordings/ID` | which pages a restored guest of snapshot ID wrote first: a hint |
//! | `digests` | contents of base images by file, size and time: a cache |
#![deny(unsafe_code)]

pub mod client;
pub mod huge;
pub mod server;
mod sys;
pub mod wire;

/// The messages, from `proto/`.
#[allow(clippy::all, clippy::pedantic, unreachable_pub, missing_docs)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/belljar.keeper.v1.rs"));
}

/// When a file was last changed in any way (ctime), in nanoseconds: as [`v1::BaseFile`] tells it. Nobody can set it
/// back but by setting the machine's clock.
#[must_use]
pub fn changed_ns(metadata: &std::fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let changed = i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec());
    u64::try_from(changed).unwrap_or(0)
}

/// Version of the protocol; both sides are installed together.
pub const VERSION: u32 = 2;
/// Its directory in a state root.
pub const DIR: &str = "keeper";
/// Name of its socket.
pub const SOCKET: &str = "keeper.sock";
/// First argument of a supervisor that waits with a VMM, behind the word for supervisors: then come the directory that
/// it waits in, and the VMM's program.
pub const READY_MODE: &str = "--ready";
/// The API's socket of a VMM that waits, in that directory.
pub const READY_SOCKET: &str = "api.sock";
/// How many VMMs are kept ready for the snapshot that was restored last.
pub const READY_VARIABLE: &str = "BELLJAR_READY_VMMS";
/// How long a keeper that nobody needs stays, in milliseconds; for tests.
pub const IDLE_VARIABLE: &str = "BELLJAR_KEEPER_IDLE_MS";
/// Bytes that templates may take on disk.
pub const TEMPLATES_VARIABLE: &str = "BELLJAR_TEMPLATE_BYTES";

/// Bytes of memory that the keeper may hold of templates which are used again and again; 0: none.
pub const HOT_VARIABLE: &str = "BELLJAR_HOT_BYTES";

/// The image of the VMM's state, of guest RAM, of the writable disk, and what the sandbox was.
pub mod images {
    pub const STATE: &str = "state";
    pub const MEMORY: &str = "memory";
    pub const DISK: &str = "disk:disk";
    /// What names the state of that disk: the id of its highest layer, if it had layers.
    pub const DISK_LAYER: &str = "layer:disk";
    pub const SANDBOX: &str = "sandbox";
}
