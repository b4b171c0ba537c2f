//! Writing guest RAM to a file: the regions one behind the other, with holes where nothing is
//! written.
use std::fs::File;
use std::io;
use std::ops::Range;

use super::handled::bring_in;
use super::ranges::RangeSet;
use super::room::Room;
use super::{GuestRam, Slot, scan, slots};

const PAGE: usize = 4096;
/// Most bytes of one write, so that a full disk is noticed early.
const WRITE: usize = 16 << 20;

/// Which pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All that are not zero.
    Full,
    /// Those that may differ from the memory file the guest was loaded from (from zeros, if it was booted), or
    /// of these only those that have changed since the last snapshot. Zero or not.
    Diff,
}

/// What RAM is made of.
pub struct Contents<'a> {
    pub ram: &'a GuestRam,
    /// What it is a private view of, if it is one.
    pub template: Option<&'a File>,
    /// Guest-physical ranges that became zero behind the guest's back.
    pub zeroed: &'a RangeSet,
    /// For [`Extent::Diff`]: offsets in the memory file that alone have changed since it was last written, if
    /// that is known.
    pub changed: Option<&'a RangeSet>,
    /// Offsets in the memory file outside of which no page is the guest's own, if that is known.
    pub own: Option<&'a RangeSet>,
}

/// What will be written. Its parts lie in RAM, which lives as long as the process.
pub struct Plan {
    parts: Vec<Part>,
    extent: Extent,
    len: u64,
}

/// Of one region.
struct Part {
    slot: Slot,
    /// Its offset in the memory file.
    base: u64,
    /// As offsets in the region, in ascending order.
    ranges: Vec<Range<u64>>,
}

/// What was in RAM when it was copied.
pub struct Copied {
    bytes: Room,
    /// Where they go in the file, and how many, one behind the other.
    pieces: Vec<(u64, usize)>,
    len: u64,
}

impl Copied {
    /// As [`Plan::write`] would have at that moment.
    pub fn write(&self, out: &File) -> io::Result<u64> {
        out.set_len(self.len)?;
        let mut rest = self.bytes.bytes();
        let mut written = 0;
        for (offset, len) in &self.pieces {
            let (piece, others) = rest
                .split_at_checked(*len)
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            put(out, piece, *offset)?;
            written += piece.len() as u64;
            rest = others;
        }
        Ok(written)
    }
}

/// Writes RAM to `out`, an empty file, and returns the number of bytes that are no holes. Nobody
/// may write to RAM meanwhile: vCPUs are paused and devices drained.
pub fn write(contents: &Contents<'_>, extent: Extent, out: &File) -> io::Result<u64> {
    plan(contents, extent)?.write(out)
}

/// Finds out what there is to write.
pub fn plan(contents: &Contents<'_>, extent: Extent) -> io::Result<Plan> {
    let mut parts = Vec::new();
    let mut base = 0;
    for slot in slots(contents.ram) {
        let ranges = match (extent, contents.changed) {
            (Extent::Diff, Some(changed)) => changed
                .within(&(base..base + slot.len))
                .map(|range| range.start - base..range.end - base)
                .collect(),
            _ => ranges(contents, extent, &slot, base)?.iter().collect(),
        };
        parts.push(Part { slot, base, ranges });
        base += slot.len;
    }
    Ok(Plan {
        parts,
        extent,
        len: base,
    })
}

impl Plan {
    /// As [`write`], in this process or in a child that has a copy of its memory: computes and makes system
    /// calls only.
    pub fn write(&self, out: &File) -> io::Result<u64> {
        out.set_len(self.len)?;
        let mut written = 0;
        for Part { slot, base, ranges } in &self.parts {
            for range in ranges {
                written += write_range(slot, range, self.extent, *base, out)?;
            }
        }
        Ok(written)
    }

    /// Copies what is to be written, if all of it is (see [`Extent::Diff`]) and `room` is large enough. Nobody may
    /// write to RAM meanwhile.
    pub fn copy(&self, room: Room) -> Option<Copied> {
        let mut to = room;
        let mut pieces = Vec::new();
        if self.extent != Extent::Diff || self.bytes() > to.free() {
            return None;
        }
        for Part { slot, base, ranges } in &self.parts {
            for range in ranges {
                // SAFETY: as in `write_range`.
                let bytes = unsafe { bytes(slot, range) };
                to.push(bytes)?;
                pieces.push((base + range.start, bytes.len()));
            }
        }
        Some(Copied {
            bytes: to,
            pieces,
            len: self.len,
        })
    }

    /// Whether the kernel can give all that is to be written. Otherwise whoever touches it, and does not have it
    /// written by a system call, is ended.
    pub fn can_be_had(&self) -> bool {
        let mut parts = self.parts.iter();
        parts.all(|Part { slot, ranges, .. }| {
            let mut ranges = ranges.iter();
            ranges.all(|range| bring_in(slot, range.clone()).is_ok())
        })
    }

    fn bytes(&self) -> u64 {
        let ranges = self.parts.iter().flat_map(|part| &part.ranges);
        ranges.map(|range| range.end - range.start).sum()
    }
}

/// The parts of a region to look at, as offsets in it.
fn ranges(contents: &Contents<'_>, extent: Extent, slot: &Slot, base: u64) -> io::Result<RangeSet> {
    let host = slot.host_start as usize..(slot.host_start + slot.len) as usize;
    let own: Vec<Range<u64>> = match contents.own {
        Some(own) => own
            .within(&(base..base + slot.len))
            .map(|range| range.start - base..range.end - base)
            .collect(),
        None => scan::private_pages(&host)?
            .into_iter()
            .map(|range| range.start as u64..range.end as u64)
            .collect(),
    };
    let here = slot.guest_start..slot.guest_start + slot.len;
    let zeroed = contents.zeroed.within(&here);
    let zeroed = zeroed.map(|range| range.start - here.start..range.end - here.start);
    let mut wanted = RangeSet::default();
    match (extent, contents.template) {
        (Extent::Diff, _) => zeroed.for_each(|range| wanted.insert(range)),
        (Extent::Full, None) => {}
        (Extent::Full, Some(template)) => {
            wanted = data(template, base, slot.len)?;
            zeroed.for_each(|range| wanted.remove(range));
        }
    }
    own.into_iter().for_each(|range| wanted.insert(range));
    Ok(wanted)
}

/// The parts of `len` bytes from `base` of a file that are no holes, in whole pages.
fn data(file: &File, base: u64, len: u64) -> io::Result<RangeSet> {
    use rustix::fs::{SeekFrom, seek};
    let mut found = RangeSet::default();
    let end = base + len;
    let mut at = base;
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data follows.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = seek(file, SeekFrom::Hole(start))?;
        let page = PAGE as u64;
        let (start, stop) = (start / page * page, hole.next_multiple_of(page).min(end));
        if start >= end {
            break;
        }
        found.insert(start - base..stop - base);
        at = stop.max(start + page);
    }
    Ok(found)
}

/// # Safety
/// Nobody writes to this part of RAM while what is returned is used.
unsafe fn bytes<'a>(slot: &Slot, range: &Range<u64>) -> &'a [u8] {
    let host = (slot.host_start + range.start) as *const u8;
    let len = (range.end - range.start) as usize;
    // SAFETY: the range lies in a region of guest RAM, which is mapped for the life of the process.
    unsafe { std::slice::from_raw_parts(host, len) }
}

fn write_range(
    slot: &Slot,
    range: &Range<u64>,
    extent: Extent,
    base: u64,
    out: &File,
) -> io::Result<u64> {
    // SAFETY: nobody writes to RAM during this call (see `write`).
    let bytes = unsafe { bytes(slot, range) };
    let offset = base + range.start;
    if extent == Extent::Diff {
        put(out, bytes, offset)?;
        return Ok(bytes.len() as u64);
    }
    let mut written = 0;
    let mut run = 0..0;
    for (page, at) in bytes.chunks(PAGE).zip((0..).step_by(PAGE)) {
        if is_zero(page) {
            written += put_run(out, bytes, &run, offset)?;
            run = at + page.len()..at + page.len();
        } else {
            run.end = at + page.len();
        }
    }
    written += put_run(out, bytes, &run, offset)?;
    Ok(written)
}

fn put_run(out: &File, bytes: &[u8], run: &Range<usize>, offset: u64) -> io::Result<u64> {
    let part = bytes.get(run.clone()).unwrap_or_default();
    put(out, part, offset + run.start as u64)?;
    Ok(part.len() as u64)
}

fn put(out: &File, bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    for part in bytes.chunks(WRITE) {
        out.write_all_at(part, offset)?;
        offset += part.len() as u64;
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<64>();
    // Whole blocks first, which the compiler makes wide compares of; most pages end at the first.
    words
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::allocate;
    use super::super::changes::Changes;
    use super::super::discard::{AnonymousPages, GuestPages};
    use super::super::template::{TemplatePages, Zeroed, map_file};
    use super::*;

    const MIB: u64 = 32;
    const LEN: usize = (MIB << 20) as usize;

    fn dump(ram: &GuestRam, template: Option<&File>, zeroed: &Zeroed, extent: Extent) -> File {
        let out = tempfile::tempfile().unwrap();
        let zeroed = &zeroed.get();
        let contents = Contents {
            ram,
            template,
            zeroed,
            changed: None,
            own: None,
        };
        write(&contents, extent, &out).unwrap();
        out
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut all = vec![0; LEN];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    fn ram_bytes(ram: &GuestRam) -> Vec<u8> {
        let mut all = vec![0; LEN];
        ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    }

    /// Copies what is no hole in `diff` over `base`.
    fn merge(base: &File, diff: &File) {
        let all = bytes(diff);
        for range in data(diff, 0, LEN as u64).unwrap().iter() {
            let part = &all[range.start as usize..range.end as usize];
            base.write_all_at(part, range.start).unwrap();
        }
    }

    #[test]
    fn a_full_file_has_holes_for_zeros() {
        let ram = allocate(MIB).unwrap();
        ram.write_obj(7u8, GuestAddress(5 << 20)).unwrap();
        ram.write_obj(0u8, GuestAddress(9 << 20)).unwrap();
        let out = dump(&ram, None, &Zeroed::default(), Extent::Full);
        assert_eq!(out.metadata().unwrap().len(), MIB << 20);
        assert!(out.metadata().unwrap().blocks() * 512 <= 64 << 10);
        assert!(bytes(&out) == ram_bytes(&ram));
    }

    /// What a guest does to its RAM.
    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u8),
        Discard(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let page = 0u64..64;
        let write = (page.clone(), any::<u8>()).prop_map(|(p, b)| Step::Write(p, b));
        let discard = (page, 1u64..8).prop_map(|(p, n)| Step::Discard(p, n));
        prop::collection::vec(prop_oneof![3 => write, 1 => discard], 0..30)
    }

    fn play(ram: &GuestRam, pages: &mut dyn GuestPages, steps: &[Step]) {
        // Every second page, so that runs have gaps.
        for step in steps {
            match *step {
                Step::Write(page, byte) => {
                    ram.write_obj(byte, GuestAddress(page * 8192 + 5)).unwrap();
                }
                Step::Discard(page, count) => {
                    pages
                        .discard(ram, page * 8192..(page + count) * 8192)
                        .unwrap();
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// Boot, snapshot, go on, diff; load, go on, snapshot, go on, diff: always RAM, byte for byte.
        #[test]
        fn files_are_ram_through_generations(a in steps(), b in steps(), c in steps(), d in steps()) {
            let zeroed = Zeroed::default();
            let hook = zeroed.clone();
            let mut pages = AnonymousPages::with_hook(Box::new(move |range| hook.insert(range)));
            let ram = allocate(MIB).unwrap();
            play(&ram, &mut pages, &a);
            let first = dump(&ram, None, &zeroed, Extent::Full);
            prop_assert!(bytes(&first) == ram_bytes(&ram));
            play(&ram, &mut pages, &b);
            merge(&first, &dump(&ram, None, &zeroed, Extent::Diff));
            prop_assert!(bytes(&first) == ram_bytes(&ram));

            let zeroed = Zeroed::default();
            let mut pages = TemplatePages::new(zeroed.clone());
            let ram = map_file(&first, MIB).unwrap();
            play(&ram, &mut pages, &c);
            let second = dump(&ram, Some(&first), &zeroed, Extent::Full);
            prop_assert!(bytes(&second) == ram_bytes(&ram));
            play(&ram, &mut pages, &d);
            merge(&second, &dump(&ram, Some(&first), &zeroed, Extent::Diff));
            prop_assert!(bytes(&second) == ram_bytes(&ram));
        }
    }

    proptest! {
        // Each case takes four snapshots.
        #![proptest_config(ProptestConfig::with_cases(4))]
        /// The same with changes watched, most of the work done while the guest still runs, and what is to be written
        /// copied: full, then what differs from the template, then what differs from that.
        #[test]
        fn what_was_looked_for_ahead_is_all_there_is(
            of_template in any::<bool>(),
            steps in prop::array::uniform8(steps()),
        ) {
            let [before, a, b, c, d, e, f, g] = steps;
            let template = tempfile::tempfile().unwrap();
            template.set_len(LEN as u64).unwrap();
            template.write_all_at(&[3; 1 << 18], 0).unwrap();
            let zeroed = Zeroed::default();
            let hook = zeroed.clone();
            let (ram, mut pages): (_, Box<dyn GuestPages>) = if of_template {
                (map_file(&template, MIB).unwrap(), Box::new(TemplatePages::new(zeroed.clone())))
            } else {
                let hook = Box::new(move |range| hook.insert(range));
                (allocate(MIB).unwrap(), Box::new(AnonymousPages::with_hook(hook)))
            };
            let template = of_template.then_some(&template);
            play(&ram, &mut *pages, &before);
            let mut changes = Changes::new(zeroed.clone());
            let mut take = |kind: Extent, since: bool, early: &[Step], late: &[Step]| {
                // Once, twice or never before the look that counts, and not always for the snapshot that follows.
                let (first, early) = early.split_at(early.len() / 2);
                play(&ram, &mut *pages, first);
                for number in 0..early.len() % 3 {
                    changes.look_early(&ram, since == (number == 0)).unwrap();
                }
                play(&ram, &mut *pages, early);
                // Reading makes pages, too.
                ram_bytes(&ram);
                let ahead = changes.look_ahead(&ram, !since).unwrap();
                let room = Room::of(1 << 20).unwrap();
                play(&ram, &mut *pages, late);
                let taken = changes.take(&ram, Some(ahead)).unwrap();
                let zeroed = zeroed.get();
                let plan = plan(
                    &Contents {
                        ram: &ram,
                        template,
                        zeroed: &zeroed,
                        changed: taken.ranges().filter(|_| since),
                        own: taken.own(),
                    },
                    kind,
                )
                .unwrap();
                let out = tempfile::tempfile().unwrap();
                match plan.copy(room) {
                    Some(copied) => {
                        assert_eq!(kind, Extent::Diff);
                        copied.write(&out).unwrap();
                    }
                    None => drop(plan.write(&out).unwrap()),
                }
                changes.finish(taken, true);
                (out, ram_bytes(&ram))
            };
            let (whole, now) = take(Extent::Full, false, &a, &b);
            prop_assert!(bytes(&whole) == now);
            let (increment, now) = take(Extent::Diff, true, &c, &d);
            merge(&whole, &increment);
            prop_assert!(bytes(&whole) == now);
            let (differs, now) = take(Extent::Diff, false, &e, &[]);
            let copy = tempfile::tempfile().unwrap();
            copy.write_all_at(&template.map_or_else(|| vec![0; LEN], bytes), 0).unwrap();
            merge(&copy, &differs);
            prop_assert!(bytes(&copy) == now);
            let (increment, now) = take(Extent::Diff, true, &f, &g);
            merge(&copy, &increment);
            prop_assert!(bytes(&copy) == now);
        }
    }
}
