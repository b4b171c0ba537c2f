//! RAM whose pages another process brings in when they are first touched (`mem_backend` `Uffd`).
//!
//! RAM is private anonymous memory, or a private view of a file which that process fills. Until it has
//! brought a page, whoever touches that waits: a vCPU, a device, a system call. It is never taken for zeros: this process keeps
//! the userfaultfd open, so that faults still wait when the handler is gone (design, contract 4).
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::ranges::RangeSet;
use super::template::Zeroed;
use super::userfault::{Userfault, Watch};
use super::{GuestRam, MemoryError, Slot, slots};

const PAGE: usize = 4096;
/// Bytes that one system call brings in.
const STEP: u64 = 2 << 20;

/// A region of RAM, as its page-fault handler is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Where it lies in this process.
    pub base_host_virt_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where its contents begin in the memory file.
    pub offset: u64,
    /// Bytes.
    pub page_size: usize,
    /// The same, in bytes too: the name is an old mistake of the interface that clients know.
    pub page_size_kib: usize,
}

/// What a handler needs to know of `ram`.
pub fn regions(ram: &GuestRam) -> Vec<Region> {
    let mut offset = 0;
    let region = |slot: Slot| {
        let region = Region {
            base_host_virt_addr: slot.host_start,
            size: slot.len,
            offset,
            page_size: PAGE,
            page_size_kib: PAGE,
        };
        offset += slot.len;
        region
    };
    slots(ram).into_iter().map(region).collect()
}

/// The faults of a guest's RAM.
pub struct Faults {
    fault: Arc<Userfault>,
    progress: Mutex<Progress>,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    /// Nothing can be missing any more.
    is_complete: bool,
    /// How often RAM became the template's again.
    resets: u64,
}

impl Faults {
    /// From now on, accesses to pages of `ram` that are not there wait for whoever reads the descriptor.
    /// Nobody has accessed it yet. `anonymous`: it is no view of a file, so what is dropped is missing again.
    pub fn begin(ram: &GuestRam, anonymous: bool) -> Result<Self, MemoryError> {
        let fault = Userfault::for_missing(anonymous).map_err(MemoryError::Userfault)?;
        for slot in slots(ram) {
            fault
                .register(&slot.host_range(), Watch::Missing)
                .map_err(MemoryError::Userfault)?;
        }
        Ok(Self {
            fault: Arc::new(fault),
            progress: Mutex::default(),
        })
    }

    pub(super) fn userfault(&self) -> Arc<Userfault> {
        Arc::clone(&self.fault)
    }

    /// Waits for missing pages again where something else was mapped meanwhile.
    pub(super) fn register(&self, host: &Range<u64>) -> io::Result<()> {
        self.fault.register(host, Watch::Missing)
    }

    pub fn is_complete(&self) -> bool {
        self.progress().is_complete
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// RAM is the template's again: also where the guest had given pages back, which nobody ever brought in.
    pub(super) fn begin_again(&self) {
        let mut progress = self.progress();
        progress.is_complete = false;
        progress.resets = progress.resets.wrapping_add(1);
    }

    /// Has every page brought in, however long the handler takes. The guest may run. What became zero because it
    /// was given back is left out. If RAM is reset meanwhile, it is not complete afterwards.
    pub fn complete(&self, ram: &GuestRam, zeroed: &Zeroed) -> Result<(), MemoryError> {
        let before = self.progress().resets;
        let zeroed = zeroed.get();
        let mut base = 0;
        for slot in slots(ram) {
            let mut wanted = RangeSet::default();
            wanted.insert(slot.guest_start..slot.guest_start + slot.len);
            for range in zeroed.iter() {
                wanted.remove(range);
            }
            for range in wanted.iter() {
                let start = range.start - slot.guest_start;
                bring_in(&slot, start..start + (range.end - range.start)).map_err(
                    |(at, source)| MemoryError::NotGiven {
                        offset: base + at,
                        source,
                    },
                )?;
            }
            base += slot.len;
        }
        let mut progress = self.progress();
        progress.is_complete = progress.resets == before;
        Ok(())
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }
}

/// Has the pages of a part of a region brought in; fails with the offset in the region.
pub(super) fn bring_in(slot: &Slot, range: Range<u64>) -> Result<(), (u64, io::Error)> {
    let mut at = range.start;
    while at < range.end {
        let len = STEP.min(range.end - at);
        let host = (slot.host_start + at) as *mut libc::c_void;
        // SAFETY: the range lies in a region of guest RAM, which is mapped for the life of the process; it is
        // read, which changes no contents.
        let done = unsafe { libc::madvise(host, len as usize, libc::MADV_POPULATE_READ) };
        if done == 0 {
            at += len;
            continue;
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err((at, error));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::super::discard::GuestPages;
    use super::super::template::{TemplatePages, go_back, map_file};
    use super::*;

    #[test]
    fn after_a_reset_what_the_guest_had_given_back_is_missing_again() {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(file);
        file.set_len(32 << 20).unwrap();
        // All is there, so that nobody needs to answer.
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; 32 << 20], 0).unwrap();
        let ram = map_file(&file, 32).unwrap();
        let Ok(faults) = Faults::begin(&ram, false) else {
            eprintln!("skipped: no rights to /dev/userfaultfd");
            return;
        };
        let zeroed = Zeroed::default();
        let mut pages = TemplatePages::new(zeroed.clone());
        pages.discard(&ram, 0x3000..0x5000).unwrap();
        faults.complete(&ram, &zeroed).unwrap();
        assert!(faults.is_complete());
        go_back(&ram, &file, &zeroed, Some(&faults)).unwrap();
        // Pages 3 and 4 may be missing in the template: nobody has asked for them.
        assert!(!faults.is_complete());
        let byte: u8 = vm_memory::Bytes::read_obj(&ram, GuestAddress(0x3000)).unwrap();
        assert_eq!(byte, 7);
        faults.complete(&ram, &zeroed).unwrap();
        assert!(faults.is_complete());
    }
}
