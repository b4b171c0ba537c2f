//! The pages a guest writes first after a restore: recorded once, copied at once the next time.
//!
//! Each page that a restored guest writes costs an exit, a copy and two page faults, one by one. Which pages these
//! are repeats from one restore of a snapshot to the next. Pages that are only read are not worth it: the page
//! cache has them, and many of them are mapped at a time (`docs/performance.md`).
use std::fs::File;
use std::io;
use std::ops::Range;

use super::ranges::RangeSet;
use super::{GuestRam, Slot, huge_copy, scan, slots};

const PAGE: u64 = 4096;
const MAGIC: &[u8; 8] = b"BJWSET1\n";
/// Bytes of one run in the file.
const RUN: usize = 16;
/// Most runs, and most pages in all, of a recording.
const MAX_RUNS: usize = 1 << 16;
const MAX_PAGES: u64 = 1 << 16;
/// Most pages that are brought in: a recording is a hint, which must not cost more than it saves. These are 16 MiB,
/// copied in some 40 ms at the most.
const MAX_BROUGHT: u64 = 4096;
/// Set in the start of a run of pages that were written. Recordings once had others, too.
const WRITTEN: u64 = 1;
/// Longest file.
pub const MAX_LEN: usize = MAGIC.len() + MAX_RUNS * RUN;

/// Offsets in the memory file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    written: RangeSet,
}

/// What of a working set is in RAM already.
#[derive(Debug, Default)]
pub struct Copied {
    /// `None`: nothing is.
    all_but: Option<RangeSet>,
}

impl Copied {
    fn has(&self, range: &Range<u64>) -> bool {
        let left = self.all_but.as_ref();
        left.is_some_and(|left| left.within(range).next().is_none())
    }
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
    /// What a restored guest has written by now.
    pub fn record(ram: &GuestRam) -> io::Result<Self> {
        let mut set = Self::default();
        let mut base = 0;
        for slot in slots(ram) {
            let host = slot.host_start as usize..(slot.host_start + slot.len) as usize;
            for range in scan::private_pages(&host)? {
                set.written
                    .insert(base + range.start as u64..base + range.end as u64);
            }
            base += slot.len;
        }
        Ok(set)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut pages = 0;
        for range in self.written.iter().take(MAX_RUNS) {
            let count = (range.end - range.start) / PAGE;
            pages += count;
            if pages > MAX_PAGES {
                break;
            }
            bytes.extend((range.start | WRITTEN).to_le_bytes());
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
                .and_then(|len| (start & !WRITTEN).checked_add(len));
            let (Some(end), true) = (end, pages <= MAX_PAGES && count > 0) else {
                return Err(WorkingSetError::Run(start));
            };
            if start & !WRITTEN & (PAGE - 1) != 0 {
                return Err(WorkingSetError::Run(start));
            }
            if start & WRITTEN != 0 {
                set.written.insert(start & !WRITTEN..end);
            }
        }
        Ok(set)
    }

    /// Copies the pages, the first 16 MiB of them, from the memory file if it has huge pages. To be called before
    /// anything else touches `ram`; [`Self::bring_in`] copies the others.
    pub fn copy_ahead(&self, ram: &GuestRam, file: &File) -> Copied {
        let left = huge_copy::copy(ram, file, &self.written, MAX_BROUGHT * PAGE);
        Copied {
            all_but: left.unwrap_or_default(),
        }
    }

    /// Copies the pages that are not there yet, the first 16 MiB of all; `map` is then told guest-physical address and
    /// length of each run. What lies outside RAM is left out. A hint: what the kernel cannot do now it does when the
    /// guest comes.
    pub fn bring_in(&self, ram: &GuestRam, copied: &Copied, mut map: impl FnMut(u64, u64)) {
        let mut base = 0;
        let mut left = MAX_BROUGHT * PAGE;
        for slot in slots(ram) {
            let here = base..base + slot.len;
            for range in self.written.within(&here) {
                let len = (range.end - range.start).min(left);
                if len == 0 {
                    return;
                }
                left -= len;
                if !copied.has(&range) {
                    populate(&slot, range.start - base, len);
                }
                map(slot.guest_start + range.start - base, len);
            }
            base += slot.len;
        }
    }
}

fn populate(slot: &Slot, offset: u64, len: u64) {
    let host = (slot.host_start + offset) as *mut libc::c_void;
    // SAFETY: the range lies in a region of guest RAM, which is mapped for the life of the process; the
    // contents of its pages do not change.
    unsafe { libc::madvise(host, len as usize, libc::MADV_POPULATE_WRITE) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::template::map_file;
    use super::*;

    fn template() -> std::fs::File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(&[3; 1 << 20], 0).unwrap();
        file
    }

    #[test]
    fn what_one_guest_wrote_the_next_one_has() {
        let file = template();
        let first = map_file(&file, 32).unwrap();
        first.write_obj(1u8, GuestAddress(5 * PAGE)).unwrap();
        first.read_obj::<u8>(GuestAddress(100 * PAGE)).unwrap();
        let recorded = WorkingSet::record(&first).unwrap();
        let pages: Vec<_> = recorded
            .written
            .iter()
            .map(|run| (run.start, run.end))
            .collect();
        let expected = [(5 * PAGE, 6 * PAGE)];
        assert_eq!(pages, expected, "what is only read is left out");
        let set = WorkingSet::decode(&recorded.encode()).unwrap();
        assert_eq!(set, recorded);
        let second = map_file(&file, 32).unwrap();
        let mut runs = Vec::new();
        set.bring_in(&second, &Copied::default(), |start, len| {
            runs.push((start, len));
        });
        assert_eq!(runs, [(5 * PAGE, PAGE)]);
        assert_eq!(WorkingSet::record(&second).unwrap(), recorded);
        assert_eq!(second.read_obj::<u8>(GuestAddress(5 * PAGE)).unwrap(), 3);
    }

    #[test]
    fn what_an_older_recording_says_was_only_read_is_left_to_the_guest() {
        let words = [7 * PAGE, 3, (20 * PAGE) | WRITTEN, 1];
        let bytes = words.iter().flat_map(|word| word.to_le_bytes());
        let bytes: Vec<u8> = MAGIC.iter().copied().chain(bytes).collect();
        let set = WorkingSet::decode(&bytes).unwrap();
        assert_eq!(set.written.iter().next(), Some(20 * PAGE..21 * PAGE));
        assert_eq!(set.written.len(), 1);
    }

    #[test]
    fn a_recording_of_everything_brings_in_16_mib() {
        let ram = map_file(&template(), 32).unwrap();
        let set = WorkingSet {
            written: [PAGE..9 << 20, 10 << 20..32 << 20].into_iter().collect(),
        };
        let mut sum = 0;
        set.bring_in(&ram, &Copied::default(), |_, len| sum += len);
        assert_eq!(sum, 16 << 20);
        let own = WorkingSet::record(&ram).unwrap();
        let own: u64 = own
            .written
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        assert_eq!(own, 16 << 20);
    }

    #[test]
    fn what_was_copied_ahead_is_not_populated_again_but_mapped() {
        let ram = map_file(&template(), 32).unwrap();
        let pages = |of: &[(u64, u64)]| -> RangeSet {
            let bytes = |(first, count): &(u64, u64)| first * PAGE..(first + count) * PAGE;
            of.iter().map(bytes).collect()
        };
        let set = WorkingSet {
            written: pages(&[(1, 2), (9, 1)]),
        };
        let copied = Copied {
            all_but: Some(pages(&[(9, 1)])),
        };
        let mut runs = Vec::new();
        set.bring_in(&ram, &copied, |start, len| runs.push((start, len)));
        assert_eq!(runs, [(PAGE, 2 * PAGE), (9 * PAGE, PAGE)]);
        assert_eq!(WorkingSet::record(&ram).unwrap().written, pages(&[(9, 1)]));
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
                set.bring_in(&ram, &Copied::default(), |start, len| assert!(start + len <= 32 << 20));
            }
        }
    }
}
