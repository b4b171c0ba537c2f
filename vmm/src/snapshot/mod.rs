//! The state of a machine as a file: everything but guest RAM and disks.
//!
//! `machine` collects a [`Saved`] while nothing runs and builds a guest from one; [`format`] turns
//! it into bytes and back; [`wire`] are the messages in them. All of it is pure. The bytes may come
//! from anywhere: sizes are bounded before anything is allocated, every structure has its exact
//! size, and what is well-formed is still judged by the parts that take it (KVM, the transports,
//! the configuration's own checks). `docs/vm-state-format.md` describes every field.
mod convert;
pub mod format;
#[doc(hidden)]
pub mod probe;
mod wire;

#[cfg(test)]
mod tests;

use vm_superio::serial::SerialState;

use crate::config::VmConfig;
use crate::kvm::state::{VcpuState, VmState};
use crate::virtio::mmio::TransportState;

pub use format::{FormatError, decode, encode};

/// A machine that stands still: its vCPUs are paused, its devices drained.
#[derive(Clone, Debug)]
pub struct Saved {
    /// As the guest was started, with the changes since.
    pub config: VmConfig,
    /// In the order of their APIC ids.
    pub vcpus: Vec<VcpuState>,
    pub vm: VmState,
    /// In the order in which the guest finds them.
    pub devices: Vec<TransportState>,
    pub serial: SerialState,
}
