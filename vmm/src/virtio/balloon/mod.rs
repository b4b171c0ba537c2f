//! Memory balloon (virtio 1.2 §5.5): the guest gives pages back that it does not use. It does so
//! when told to (inflate), by itself as they become free (reporting), or in one pass over
//! its free list (hinting).
//!
//! Everything the guest says here is advice: a range that is not RAM is counted and ignored.
mod device;
mod handle;
mod pages;
mod queues;

pub use device::Balloon;
pub use handle::{BalloonCounters, BalloonHandle};

#[cfg(test)]
mod tests;
