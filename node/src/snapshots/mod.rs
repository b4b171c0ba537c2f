//! Snapshots: capture, restore, fork, and what is stored. The keeper does the storing; here a sandbox is held
//! still, its VMM told to write itself down, and clones are told who they are.

mod capture;
mod error;
mod fork;
mod reset;
mod restore;
mod saved;
mod store;
mod used;

use std::path::PathBuf;

use belljar_keeper::client;

pub use belljar_keeper::client::{Keeper, KeeperError};
pub use belljar_keeper::v1 as keeper;
pub use capture::{Capture, Captured, capture};
pub use error::SnapshotError;
pub use fork::{Fork, Forked, fork};
pub use reset::{Reset, reset};
pub use restore::{Disk, Host, NewClone, Source, check, restore};
pub(crate) use saved::Loaded;
pub use saved::{Origin, Saved};
pub use store::{Stores, live};
pub(crate) use used::Bases;

use crate::state::StateRoot;

/// The keeper of a state root; `program` is `belljar-keeper`.
#[must_use]
pub fn keeper_of(root: &StateRoot, program: PathBuf) -> Keeper {
    let dir = root.keeper_dir();
    client::beside(dir.parent().unwrap_or(&dir), program)
}
