//! What the guest has changed since its last snapshot.
//!
//! A guest that was never saved is not watched. From its first snapshot on, RAM is write-protected
//! asynchronously: the kernel resolves the fault of the first write to each page, and `PAGEMAP_SCAN` tells
//! and protects in one step which pages were written (design, contract 4). What became zero behind the
//! guest's back the scan cannot see: it is kept in [`Zeroed`].
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::handled::Faults;
use super::ranges::RangeSet;
use super::template::{MAX_RANGES, Zeroed};
use super::userfault::{self, Userfault};
use super::{GuestRam, Slot, scan, slots};

/// The changes of one guest.
pub struct Changes {
    watch: Watch,
    /// Whether there was a snapshot that the next increment can build on.
    has_base: bool,
    /// Offsets in the memory file that were taken for a snapshot that failed.
    pending: RangeSet,
    /// Whether some of these were found to be zero, and not by looking at pages that are there.
    pending_zeroed: bool,
    /// The guest's own pages, found early: all of them but those written since, which the next scan tells.
    own: Option<RangeSet>,
    /// How often RAM became the template's again: what was taken before says nothing of what is there now.
    resets: u64,
    zeroed: Zeroed,
}

enum Watch {
    NotYet,
    On {
        fault: Arc<Userfault>,
        pagemap: File,
        /// The same descriptor tells missing pages, as a range can have one only.
        missing: bool,
    },
    /// This kernel cannot, and was asked once.
    Impossible,
}

/// What changed, as offsets in the memory file. Must be given back with [`Changes::finish`].
#[must_use]
pub struct Taken {
    changed: Option<RangeSet>,
    /// Own pages now: all of them, and perhaps some that are no more. `None`: that was not looked at before.
    own: Option<RangeSet>,
    /// Whether pages may be among what has changed that are not there.
    zeroed: bool,
    /// [`Changes::resets`] then.
    resets: u64,
}

impl Taken {
    /// `None`: it is not known, so everything that is the guest's own.
    pub fn ranges(&self) -> Option<&RangeSet> {
        self.changed.as_ref()
    }

    /// Whether all that has changed is there: reading it waits for nobody.
    pub fn is_there(&self) -> bool {
        !self.zeroed
    }

    /// Pages that may be the guest's own, as offsets in the memory file: none others are. `None`: look at all.
    pub fn own(&self) -> Option<&RangeSet> {
        self.own.as_ref()
    }
}

/// What was found while the guest still ran.
#[derive(Debug, Default)]
pub struct Ahead {
    /// The guest's own pages then.
    own: Option<RangeSet>,
    /// Bytes that have changed by then.
    changed: u64,
}

impl Ahead {
    /// Bytes that an increment would hold that was taken then.
    pub fn changed(&self) -> u64 {
        self.changed
    }
}

impl Changes {
    pub fn new(zeroed: Zeroed) -> Self {
        Self {
            watch: Watch::NotYet,
            has_base: false,
            pending: RangeSet::default(),
            pending_zeroed: false,
            own: None,
            resets: 0,
            zeroed,
        }
    }

    /// Of a guest whose missing pages are handled by somebody.
    pub fn beside(zeroed: Zeroed, faults: &Faults) -> io::Result<Self> {
        let fault = faults.userfault();
        let watch = if fault.tells_writes() {
            Watch::On {
                fault,
                pagemap: File::open("/proc/self/pagemap")?,
                missing: true,
            }
        } else {
            Watch::Impossible
        };
        Ok(Self {
            watch,
            ..Self::new(zeroed)
        })
    }

    /// Watches from now on. While it does, the kernel maps single pages where the guest reads, too.
    pub fn watch(&mut self, ram: &GuestRam) -> io::Result<()> {
        self.begin()?;
        for slot in slots(ram) {
            self.register(&slot)?;
        }
        Ok(())
    }

    /// Watches a region, also what the balloon has mapped anew.
    fn register(&self, slot: &Slot) -> io::Result<()> {
        let Watch::On { fault, missing, .. } = &self.watch else {
            return Ok(());
        };
        let whole = slot.host_range();
        if !missing {
            return fault.register(&whole, userfault::Watch::Writes);
        }
        let zeroed = self.zeroed.get();
        // Each range is a mapping of its own. A guest may have given back more of them than there can be mappings;
        // then whoever brings pages in is asked, and knows that they are zero (a view of a template has fewer).
        if zeroed.len() > MAX_RANGES {
            return fault.register(&whole, userfault::Watch::Both);
        }
        // What was given back is zero where it is missing: nobody need be asked.
        let mut asked = RangeSet::default();
        asked.insert(whole);
        for range in zeroed.within(&slot.guest_range()) {
            let start = slot.host_start + (range.start - slot.guest_start);
            let host = start..start + (range.end - range.start);
            fault.register(&host, userfault::Watch::Writes)?;
            asked.remove(host);
        }
        asked
            .iter()
            .try_for_each(|range| fault.register(&range, userfault::Watch::Both))
    }

    fn begin(&mut self) -> io::Result<()> {
        if matches!(self.watch, Watch::NotYet) {
            self.watch = match Userfault::for_writes() {
                Ok(fault) => Watch::On {
                    fault: Arc::new(fault),
                    pagemap: File::open("/proc/self/pagemap")?,
                    missing: false,
                },
                Err(error) => {
                    crate::log_debug!(
                        "increments hold all that differs from the template: {error}"
                    );
                    Watch::Impossible
                }
            };
        }
        Ok(())
    }

    /// Does most of what [`Changes::take`] does while the guest still runs: what has changed by now is protected
    /// again, and kept for it. If `all` pages that are the guest's own are wanted, not only those that have changed
    /// since the last snapshot, they are looked for, too: later only those need be added that were written since.
    pub fn look_ahead(&mut self, ram: &GuestRam, all: bool) -> io::Result<Ahead> {
        let found = self.find_ahead(ram, all);
        found.inspect_err(|_| self.lose())
    }

    /// Does most of what [`Changes::look_ahead`] does some time before: what is found now is kept until a snapshot is
    /// taken, and is not looked for again.
    pub fn look_early(&mut self, ram: &GuestRam, all: bool) -> io::Result<()> {
        self.own = self.look_ahead(ram, all)?.own;
        Ok(())
    }

    fn find_ahead(&mut self, ram: &GuestRam, all: bool) -> io::Result<Ahead> {
        let all = all || !self.has_base;
        if all {
            self.begin()?;
        }
        let Watch::On { pagemap, .. } = &self.watch else {
            return Ok(Ahead::default());
        };
        let earlier = self.own.take().filter(|_| all);
        let look = all && earlier.is_none();
        let mut own = earlier.unwrap_or_default();
        let mut base = 0;
        for slot in slots(ram) {
            self.register(&slot)?;
            for range in scan::written(pagemap, &slot.host_range())? {
                let range = base + range.start..base + range.end;
                if all && !look {
                    own.insert(range.clone());
                }
                // Without a snapshot to build on this says nothing, and is not asked for.
                self.pending.insert(range);
            }
            if look {
                let host = slot.host_start as usize..(slot.host_start + slot.len) as usize;
                for range in scan::private_pages(&host)? {
                    own.insert(base + range.start as u64..base + range.end as u64);
                }
            }
            base += slot.len;
        }
        Ok(Ahead {
            own: all.then_some(own),
            changed: match self.has_base {
                true => self.pending.iter().map(|r| r.end - r.start).sum(),
                false => u64::MAX,
            },
        })
    }

    /// Takes what was changed since the last call, and watches from now on. The guest stands still. `ahead`: what
    /// was found just before, if that was looked for.
    pub fn take(&mut self, ram: &GuestRam, ahead: Option<Ahead>) -> io::Result<Taken> {
        let found = self.find(ram, ahead);
        found.inspect_err(|_| self.lose())
    }

    fn find(&mut self, ram: &GuestRam, ahead: Option<Ahead>) -> io::Result<Taken> {
        let recent = self.zeroed.take_recent();
        self.own = None;
        self.begin()?;
        let resets = self.resets;
        let mut own = ahead.and_then(|ahead| ahead.own);
        let Watch::On { pagemap, .. } = &self.watch else {
            return Ok(Taken {
                changed: None,
                own: None,
                zeroed: true,
                resets,
            });
        };
        let mut changed = std::mem::take(&mut self.pending);
        let zeroed = std::mem::take(&mut self.pending_zeroed) || !recent.is_empty();
        let mut base = 0;
        for slot in slots(ram) {
            // Again each time: what the balloon has mapped anew is not watched yet.
            self.register(&slot)?;
            for range in scan::written(pagemap, &slot.host_range())? {
                let range = base + range.start..base + range.end;
                if let Some(own) = &mut own {
                    own.insert(range.clone());
                }
                changed.insert(range);
            }
            let guest = slot.guest_range();
            for range in recent.within(&guest) {
                changed.insert(base + range.start - guest.start..base + range.end - guest.start);
            }
            base += slot.len;
        }
        Ok(Taken {
            changed: self.has_base.then_some(changed),
            own,
            zeroed,
            resets,
        })
    }

    /// Something was found and is not known any more: the next snapshot has nothing to build on.
    fn lose(&mut self) {
        self.has_base = false;
        self.pending = RangeSet::default();
        self.pending_zeroed = false;
        self.own = None;
    }

    /// RAM is the template's again. A snapshot that is still being written is nothing to build on.
    pub fn forget(&mut self) {
        self.resets = self.resets.wrapping_add(1);
        self.lose();
    }

    /// Says what became of the snapshot.
    pub fn finish(&mut self, taken: Taken, worked: bool) {
        if taken.resets != self.resets {
            return;
        }
        match (taken.changed, worked) {
            (_, true) => self.has_base = matches!(self.watch, Watch::On { .. }),
            (Some(ranges), false) => {
                ranges.iter().for_each(|range| self.pending.insert(range));
                self.pending_zeroed |= taken.zeroed;
            }
            // There is still nothing to build on.
            (None, false) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::allocate;
    use super::super::discard::GuestPages;
    use super::super::template::{TemplatePages, go_back, map_file};
    use super::*;

    const PAGE: u64 = 4096;

    fn pages(changes: &mut Changes, ram: &GuestRam, worked: bool) -> Option<Vec<(u64, u64)>> {
        let taken = changes.take(ram, None).unwrap();
        let found = taken.ranges().map(|ranges| {
            let in_pages = |range: Range<u64>| (range.start / PAGE, range.end / PAGE);
            ranges.iter().map(in_pages).collect()
        });
        changes.finish(taken, worked);
        found
    }

    fn is_possible() -> bool {
        Userfault::for_writes().is_ok()
    }

    #[test]
    fn an_increment_is_what_was_written_since_the_last() {
        if !is_possible() {
            eprintln!("skipped: this kernel has no asynchronous write protection");
            return;
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 4 << 20], 0).unwrap();
        let zeroed = Zeroed::default();
        for ram in [map_file(&file, 64).unwrap(), allocate(64).unwrap()] {
            let mut changes = Changes::new(zeroed.clone());
            let write = |page: u64| ram.write_obj(7u8, GuestAddress(page * PAGE)).unwrap();
            let read = |page: u64| ram.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
            write(5);
            assert_eq!(
                pages(&mut changes, &ram, true),
                None,
                "the first has no base"
            );
            assert_eq!(pages(&mut changes, &ram, true), Some(vec![]));
            write(5);
            write(9000);
            read(77);
            read(10000);
            let expected = Some(vec![(5, 6), (9000, 9001)]);
            assert_eq!(pages(&mut changes, &ram, false), expected);
            write(6);
            changes.look_ahead(&ram, false).unwrap();
            let expected = Some(vec![(5, 7), (9000, 9001)]);
            assert_eq!(pages(&mut changes, &ram, true), expected, "nothing is lost");
            read(5);
            assert_eq!(pages(&mut changes, &ram, true), Some(vec![]));
        }
    }

    #[test]
    fn a_snapshot_that_was_under_way_at_a_reset_is_no_base() {
        if !is_possible() {
            return;
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        let ram = map_file(&file, 32).unwrap();
        let zeroed = Zeroed::default();
        let mut changes = Changes::new(zeroed.clone());
        ram.write_obj(1u8, GuestAddress(0x4000)).unwrap();
        let taken = changes.take(&ram, None).unwrap();
        go_back(&ram, &file, &zeroed, None).unwrap();
        changes.forget();
        changes.finish(taken, true);
        // Page 4 has changed since that snapshot, and no scan would tell.
        assert_eq!(pages(&mut changes, &ram, true), None);
        let taken = changes.take(&ram, None).unwrap();
        changes.forget();
        changes.finish(taken, false);
        assert_eq!(pages(&mut changes, &ram, true), None);
    }

    #[test]
    fn a_guest_that_gives_back_every_other_page_costs_no_mapping_for_each() {
        let ram = allocate(64).unwrap();
        let Ok(faults) = Faults::begin(&ram, true) else {
            eprintln!("skipped: no rights to /dev/userfaultfd");
            return;
        };
        let zeroed = Zeroed::default();
        for number in 0..8000 {
            zeroed.insert(number * 2 * PAGE..(number * 2 + 1) * PAGE);
        }
        let mut changes = Changes::beside(zeroed, &faults).unwrap();
        changes.watch(&ram).unwrap();
        let here = slots(&ram)[0].host_range();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().filter_map(|line| line.split('-').next());
        let starts = starts.filter_map(|start| u64::from_str_radix(start, 16).ok());
        assert!(starts.filter(|start| here.contains(start)).count() < 100);
    }

    #[test]
    fn what_the_balloon_took_has_changed() {
        if !is_possible() {
            return;
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(&[1; 1 << 20], 0).unwrap();
        let ram = map_file(&file, 32).unwrap();
        let zeroed = Zeroed::default();
        let mut changes = Changes::new(zeroed.clone());
        let mut balloon = TemplatePages::new(zeroed);
        assert_eq!(pages(&mut changes, &ram, true), None);
        balloon.discard(&ram, 0x3000..0x5000).unwrap();
        assert_eq!(pages(&mut changes, &ram, true), Some(vec![(3, 5)]));
        assert_eq!(pages(&mut changes, &ram, true), Some(vec![]));
        ram.write_obj(1u8, GuestAddress(0x4000)).unwrap();
        assert_eq!(pages(&mut changes, &ram, true), Some(vec![(4, 5)]));
        balloon.discard(&ram, 0x4000..0x5000).unwrap();
        assert_eq!(pages(&mut changes, &ram, true), Some(vec![(4, 5)]));
        // It is not there, and still is not when it could not be saved.
        balloon.discard(&ram, 0x6000..0x7000).unwrap();
        for (is_there, worked) in [(false, false), (false, true), (true, true)] {
            let taken = changes.take(&ram, None).unwrap();
            assert_eq!(taken.is_there(), is_there);
            changes.finish(taken, worked);
        }
    }
}
