//! Guest RAM: where it lies, how it is mapped, what the host may do with it.
//!
//! RAM of a booted guest is private anonymous memory, so that exactly the pages the guest
//! touched exist; the mappings are named `guest-ram` for whoever reads `/proc/PID/smaps`. RAM of a
//! restored guest is a private view of a memory file ([`template`]).
#![allow(unsafe_code)]
pub mod broken;
pub mod changes;
pub mod discard;
pub mod dump;
pub mod handled;
mod huge_copy;
pub mod own;
pub mod ranges;
pub mod registers;
pub mod room;
mod scan;
pub mod segment;
pub mod template;
mod userfault;
pub mod working_set;

use std::io;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::arch::x86_64::layout;

/// Guest RAM as every device sees it. Looked up on every access: a raw pointer that
/// outlives one request is how peers turned queue bugs into memory-safety bugs.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Huge pages of x86_64, to which both ends of a KVM mapping should be aligned alike.
const HUGE_PAGE: usize = 2 << 20;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest RAM of {mib} MiB cannot be mapped: {source}")]
    Map { mib: u64, source: io::Error },
    #[error("guest RAM region at {start:#x} is not usable: {source}")]
    Region { start: u64, source: MmapRegionError },
    #[error("the memory file has {found} bytes, and the guest's RAM {wanted}")]
    FileSize { found: u64, wanted: u64 },
    #[error("changes of guest RAM cannot be watched: {0}")]
    Watch(io::Error),
    #[error(
        "faults of guest RAM cannot be handed over: {0}; it takes rights to /dev/userfaultfd, or CAP_SYS_PTRACE"
    )]
    Userfault(io::Error),
    #[error(
        "the page-fault handler did not give the page at {offset:#x} of the memory file: {source}"
    )]
    NotGiven { offset: u64, source: io::Error },
    #[error("guest RAM cannot be made what it was: {0}")]
    GoBack(io::Error),
    #[error("guest RAM regions overlap or wrap around")]
    Layout,
}

/// One piece of guest RAM for a KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub guest_start: u64,
    pub len: u64,
    pub host_start: u64,
}

impl Slot {
    /// Its addresses in this process.
    fn host_range(&self) -> std::ops::Range<u64> {
        self.host_start..self.host_start + self.len
    }

    /// Its guest-physical addresses.
    fn guest_range(&self) -> std::ops::Range<u64> {
        self.guest_start..self.guest_start + self.len
    }
}

/// Maps `mib` MiB of zeroed guest RAM: below the MMIO hole, the rest from 4 GiB on.
pub fn allocate(mib: u64) -> Result<GuestRam, MemoryError> {
    build(mib, map_aligned)
}

/// Makes RAM of regions that `map` maps, by their lengths.
fn build(
    mib: u64,
    mut map: impl FnMut(usize) -> io::Result<*mut u8>,
) -> Result<GuestRam, MemoryError> {
    let bytes = mib
        .checked_mul(1 << 20)
        .filter(|b| *b <= usize::MAX as u64 / 2)
        .ok_or(MemoryError::Layout)?;
    let mut regions = Vec::with_capacity(2);
    for (start, len) in layout::ram_ranges(bytes) {
        let len = len as usize;
        let host = map(len).map_err(|source| MemoryError::Map { mib, source })?;
        // SAFETY: `host` is a fresh private mapping of `len` bytes that nobody else knows of
        // and that is never unmapped: guest RAM lives as long as the process.
        let mapping = unsafe {
            MmapRegion::build_raw(host, len, libc::PROT_READ | libc::PROT_WRITE, MAP_FLAGS)
        }
        .map_err(|source| MemoryError::Region { start, source })?;
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Layout)?;
        regions.push(region);
    }
    GuestRam::from_regions(regions).map_err(|_| MemoryError::Layout)
}

/// The KVM memory slots that make `ram` visible to the guest.
pub fn slots(ram: &GuestRam) -> Vec<Slot> {
    ram.iter()
        .map(|region| Slot {
            guest_start: region.start_addr().0,
            len: region.len(),
            host_start: region.as_ptr() as u64,
        })
        .collect()
}

/// Gives the contents of all of `ram` back to the host, where no guest will run in it. The
/// mappings stay: whoever still holds `ram` reads zeros.
pub fn give_back(ram: &GuestRam) {
    for slot in slots(ram) {
        // SAFETY: the region is mapped for the life of the process, and guest RAM is only ever
        // accessed through volatile copies, so that it may become zero at any time.
        unsafe {
            libc::madvise(
                slot.host_start as *mut _,
                slot.len as usize,
                libc::MADV_DONTNEED,
            )
        };
    }
}

const MAP_FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Maps `len` bytes whose start is aligned to a huge page, names them, and keeps them out of
/// core dumps: what a guest holds in RAM is its own business.
fn map_aligned(len: usize) -> io::Result<*mut u8> {
    let padded = len
        .checked_add(HUGE_PAGE)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            padded,
            libc::PROT_READ | libc::PROT_WRITE,
            MAP_FLAGS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let base = base as usize;
    let start = base.next_multiple_of(HUGE_PAGE);
    let (head, tail) = (start - base, HUGE_PAGE - (start - base));
    // SAFETY: head and tail are the page-aligned ends of the mapping made above, outside
    // [start, start + len).
    unsafe {
        if head > 0 {
            libc::munmap(base as *mut _, head);
        }
        if tail > 0 {
            libc::munmap((start + len) as *mut _, tail);
        }
        // All are best effort: an old kernel cannot name mappings, and says so by EINVAL.
        libc::madvise(start as *mut _, len, libc::MADV_DONTDUMP);
        libc::prctl(
            libc::PR_SET_VMA,
            libc::PR_SET_VMA_ANON_NAME,
            start,
            len,
            c"guest-ram".as_ptr(),
        );
    }
    Ok(start as *mut u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn small_ram_is_one_aligned_region() {
        let ram = allocate(33).unwrap();
        let slots = slots(&ram);
        assert_eq!(slots.len(), 1);
        assert_eq!(slots[0].len, 33 << 20);
        assert_eq!(slots[0].host_start % HUGE_PAGE as u64, 0);
        ram.write_obj(7u8, GuestAddress((33 << 20) - 1)).unwrap();
        assert!(ram.write_obj(7u8, GuestAddress(33 << 20)).is_err());
    }

    #[test]
    fn large_ram_continues_above_the_hole() {
        let ram = allocate(3 * 1024 + 512).unwrap();
        assert_eq!(ram.num_regions(), 2);
        ram.write_obj(1u8, GuestAddress((4 << 30) + (512 << 20) - 1))
            .unwrap();
        assert!(ram.write_obj(1u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn ram_of_a_guest_that_never_was_costs_nothing() {
        let ram = allocate(3 * 1024 + 64).unwrap();
        let last = GuestAddress((4 << 30) + (64 << 20) - 1);
        for addr in [GuestAddress(0), last] {
            ram.write_obj(7u8, addr).unwrap();
        }
        give_back(&ram);
        for addr in [GuestAddress(0), last] {
            assert_eq!(ram.read_obj::<u8>(addr).unwrap(), 0);
        }
    }

    #[test]
    fn absurd_sizes_are_errors() {
        assert!(allocate(u64::MAX).is_err());
        assert!(allocate(1 << 43).is_err());
    }
}
