//! RAM of a restored guest: a private view of a memory file that all clones share in the page
//! cache (design, contract 4). Exactly the pages that the guest has changed are its own.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::discard::{DiscardError, GuestPages};
use super::handled::Faults;
use super::ranges::RangeSet;
use super::{GuestRam, MemoryError, build, map_aligned, slots};

const PAGE: u64 = 4096;
/// Most separate ranges that are replaced by zeros. Each can cost two mappings, of which a process
/// has 65,530; a guest that scatters more keeps its pages.
pub(super) const MAX_RANGES: usize = 4096;

/// Guest-physical ranges that became zero behind the guest's back and so look unchanged.
#[derive(Clone, Default)]
pub struct Zeroed(Arc<Mutex<Ranges>>);

#[derive(Default)]
struct Ranges {
    /// Since the guest is there.
    all: RangeSet,
    /// Since it was last asked.
    recent: RangeSet,
}

impl Zeroed {
    pub fn get(&self) -> RangeSet {
        self.lock().all.clone()
    }

    pub fn insert(&self, range: Range<u64>) {
        let mut ranges = self.lock();
        ranges.all.insert(range.clone());
        ranges.recent.insert(range);
    }

    /// Those that became zero since the last call, whether or not they did before.
    pub fn take_recent(&self) -> RangeSet {
        std::mem::take(&mut self.lock().recent)
    }

    fn lock(&self) -> MutexGuard<'_, Ranges> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Maps `mib` MiB of guest RAM over `file`, which holds RAM's regions one behind the other and
/// is as long as they are. The file must not be cut while the guest runs.
pub fn map_file(file: &File, mib: u64) -> Result<GuestRam, MemoryError> {
    let wanted = mib << 20;
    let found = file
        .metadata()
        .map_err(|source| MemoryError::Map { mib, source })?
        .len();
    if found != wanted {
        return Err(MemoryError::FileSize { found, wanted });
    }
    let mut offset = 0;
    build(mib, |len| {
        let host = map_aligned(len)?;
        map_over(host, len, libc::MAP_PRIVATE, file.as_raw_fd(), offset)?;
        // Best effort, as for other guest RAM.
        // SAFETY: the range was mapped above.
        unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTDUMP) };
        offset += len as i64;
        Ok(host)
    })
}

/// Has RAM show the template again: what the guest has changed is gone. `faults`: those of a template that is
/// not complete yet.
pub fn go_back(
    ram: &GuestRam,
    template: &File,
    zeroed: &Zeroed,
    faults: Option<&Faults>,
) -> io::Result<()> {
    let mut ranges = zeroed.lock();
    let mut offset = 0;
    for slot in slots(ram) {
        let here = slot.guest_start..slot.guest_start + slot.len;
        for range in ranges.all.within(&here) {
            let inside = range.start - slot.guest_start;
            let host = (slot.host_start + inside) as *mut u8;
            let len = (range.end - range.start) as usize;
            let at = i64::try_from(offset + inside).map_err(|_| io::ErrorKind::InvalidInput)?;
            map_over(host, len, libc::MAP_PRIVATE, template.as_raw_fd(), at)?;
            // SAFETY: the range was mapped just now. Best effort, as for other guest RAM.
            unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTDUMP) };
            if let Some(faults) = faults {
                let start = slot.host_start + inside;
                faults.register(&(start..start + len as u64))?;
            }
        }
        // SAFETY: the region is mapped for the life of the process, and guest RAM is only accessed through
        // volatile copies and by KVM, so that its contents may change at any time.
        let dropped = unsafe {
            libc::madvise(
                slot.host_start as *mut _,
                slot.len as usize,
                libc::MADV_DONTNEED,
            )
        };
        if dropped != 0 {
            return Err(io::Error::last_os_error());
        }
        offset += slot.len;
    }
    *ranges = Ranges::default();
    if let Some(faults) = faults {
        faults.begin_again();
    }
    Ok(())
}

/// Replaces what is mapped at `host`.
fn map_over(host: *mut u8, len: usize, flags: i32, fd: i32, offset: i64) -> io::Result<()> {
    // SAFETY: callers name a range of guest RAM that is mapped and theirs. Guest RAM is only
    // accessed through volatile copies and by KVM, so that its contents may change at any time.
    let mapped = unsafe {
        libc::mmap(
            host.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
            fd,
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Pages of a private view. Dropping one would show the template's bytes again: zeros are mapped
/// in its place.
pub struct TemplatePages {
    zeroed: Zeroed,
}

impl TemplatePages {
    pub fn new(zeroed: Zeroed) -> Self {
        Self { zeroed }
    }

    fn replace(&self, host: *mut u8, len: u64, range: &Range<u64>) -> io::Result<bool> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut ranges = self.zeroed.lock();
        let Ranges {
            all: zeroed,
            recent,
        } = &mut *ranges;
        if zeroed.contains(range) {
            // SAFETY: the range is guest RAM that was replaced by anonymous memory before.
            if unsafe { libc::madvise(host.cast(), len, libc::MADV_DONTNEED) } != 0 {
                return Err(io::Error::last_os_error());
            }
            recent.insert(range.clone());
            return Ok(true);
        }
        if zeroed.len() >= MAX_RANGES && !zeroed.touches(range) {
            return Ok(false);
        }
        map_over(host, len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        zeroed.insert(range.clone());
        recent.insert(range.clone());
        Ok(true)
    }
}

impl GuestPages for TemplatePages {
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
        let (mut at, mut given) = (first, 0);
        while at < last {
            let Some(region) = ram.find_region(GuestAddress(at)) else {
                return Err(outside);
            };
            let offset = at - region.start_addr().0;
            let part = (last - at).min(region.len() - offset);
            let host = region.as_ptr().wrapping_add(offset as usize);
            let replaced = self
                .replace(host, part, &(at..at + part))
                .map_err(|source| DiscardError::Madvise {
                    start: at,
                    end: at + part,
                    source,
                })?;
            given += if replaced { part } else { 0 };
            at += part;
        }
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    fn file(mib: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(mib << 20).unwrap();
        file
    }

    #[test]
    fn clones_share_a_file_and_keep_their_changes() {
        let file = file(33);
        file.write_all_at(b"template", 0x5000).unwrap();
        let clones = [map_file(&file, 33).unwrap(), map_file(&file, 33).unwrap()];
        clones[0]
            .write_slice(b"changed!", GuestAddress(0x5000))
            .unwrap();
        let read = |ram: &GuestRam| -> [u8; 8] { ram.read_obj(GuestAddress(0x5000)).unwrap() };
        assert_eq!(read(&clones[0]), *b"changed!");
        assert_eq!(read(&clones[1]), *b"template");
        let mut back = [0; 8];
        file.read_exact_at(&mut back, 0x5000).unwrap();
        assert_eq!(back, *b"template");
    }

    #[test]
    fn ram_beyond_the_hole_continues_in_the_file() {
        let mib = 3 * 1024 + 64;
        let file = file(mib);
        file.write_all_at(b"high", (3 << 30) + 7).unwrap();
        let ram = map_file(&file, mib).unwrap();
        let high: [u8; 4] = ram.read_obj(GuestAddress((4 << 30) + 7)).unwrap();
        assert_eq!(high, *b"high");
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let error = map_file(&file(33), 34).unwrap_err().to_string();
        assert!(
            error.contains("34603008") && error.contains("35651584"),
            "{error}"
        );
    }

    #[test]
    fn discarded_pages_are_zero_and_not_the_templates() {
        let file = file(32);
        file.write_all_at(&[7; 0x4000], 0).unwrap();
        let ram = map_file(&file, 32).unwrap();
        let zeroed = Zeroed::default();
        let mut pages = TemplatePages::new(zeroed.clone());
        let byte = |addr| ram.read_obj::<u8>(GuestAddress(addr)).unwrap();
        assert_eq!(pages.discard(&ram, 0xfff..0x3001).unwrap(), 0x2000);
        assert_eq!(
            [byte(0), byte(0x1000), byte(0x2fff), byte(0x3000)],
            [7, 0, 0, 7]
        );
        ram.write_obj(9u8, GuestAddress(0x1000)).unwrap();
        assert_eq!(pages.discard(&ram, 0x1000..0x2000).unwrap(), 0x1000);
        assert_eq!(byte(0x1000), 0, "also when it was used again");
        assert_eq!(zeroed.get().iter().next(), Some(0x1000..0x3000));
        assert_eq!(zeroed.get().len(), 1);
        assert!(pages.discard(&ram, 0..1 << 40).is_err());
    }

    #[test]
    fn going_back_shows_the_template_everywhere() {
        let file = file(32);
        file.write_all_at(&[7; 0x8000], 0).unwrap();
        let ram = map_file(&file, 32).unwrap();
        let zeroed = Zeroed::default();
        let mut pages = TemplatePages::new(zeroed.clone());
        for addr in [0x1000, 0x3000, 0x1f_0000] {
            ram.write_obj(9u8, GuestAddress(addr)).unwrap();
        }
        pages.discard(&ram, 0x3000..0x5000).unwrap();
        go_back(&ram, &file, &zeroed, None).unwrap();
        let mut all = vec![0; 0x20_0000];
        ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all[..0x8000].iter().all(|byte| *byte == 7));
        assert!(all[0x8000..].iter().all(|byte| *byte == 0));
        assert!(zeroed.get().is_empty());
    }

    #[test]
    fn a_guest_that_scatters_costs_a_bounded_number_of_mappings() {
        let file = file(64);
        let ram = map_file(&file, 64).unwrap();
        let zeroed = Zeroed::default();
        let mut pages = TemplatePages::new(zeroed.clone());
        let given: u64 = (0..8192)
            .map(|n| {
                pages
                    .discard(&ram, n * 2 * PAGE..(n * 2 + 1) * PAGE)
                    .unwrap()
            })
            .sum();
        assert_eq!(given, MAX_RANGES as u64 * PAGE);
        assert_eq!(zeroed.get().len(), MAX_RANGES);
    }
}
