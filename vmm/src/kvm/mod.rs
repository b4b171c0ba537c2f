//! The KVM objects: VM, vCPUs, interrupt lines, event fds. Everything else in the VMM sees
//! only what these modules return: an interrupt line to trigger, event fds to poll, vCPUs to
//! pause and resume.
#![allow(unsafe_code)]

pub mod state;
mod vcpu;
mod vm;

pub use vcpu::{ExitCounters, Fault, GuestBus, Vcpu, VcpuError, VcpuThread};
pub use vm::{IrqFd, IrqLine, Vm, VmError};
