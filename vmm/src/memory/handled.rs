//! RAM whose pages another process brings in when they are first touched (`mem_backend` `Uffd`).
//!
//! RAM is private anonymous memory, or a private view of a file which that process fills. Until it has
//! brought a page, whoever touches that waits: a vCPU, a device, a system call. It is never taken for zeros: this process keeps
//! the userfaultfd open, so that faults still wait when the handler is gone (design, contract 4).
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::ranges::RangeSet;
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
    /// Nothing can be missing any more.
    complete: AtomicBool,
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
            complete: AtomicBool::new(false),
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
        self.complete.load(Ordering::Acquire)
    }

    /// Has every page brought in, however long the handler takes. The guest may run. `zeroed`: guest-physical
    /// ranges that are missing because they were given back.
    pub fn complete(&self, ram: &GuestRam, zeroed: &RangeSet) -> Result<(), MemoryError> {
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
        self.complete.store(true, Ordering::Release);
        Ok(())
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }
}

/// Fails with the offset in the region.
fn bring_in(slot: &Slot, range: Range<u64>) -> Result<(), (u64, io::Error)> {
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
