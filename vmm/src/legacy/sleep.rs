//! The sleep registers of hardware-reduced ACPI (ACPI 6.5 §4.8.3.7), and the FADT's reset
//! register (§4.8.3.6) behind them.
use super::{MachineEvent, MachineEvents};
use crate::bus::BusDevice;

/// Offsets from the start of the block, for the FADT.
pub const SLEEP_CONTROL: u64 = 0;
pub const SLEEP_STATUS: u64 = 1;
pub const RESET: u64 = 2;
/// Length of the block in bytes.
pub const LEN: u64 = 3;

/// What the FADT's RESET_VALUE must say.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYPx of S5, which the DSDT's `_S5` must name.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// SLEEP_CONTROL, SLEEP_STATUS and the reset register, one byte each.
pub struct SleepRegisters {
    events: MachineEvents,
}

impl SleepRegisters {
    pub fn new(events: MachineEvents) -> Self {
        Self { events }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        match offset {
            SLEEP_CONTROL => {
                let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE {
                    (self.events)(MachineEvent::PowerOff);
                }
            }
            RESET if value == RESET_VALUE => (self.events)(MachineEvent::Reset),
            // SLEEP_STATUS: the guest clears WAK_STS, which is never set, as there is no S1
            // to S4 to wake from.
            _ => {}
        }
    }
}

impl BusDevice for SleepRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (offset, value) in (offset..).zip(data) {
            self.write_byte(offset, *value);
        }
    }
}
