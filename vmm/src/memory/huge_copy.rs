//! Copying pages of a memory file into a private view of it without a fault for each, where the file has huge pages.
//!
//! `MADV_POPULATE_WRITE` goes the way of a guest's write, page by page. `UFFDIO_COPY` puts pages where none are yet, from
//! a second mapping of the file. Of a file in pages of 4 KiB reading that would cost more faults than are saved
//! (`docs/performance.md`).
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::ranges::RangeSet;
use super::scan;
use super::userfault::{Userfault, Watch};
use super::{GuestRam, HUGE_PAGE, slots};

const PAGE: usize = 4096;
const HUGE: u64 = HUGE_PAGE as u64;

/// Copies the first `most` bytes of these ranges (offsets in the file) into `ram`, a view of all of the file in which
/// nothing was touched so far, if the file has huge pages. Returns what is left to do of them: `None` is all.
pub(super) fn copy(
    ram: &GuestRam,
    file: &File,
    wanted: &RangeSet,
    most: u64,
) -> io::Result<Option<RangeSet>> {
    let slots = slots(ram);
    let len = slots.iter().map(|slot| slot.len).sum();
    let Some(piece) = fullest_piece(wanted).filter(|piece| piece + HUGE <= len) else {
        return Ok(None);
    };
    let source = Mapping::of(file, len)?;
    if !source.is_huge(piece)? {
        return Ok(None);
    }
    let faults = Userfault::for_copies()?;
    for slot in &slots {
        faults.register(&slot.host_range(), Watch::Missing)?;
    }
    let mut failed = RangeSet::default();
    let (mut base, mut room) = (0, most);
    for slot in &slots {
        for range in wanted.within(&(base..base + slot.len)) {
            let len = (range.end - range.start).min(room);
            room -= len;
            let to = slot.host_start + range.start - base;
            if len > 0 && faults.copy(to, source.start + range.start, len).is_err() {
                failed.insert(range);
            }
        }
        base += slot.len;
    }
    Ok(Some(failed))
}

/// Offset of the 2 MiB with the most of these ranges.
fn fullest_piece(wanted: &RangeSet) -> Option<u64> {
    let (mut best, mut here) = (None, (0, 0));
    for range in wanted.iter() {
        let piece = range.start / HUGE * HUGE;
        let len = range.end - range.start;
        here = (if here.1 == piece { here.0 + len } else { len }, piece);
        best = best.max(Some(here));
    }
    best.map(|(_, piece)| piece)
}

/// All of a file, to be read, at an address at which it can be mapped in huge pages; unmapped when this is dropped.
struct Mapping {
    start: u64,
    reserved: (*mut libc::c_void, usize),
}

impl Mapping {
    fn of(file: &File, len: u64) -> io::Result<Self> {
        let too_long = |_| io::Error::from_raw_os_error(libc::ENOMEM);
        let len = usize::try_from(len).map_err(too_long)?;
        let reserved = len.saturating_add(HUGE_PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = (base as usize).next_multiple_of(HUGE_PAGE);
        let mapping = Self {
            start: start as u64,
            reserved: (base, reserved),
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        // SAFETY: it lies in what was reserved above, which nobody else knows.
        let mapped = unsafe {
            libc::mmap(
                start as *mut _,
                len,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(mapping)
    }

    /// Whether the kernel maps 2 MiB at this offset at once.
    fn is_huge(&self, offset: u64) -> io::Result<bool> {
        let start = (self.start + offset) as usize;
        // One page is enough: the kernel maps what it has of the huge one.
        // SAFETY: the range lies in the mapping, of which nothing is changed.
        unsafe { libc::madvise(start as *mut _, PAGE, libc::MADV_POPULATE_READ) };
        let huge = scan::huge_pages(&(start..start + HUGE_PAGE))?;
        Ok(!huge.is_empty())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (base, len) = self.reserved;
        // SAFETY: this was mapped for this alone, and no reference into it was ever made.
        unsafe { libc::munmap(base, len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::template::map_file;
    use super::*;

    const PAGE: u64 = super::PAGE as u64;

    /// 32 MiB, each page filled with its number.
    fn numbered() -> File {
        // SAFETY: the name is a string, and the descriptor is ours.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        for page in 0..(32 << 20) / PAGE {
            let bytes = page.to_le_bytes().repeat(512);
            file.write_all_at(&bytes, page * PAGE).unwrap();
        }
        file
    }

    /// Of first page and number of pages.
    fn pages(of: &[(u64, u64)]) -> RangeSet {
        let bytes = |(first, count): &(u64, u64)| first * PAGE..(first + count) * PAGE;
        of.iter().map(bytes).collect()
    }

    /// What is a private page of its own in `ram`.
    fn own(ram: &GuestRam) -> RangeSet {
        let slot = slots(ram)[0];
        let host = slot.host_start as usize..(slot.host_start + slot.len) as usize;
        let own = scan::private_pages(&host).unwrap();
        own.into_iter()
            .map(|it| it.start as u64..it.end as u64)
            .collect()
    }

    #[test]
    fn pages_of_a_huge_file_are_copied_and_nothing_else_changes() {
        let file = numbered();
        if belljar_keeper::huge::collapse(&file).unwrap().huge != 16 {
            eprintln!("skipped: no huge pages for files here");
            return;
        }
        let ram = map_file(&file, 32).unwrap();
        let first: u64 = ram.read_obj(GuestAddress(10 << 20)).unwrap();
        assert_eq!(first, (10 << 20) / PAGE);
        // The third range is in a piece that was touched, the last two end outside of RAM.
        let wanted = pages(&[(3, 1), (7, 23), (2570, 3), (4000, 1), (8190, 10), (9000, 1)]);
        let left = copy(&ram, &file, &wanted, 1 << 30).unwrap().unwrap();
        assert_eq!(left, pages(&[(2570, 3)]));
        let copied = pages(&[(3, 1), (7, 23), (4000, 1), (8190, 2)]);
        assert_eq!(own(&ram), copied);
        for page in 0..(32 << 20) / PAGE {
            for at in [0, 2048, 4088] {
                let number: u64 = ram.read_obj(GuestAddress(page * PAGE + at)).unwrap();
                assert_eq!(number, page);
            }
        }
        ram.write_obj(0_u64, GuestAddress(7 * PAGE)).unwrap();
        let mut kept = [0; 8];
        file.read_exact_at(&mut kept, 7 * PAGE).unwrap();
        assert_eq!(u64::from_le_bytes(kept), 7, "the file is others', too");

        let ram = map_file(&file, 32).unwrap();
        let left = copy(&ram, &file, &wanted, 5 * PAGE).unwrap().unwrap();
        assert!(left.is_empty());
        assert_eq!(own(&ram), pages(&[(3, 1), (7, 4)]), "no more than allowed");
    }

    #[test]
    fn of_a_file_in_small_pages_all_is_left() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        let ram = map_file(&file, 32).unwrap();
        for wanted in [&[][..], &[(5, 1)], &[(9000, 1)]] {
            assert_eq!(copy(&ram, &file, &pages(wanted), 1 << 30).unwrap(), None);
        }
        assert!(own(&ram).is_empty());
    }

    #[test]
    fn the_fullest_piece_is_found() {
        assert_eq!(fullest_piece(&pages(&[])), None);
        assert_eq!(fullest_piece(&pages(&[(600, 1)])), Some(HUGE));
        let set = pages(&[(1, 1), (3, 1), (520, 2), (600, 1), (1030, 1)]);
        assert_eq!(fullest_piece(&set), Some(HUGE));
    }
}
