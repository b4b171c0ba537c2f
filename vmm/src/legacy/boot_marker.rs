//! The boot marker: one byte that a guest's init writes when it runs, so that the boot can be
//! timed without any driver. The place, size and value are those of Firecracker's boot timer.
use super::{MachineEvent, MachineEvents};
use crate::bus::BusDevice;

/// The value an init writes to offset 0.
const MARKER: u8 = 123;

/// A page (or port) that reads as zero and reports the first marker written to it.
pub struct BootMarker {
    events: MachineEvents,
    seen: bool,
}

impl BootMarker {
    pub fn new(events: MachineEvents) -> Self {
        Self {
            events,
            seen: false,
        }
    }
}

impl BusDevice for BootMarker {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Once only: a guest that repeats it must not flood the log.
        if offset == 0 && data.first() == Some(&MARKER) && !self.seen {
            self.seen = true;
            (self.events)(MachineEvent::BootMarker);
        }
    }
}
