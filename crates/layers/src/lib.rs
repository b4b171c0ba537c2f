//! Disk layers: a writable disk as copy-on-write over a raw base image.
//!
//! A disk is a base image, frozen layers over it, and one layer that is written. Each layer is a sparse
//! file in which every cluster has its fixed place, and a bitmap that tells which clusters it has; so a
//! run of the disk is a run of a file, and no file can name a place outside itself, twice, or in a circle.
//! A cluster that a layer has and that is a hole there is zero. `docs/disk-layers.md` describes every byte.
//!
//! | module | what it does |
//! | --- | --- |
//! | `format` | headers and pages of the map, bytes to values and back; pure |
//! | `bitmap`, `owners` | which clusters a layer has; which layer has a cluster. Pure |
//! | `medium` | what is asked of a file |
//! | `layer` | one file: make, open, flush, freeze |
//! | `stack` | what a virtual machine writes to |
//! | `view` | what a disk holds, for those who store or merge it |
//! | `build` | a frozen layer from extents, or from several layers |
//!
//! Nothing here knows of guests; the VMM moves the bytes itself, by the runs that [`Stack`] gives.
#![forbid(unsafe_code)]

mod bitmap;
mod build;
mod error;
mod format;
mod layer;
mod medium;
mod owners;
#[doc(hidden)]
pub mod probe;
mod stack;
mod view;

#[cfg(test)]
mod tests;

pub use build::{Builder, merge};
pub use error::{Error, Result};
pub use format::State;
pub use format::{Damage, LayerId, MAX_SIZE};
pub use layer::{Head, Layer, create, head};
pub use medium::Medium;
pub use stack::{Flush, Next, Run, Stack};
pub use view::{Content, Extent, Extents, View};

/// Bytes of a cluster, the unit of copying.
pub const CLUSTER: u64 = 4096;

/// Most layers of a disk, the one that is written included.
pub const MAX_LAYERS: usize = 8;
