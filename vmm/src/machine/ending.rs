//! How a VMM ends, and the exit status that tells it (`docs/api.md`).
use std::fmt;

use crate::kvm::Fault;
use crate::legacy::MachineEvent;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    PoweredOff,
    Rebooted,
    Panicked,
    TripleFault,
    /// KVM could not go on; the text says why.
    Internal(String),
    /// Pages of the guest's RAM cannot be had any more; the text says why.
    NoPages(String),
    /// `Stop` through the API, or a signal that asks to end.
    Stopped,
    /// We failed; the text says at what.
    Failed(String),
}

impl Ending {
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::PoweredOff => 0,
            Self::Failed(_) => 1,
            Self::Rebooted => 16,
            Self::Panicked => 17,
            Self::TripleFault => 18,
            Self::Internal(_) => 19,
            Self::Stopped => 20,
            Self::NoPages(_) => 21,
        }
    }

    /// What a guest's message means for the machine; `None` if it goes on.
    pub fn of_event(event: MachineEvent) -> Option<Self> {
        match event {
            MachineEvent::PowerOff => Some(Self::PoweredOff),
            MachineEvent::Reset => Some(Self::Rebooted),
            MachineEvent::Panicked => Some(Self::Panicked),
            // A crash kernel runs now; it ends the machine itself.
            MachineEvent::CrashLoaded | MachineEvent::BootMarker => None,
        }
    }

    pub fn of_fault(fault: Fault) -> Self {
        match fault {
            Fault::TripleFault => Self::TripleFault,
            Fault::NoPage(address) => Self::NoPages(format!(
                "the guest's page at {:#x} cannot be had: it was not given",
                address & !0xfff
            )),
            Fault::Internal(what) => Self::Internal(what),
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Rebooted => write!(f, "the guest rebooted"),
            Self::Panicked => write!(f, "the guest kernel panicked"),
            Self::TripleFault => write!(f, "triple fault: the guest reset its processor"),
            Self::Internal(what) => write!(f, "KVM could not go on: {what}"),
            Self::Stopped => write!(f, "stopped on request"),
            Self::NoPages(what) | Self::Failed(what) => write!(f, "{what}"),
        }
    }
}
