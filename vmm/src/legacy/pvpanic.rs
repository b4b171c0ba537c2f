//! pvpanic: one byte through which a guest kernel reports its panic (QEMU `docs/specs/pvpanic`;
//! Linux `drivers/misc/pvpanic`).
use super::{MachineEvent, MachineEvents};
use crate::bus::BusDevice;

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// Reads give the events we know; a write reports those of its bits.
pub struct PvPanic {
    events: MachineEvents,
}

impl PvPanic {
    pub fn new(events: MachineEvents) -> Self {
        Self { events }
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(byte)) = (offset, data.first_mut()) {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (0, Some(bits)) = (offset, data.first()) else {
            return;
        };
        if bits & CRASH_LOADED != 0 {
            (self.events)(MachineEvent::CrashLoaded);
        }
        if bits & PANICKED != 0 {
            (self.events)(MachineEvent::Panicked);
        }
    }
}
