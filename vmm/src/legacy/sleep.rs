//! The sleep registers of hardware-reduced ACPI (ACPI 6.5 §4.8.3.7), and the FADT's reset
//! register (§4.8.3.6) behind them.
use super::{MachineEvent, MachineEvents};
use crate::arch::x86_64::layout;
use crate::arch::x86_64::platform::{RESET_VALUE, SLEEP_TYPE_POWER_OFF};
use crate::bus::BusDevice;

// Offsets from SLEEP_CONTROL, where the block starts.
const CONTROL: u64 = 0;
#[cfg(test)]
pub(super) const STATUS: u64 = layout::SLEEP_STATUS - layout::SLEEP_CONTROL;
pub(super) const RESET: u64 = layout::RESET_REGISTER - layout::SLEEP_CONTROL;
/// Bytes in the block.
pub const SLEEP_REGISTERS_LEN: u64 = 3;

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
            CONTROL => {
                let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_POWER_OFF {
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
