//! Dispatch of port I/O and MMIO exits to devices by address. Filled before the first vCPU
//! runs and immutable afterwards, so that lookups need no lock; each device has its own.
use std::sync::{Arc, Mutex, PoisonError};

/// A device that guest accesses reach by address. `offset` counts from the start of the
/// device's range; `data` has the width of the access (1, 2, 4 or 8 bytes) and lies inside
/// the range. Any access must be survived: a driver in the guest is hostile.
pub trait BusDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// One kind of address space: ports, or MMIO.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start; ranges do not overlap.
    ranges: Vec<Range>,
}

struct Range {
    start: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("bus range {start:#x}+{len:#x} is empty, wraps around, or overlaps another")]
    BadRange { start: u64, len: u64 },
}

impl Bus {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `device` at `[start, start + len)`.
    pub fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let bad = BusError::BadRange { start, len };
        let Some(end) = start.checked_add(len).filter(|_| len > 0) else {
            return Err(bad);
        };
        let overlaps = |r: &Range| start < r.start.saturating_add(r.len) && r.start < end;
        if self.ranges.iter().any(overlaps) {
            return Err(bad);
        }
        let at = self.ranges.partition_point(|r| r.start < start);
        self.ranges.insert(at, Range { start, len, device });
        Ok(())
    }

    /// Reads from whatever is at `address`; nothing there reads as all ones, as on a real bus.
    /// Returns whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to whatever is at `address`. Returns whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let index = self
            .ranges
            .partition_point(|r| r.start <= address)
            .checked_sub(1)?;
        let range = self.ranges.get(index)?;
        let offset = address - range.start;
        let end = offset.checked_add(len as u64)?;
        (end <= range.len).then_some((&*range.device, offset))
    }
}

/// A device whose lock is poisoned has panicked on another thread; the process is going
/// down then, and this thread need not panic too.
fn lock(device: &Mutex<dyn BusDevice>) -> std::sync::MutexGuard<'_, dyn BusDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn device() -> Arc<Mutex<Recorder>> {
        Arc::default()
    }

    #[test]
    fn finds_the_device_and_its_offset() {
        let high = device();
        let mut bus = Bus::new();
        bus.insert(0x2000, 0x1000, high.clone()).unwrap();
        bus.insert(0x1000, 0x10, device()).unwrap();
        assert!(bus.write(0x2ffc, &[1, 2, 3, 4]));
        assert_eq!(high.lock().unwrap().0, [(0xffc, vec![1, 2, 3, 4])]);
        let mut byte = [0];
        assert!(bus.read(0x100f, &mut byte));
        assert_eq!(byte, [0xf]);
    }

    #[test]
    fn accesses_outside_or_across_an_end_reach_nobody() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, device()).unwrap();
        let mut data = [0; 4];
        for address in [0, 0xfff, 0x100d, 0x1010, u64::MAX] {
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn refuses_overlap_empty_and_wrapping_ranges() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, device()).unwrap();
        for (start, len) in [(0x100f, 1), (0xfff, 2), (0x1004, 4), (0, 0), (u64::MAX, 2)] {
            assert!(bus.insert(start, len, device()).is_err(), "{start:#x}");
        }
        bus.insert(0x1010, 1, device()).unwrap();
    }
}
