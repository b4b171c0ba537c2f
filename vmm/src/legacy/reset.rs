//! Reset through the keyboard controller (command 0xFE to port 0x64), the way of guests
//! without ACPI.
use vm_superio::{I8042Device, Trigger};

use super::{MachineEvent, MachineEvents};
use crate::bus::BusDevice;

/// The ports 0x60 to 0x64 of an i8042 that knows the reset command only.
pub struct ResetController(I8042Device<ResetLine>);

struct ResetLine(MachineEvents);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        (self.0)(MachineEvent::Reset);
        Ok(())
    }
}

impl ResetController {
    pub fn new(events: MachineEvents) -> Self {
        Self(I8042Device::new(ResetLine(events)))
    }
}

impl BusDevice for ResetController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            let Ok(()) = self.0.write(offset, *byte);
        }
    }
}
