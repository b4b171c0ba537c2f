//! Giving guest RAM back to the host.
use std::io;
use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::GuestRam;

const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    #[error("guest addresses {start:#x}..{end:#x} are not all RAM")]
    OutsideRam { start: u64, end: u64 },
    #[error("guest pages {start:#x}..{end:#x} could not be given back: {source}")]
    Madvise {
        start: u64,
        end: u64,
        source: io::Error,
    },
}

/// How pages the guest does not need are given back. What backs RAM decides how: anonymous
/// memory is dropped, a private view of a template must be replaced by zeros.
pub trait GuestPages: Send {
    /// Gives back every whole 4 KiB page in `range` of guest-physical addresses; they read as
    /// zero from then on. Returns the number of bytes.
    fn discard(&mut self, ram: &GuestRam, range: Range<u64>) -> Result<u64, DiscardError>;
}

/// Hears of each range of guest-physical addresses that became zero behind the guest's back.
/// Write tracking does not see those (design.md, contract 4).
pub type ZeroedHook = Box<dyn FnMut(Range<u64>) + Send>;

/// RAM of private anonymous memory.
#[derive(Default)]
pub struct AnonymousPages {
    zeroed: Option<ZeroedHook>,
}

impl AnonymousPages {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with_hook(zeroed: ZeroedHook) -> Self {
        Self {
            zeroed: Some(zeroed),
        }
    }
}

impl GuestPages for AnonymousPages {
    fn discard(&mut self, ram: &GuestRam, range: Range<u64>) -> Result<u64, DiscardError> {
        let Range { start, end } = range;
        let outside = DiscardError::OutsideRam { start, end };
        let Some(first) = start.checked_next_multiple_of(PAGE) else {
            return Err(outside);
        };
        let last = end - end % PAGE;
        if first >= last {
            return Ok(0);
        }
        let len = usize::try_from(last - first).unwrap_or(usize::MAX);
        if !ram.check_range(GuestAddress(first), len) {
            return Err(outside);
        }
        let mut at = first;
        while at < last {
            let Some(region) = ram.find_region(GuestAddress(at)) else {
                return Err(outside);
            };
            let offset = at - region.start_addr().0;
            let part = (last - at).min(region.len() - offset);
            drop_part(region.as_ptr(), offset, part).map_err(|source| DiscardError::Madvise {
                start: at,
                end: at + part,
                source,
            })?;
            if let Some(zeroed) = &mut self.zeroed {
                zeroed(at..at + part);
            }
            at += part;
        }
        Ok(last - first)
    }
}

/// Drops `len` bytes from `offset` of a region that is mapped at `host`.
fn drop_part(host: *mut u8, offset: u64, len: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let offset = usize::try_from(offset).map_err(too_large)?;
    let len = usize::try_from(len).map_err(too_large)?;
    // SAFETY: the caller has found [offset, offset + len) inside the region, which is mapped as
    // long as `ram` exists. Guest RAM is only ever accessed through volatile copies, never by
    // reference, so that its contents may change (here: to zero) at any time.
    let result = unsafe { libc::madvise(host.add(offset).cast(), len, libc::MADV_DONTNEED) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::Bytes;

    use super::*;

    fn ram() -> GuestRam {
        // Two regions that touch, and one beyond a hole.
        let ram = GuestRam::from_ranges(&[
            (GuestAddress(0), 0x4000),
            (GuestAddress(0x4000), 0x4000),
            (GuestAddress(1 << 32), 0x2000),
        ])
        .unwrap();
        ram.write_slice(&[7; 0x8000], GuestAddress(0)).unwrap();
        ram
    }

    fn byte(ram: &GuestRam, addr: u64) -> u8 {
        ram.read_obj(GuestAddress(addr)).unwrap()
    }

    #[test]
    fn whole_pages_read_as_zero_and_parts_stay() {
        let ram = ram();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = heard.clone();
        let mut pages =
            AnonymousPages::with_hook(Box::new(move |range| log.lock().unwrap().push(range)));
        assert_eq!(pages.discard(&ram, 0x2fff..0x6001).unwrap(), 0x3000);
        assert_eq!(byte(&ram, 0x2fff), 7);
        for addr in [0x3000, 0x3fff, 0x4000, 0x5fff] {
            assert_eq!(byte(&ram, addr), 0, "{addr:#x}");
        }
        assert_eq!(byte(&ram, 0x6000), 7);
        assert_eq!(*heard.lock().unwrap(), [0x3000..0x4000, 0x4000..0x6000]);
        ram.write_obj(9u8, GuestAddress(0x3000)).unwrap();
        assert_eq!(byte(&ram, 0x3000), 9, "the page is usable again");
    }

    #[test]
    fn ranges_outside_ram_touch_nothing() {
        let ram = ram();
        let mut pages = AnonymousPages::new();
        for range in [
            0x7000..0x9000,
            0x8000..0x9000,
            0..u64::MAX,
            u64::MAX - 1..u64::MAX,
            0x7000..(1 << 32) + 0x1000,
        ] {
            assert!(pages.discard(&ram, range.clone()).is_err(), "{range:x?}");
        }
        assert_eq!(byte(&ram, 0x7000), 7);
        for range in [0x1001..0x1fff, 0x1000..0x1000, 0..0xfff] {
            assert_eq!(pages.discard(&ram, range.clone()).unwrap(), 0, "{range:x?}");
        }
        assert_eq!(byte(&ram, 0x1800), 7);
    }
}
