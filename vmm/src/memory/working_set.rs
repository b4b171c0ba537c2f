//! The pages a guest uses first after a restore: recorded once, brought in at once the next time.
//!
//! Each page that a restored guest touches costs an exit and two page faults, one by one: most of the time from
//! a load to a guest's first answer. Which pages these are repeats from one restore of a snapshot to the next.
use std::io;
use std::ops::Range;

use super::ranges::RangeSet;
use super::{GuestRam, Slot, scan, slots};

const PAGE: u64 = 4096;
const MAGIC: &[u8; 8] = b"BJWSET1\n";
/// Bytes of one run in the file.
const RUN: usize = 16;
/// Most runs, and most pages in all: a recording is a hint, which must not cost more than it saves.
const MAX_RUNS: usize = 1 << 16;
const MAX_PAGES: u64 = 1 << 16;
/// Longest file.
pub const MAX_LEN: usize = MAGIC.len() + MAX_RUNS * RUN;

/// Offsets in the memory file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    read: RangeSet,
    written: RangeSet,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkingSetError {
    #[error("it is no recording of a working set")]
    Magic,
    #[error("it is cut short or too long")]
    Length,
    #[error("a run of pages at {0:#x} is empty or too long")]
    Run(u64),
}

impl WorkingSet {
    /// What a restored guest has touched by now. Pages that were only read are rounded up to what the kernel
    /// maps at a time, unless changes were watched from the start.
    pub fn record(ram: &GuestRam) -> io::Result<Self> {
        let mut set = Self::default();
        let mut base = 0;
        for slot in slots(ram) {
            let host = slot.host_start as usize..(slot.host_start + slot.len) as usize;
            let place = |range: Range<usize>| base + range.start as u64..base + range.end as u64;
            for range in scan::private_pages(&host)? {
                set.written.insert(place(range));
            }
            for range in scan::shared_pages(&host)? {
                set.read.insert(place(range));
            }
            base += slot.len;
        }
        Ok(set)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut pages = 0;
        let all = [(&self.written, 1), (&self.read, 0)];
        let runs = all
            .iter()
            .flat_map(|(set, written)| set.iter().map(move |range| (range, *written)));
        for (range, written) in runs.take(MAX_RUNS) {
            let count = (range.end - range.start) / PAGE;
            pages += count;
            if pages > MAX_PAGES {
                break;
            }
            bytes.extend((range.start | written).to_le_bytes());
            bytes.extend(count.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(WorkingSetError::Magic)?;
        let (runs, odd) = rest.as_chunks::<RUN>();
        if !odd.is_empty() || runs.len() > MAX_RUNS {
            return Err(WorkingSetError::Length);
        }
        let mut set = Self::default();
        let mut pages = 0;
        for run in runs {
            let (words, _) = run.as_chunks::<8>();
            let &[start, count] = words else {
                return Err(WorkingSetError::Length);
            };
            let (start, count) = (u64::from_le_bytes(start), u64::from_le_bytes(count));
            pages = count.saturating_add(pages);
            let end = count
                .checked_mul(PAGE)
                .and_then(|len| (start & !1).checked_add(len));
            let (Some(end), true) = (end, pages <= MAX_PAGES && count > 0) else {
                return Err(WorkingSetError::Run(start));
            };
            if start & !1 & (PAGE - 1) != 0 {
                return Err(WorkingSetError::Run(start));
            }
            let kind = if start & 1 == 1 {
                &mut set.written
            } else {
                &mut set.read
            };
            kind.insert(start & !1..end);
        }
        Ok(set)
    }

    /// Brings the pages in; `map` is then told guest-physical address and length of each run. What lies
    /// outside RAM is left out. A hint: what the kernel cannot do now it does when the guest comes.
    pub fn bring_in(&self, ram: &GuestRam, mut map: impl FnMut(u64, u64)) {
        let mut base = 0;
        for slot in slots(ram) {
            let here = base..base + slot.len;
            for (set, advice) in [
                (&self.written, libc::MADV_POPULATE_WRITE),
                (&self.read, libc::MADV_POPULATE_READ),
            ] {
                for range in set.within(&here) {
                    populate(&slot, range.start - base, range.end - range.start, advice);
                    map(
                        slot.guest_start + range.start - base,
                        range.end - range.start,
                    );
                }
            }
            base += slot.len;
        }
    }
}

fn populate(slot: &Slot, offset: u64, len: u64, advice: i32) {
    let host = (slot.host_start + offset) as *mut libc::c_void;
    // SAFETY: the range lies in a region of guest RAM, which is mapped for the life of the process; the
    // contents of its pages do not change.
    unsafe { libc::madvise(host, len as usize, advice) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::template::map_file;
    use super::*;

    #[test]
    fn what_one_guest_touched_the_next_one_has() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(&[3; 1 << 20], 0).unwrap();
        let first = map_file(&file, 32).unwrap();
        first.write_obj(1u8, GuestAddress(5 * PAGE)).unwrap();
        first.read_obj::<u8>(GuestAddress(100 * PAGE)).unwrap();
        let recorded = WorkingSet::record(&first).unwrap();
        assert_eq!(recorded.written.iter().next(), Some(5 * PAGE..6 * PAGE));
        assert!(recorded.read.contains(&(100 * PAGE..101 * PAGE)));
        let set = WorkingSet::decode(&recorded.encode()).unwrap();
        assert_eq!(set, recorded);
        let second = map_file(&file, 32).unwrap();
        let mut runs = Vec::new();
        set.bring_in(&second, |start, len| runs.push((start, len)));
        assert_eq!(runs[0], (5 * PAGE, PAGE));
        let there = WorkingSet::record(&second).unwrap();
        assert!(there.written.contains(&(5 * PAGE..6 * PAGE)));
        assert!(there.read.contains(&(100 * PAGE..101 * PAGE)));
        assert_eq!(second.read_obj::<u8>(GuestAddress(5 * PAGE)).unwrap(), 3);
    }

    #[test]
    fn nonsense_is_an_error() {
        let run = |start: u64, count: u64| {
            let words = [start.to_le_bytes(), count.to_le_bytes()].concat();
            WorkingSet::decode(&[MAGIC.as_slice(), &words].concat())
        };
        assert!(run(4096, 3).is_ok());
        assert_eq!(run(4096, 0), Err(WorkingSetError::Run(4096)));
        assert_eq!(run(4097 + 8, 1), Err(WorkingSetError::Run(4105)));
        assert!(run(4096, u64::MAX).is_err());
        assert!(run(u64::MAX - 4095, 9).is_err());
        assert_eq!(WorkingSet::decode(b"x"), Err(WorkingSetError::Magic));
        let odd = [MAGIC.as_slice(), b"x"].concat();
        assert_eq!(WorkingSet::decode(&odd), Err(WorkingSetError::Length));
    }

    proptest! {
        #[test]
        fn whatever_the_file_says_only_ram_is_touched(words in prop::collection::vec(any::<u64>(), 0..40)) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(32 << 20).unwrap();
            let ram = map_file(&file, 32).unwrap();
            let words = words.iter().flat_map(|word| (word >> (word % 64)).to_le_bytes());
            let bytes = MAGIC.iter().copied().chain(words).collect::<Vec<_>>();
            if let Ok(set) = WorkingSet::decode(&bytes) {
                set.bring_in(&ram, |start, len| assert!(start + len <= 32 << 20));
            }
        }
    }
}
