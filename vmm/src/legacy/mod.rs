//! The few devices outside virtio: a 16550 for early debugging, and the small registers
//! through which a guest tells that it is up, off, resetting or has panicked.
mod boot_marker;
mod pvpanic;
mod reset;
mod serial;
pub mod sleep;

use std::sync::Arc;

pub use boot_marker::BootMarker;
pub use pvpanic::PvPanic;
pub use reset::ResetController;
pub use serial::{Serial, SerialInput, SerialRegisters};
pub use sleep::SleepRegisters;

/// What a guest told the machine through one of these devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest entered S5.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest kernel panicked (pvpanic event bit 0).
    Panicked,
    /// The guest kernel panicked and runs its crash kernel (pvpanic event bit 1).
    CrashLoaded,
    /// The guest wrote the boot marker: its init runs.
    BootMarker,
}

/// Takes events from devices, on whichever vCPU thread the guest caused them. It must return
/// quickly: set a flag, wake the machine.
pub type MachineEvents = Arc<dyn Fn(MachineEvent) + Send + Sync>;

#[cfg(test)]
mod tests;
