//! Which pages that did not change an increment stores again, so that images of long chains do not fall apart.
//!
//! An increment's chunk loses its pages one by one to later increments, and what is left of it is still read,
//! decompressed and verified as a whole. After hundreds of increments an image would consist of thousands of
//! chunks that are needed for a page or two. So each increment gathers what is left of some of them into common chunks.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;

use crate::PAGE;
use crate::cut::{REGION_PAGES, joined};
use crate::manifest::Extent;
use crate::source::Source;

/// So many chunks at the least of which little is used go into common ones.
const MANY: usize = 8;
/// What is stored again at the most: one part of so many of what has changed,
const SHARE: u64 = 3;
/// or so many pages if that is more,
const LEAST: u64 = 32;
/// and never more than these, which are held in memory: 16 MiB.
const MOST: u64 = 4096;

/// Pages in rising order that are to be stored again, of those that `kept` extents (in rising order) have: those of
/// chunks of which a quarter of a slot or less is used, from the regions that have most of these chunks for their pages.
pub(crate) fn to_renew(kept: &[Extent], slot_pages: u64, changed: u64) -> Vec<Range<u64>> {
    let little = (slot_pages / 4).max(1);
    let mut regions = Vec::new();
    for region in kept.chunk_by(|a, b| a.page / REGION_PAGES == b.page / REGION_PAGES) {
        let mut used: HashMap<u32, u64> = HashMap::new();
        for extent in region {
            *used.entry(extent.chunk).or_default() += u64::from(extent.pages);
        }
        let rests = used.into_iter().filter(|(_, pages)| *pages <= little);
        let mut rests: Vec<(u64, u32)> = rests.map(|(chunk, pages)| (pages, chunk)).collect();
        if rests.len() >= MANY {
            rests.sort_unstable();
            let pages: u64 = rests.iter().map(|(pages, _)| pages).sum();
            let price = pages.saturating_mul(1000) / rests.len().max(1) as u64;
            regions.push((price, region, rests));
        }
    }
    // By pages for each chunk.
    regions.sort_by_key(|(price, _, _)| *price);
    let mut room = (changed / SHARE).clamp(LEAST, MOST);
    let mut again = Vec::new();
    for (_, region, rests) in regions {
        let mut taken = HashSet::new();
        let mut left = room;
        for (pages, chunk) in rests {
            let Some(less) = left.checked_sub(pages) else {
                break;
            };
            left = less;
            taken.insert(chunk);
        }
        if taken.len() < MANY {
            continue;
        }
        room = left;
        let extents = region.iter().filter(|extent| taken.contains(&extent.chunk));
        again.extend(extents.map(|extent| extent.page..extent.end()));
    }
    joined(again)
}

/// A source, but for pages that are here.
pub(crate) struct Renewed<'a, S: ?Sized> {
    source: &'a S,
    /// In bytes, at multiples of a page, in rising order, not touching.
    ranges: Vec<(Range<u64>, Vec<u8>)>,
}

impl<'a, S: Source + ?Sized> Renewed<'a, S> {
    /// `ranges` are of bytes, at multiples of a page, in rising order, not touching.
    pub(crate) const fn new(source: &'a S, ranges: Vec<(Range<u64>, Vec<u8>)>) -> Self {
        Self { source, ranges }
    }

    /// The first that ends behind there.
    fn from(&self, offset: u64) -> Option<&(Range<u64>, Vec<u8>)> {
        let at = self
            .ranges
            .partition_point(|(range, _)| range.end <= offset);
        self.ranges.get(at)
    }
}

impl<S: Source + ?Sized> Source for Renewed<'_, S> {
    fn length(&self) -> u64 {
        self.source.length()
    }

    /// Never of both kinds.
    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        let Some((here, _)) = self.from(from) else {
            return self.source.next_data(from);
        };
        if here.start <= from {
            return Ok(Some(from..here.end));
        }
        let data = self.source.next_data(from)?;
        let before = data.filter(|data| data.start < here.start);
        Ok(Some(before.map_or(here.clone(), |data| {
            data.start..data.end.min(here.start)
        })))
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match self.from(offset) {
            Some((here, content)) if here.start <= offset => {
                let from = usize::try_from(offset - here.start).unwrap_or(usize::MAX);
                let wanted = content.get(from..).and_then(|rest| rest.get(..bytes.len()));
                bytes.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            _ => self.source.read(bytes, offset),
        }
    }
}

/// Of ranges of pages those that lie before a length in bytes with all of their pages, in bytes.
pub(crate) fn whole(ranges: Vec<Range<u64>>, length: u64) -> impl Iterator<Item = Range<u64>> {
    let bytes = ranges
        .into_iter()
        .map(|range| range.start.saturating_mul(PAGE)..range.end.saturating_mul(PAGE));
    bytes.filter(move |range| range.end <= length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(page: u64, chunk: u32) -> Extent {
        Extent {
            page,
            pages: 1,
            chunk,
            chunk_page: 0,
        }
    }

    #[test]
    fn regions_of_many_small_rests_come_first_and_no_more_than_a_share_is_taken() {
        // The first region has 10 chunks of one page, the second 10 of two, the third is well.
        let mut kept: Vec<Extent> = (0..10).map(|n| one(n * 3, n as u32)).collect();
        kept.extend((0..20).map(|n| one(256 + n * 3, 20 + n as u32 / 2)));
        kept.push(Extent {
            page: 512,
            pages: 16,
            chunk: 50,
            chunk_page: 0,
        });
        kept.extend((0..7).map(|n| one(600 + n, 60 + n as u32)));
        let taken = |kept: &[Extent], slot_pages, changed| -> Vec<(u64, u64)> {
            let ranges = to_renew(kept, slot_pages, changed).into_iter();
            ranges.map(|range| (range.start, range.end)).collect()
        };
        let all: u64 = taken(&kept, 16, 0)
            .iter()
            .map(|(start, end)| end - start)
            .sum();
        assert_eq!(all, 10 + 20);
        let mut many: Vec<Extent> = (0..256).map(|n| one(n, n as u32 / 4)).collect();
        assert_eq!(taken(&many, 16, 0), [(0, 32)], "as much as may be taken");
        assert_eq!(taken(&many, 16, 768), [(0, 256)]);
        assert_eq!(taken(&many, 12, 768), [], "too much is used of each");
        many.extend((0..10).map(|n| one(256 + n, 100 + n as u32)));
        assert_eq!(taken(&many, 16, 0), [(256, 266)], "the worst first");
        assert_eq!(taken(&many, 16, 126), [(0, 32), (256, 266)]);
    }

    proptest! {
        /// Pages that are here and those of a source with holes come out as what they are.
        #[test]
        fn what_is_read_is_of_the_one_or_the_other(kinds in proptest::collection::vec(0..3_u8, 1..40)) {
            let page = PAGE as usize;
            let source: Vec<u8> = kinds.iter().flat_map(|kind| vec![u8::from(*kind == 1); page]).collect();
            let holes = Holes(&source, &kinds);
            let pages = kinds.iter().enumerate().filter(|(_, kind)| **kind == 2);
            let pages = joined(pages.map(|(at, _)| at as u64..at as u64 + 1).collect());
            let ranges = whole(pages, source.len() as u64).map(|range| {
                let bytes = vec![2; (range.end - range.start) as usize];
                (range, bytes)
            });
            let both = Renewed::new(&holes, ranges.collect());
            let mut found = vec![0; source.len()];
            let mut at = 0;
            while let Some(data) = both.next_data(at).unwrap() {
                prop_assert!(data.start >= at && data.start < data.end);
                let into = &mut found[data.start as usize..data.end as usize];
                both.read(into, data.start).unwrap();
                prop_assert!(into.iter().all(|byte| *byte == into[0]), "of one kind");
                at = data.end;
            }
            let expected: Vec<u8> = kinds.iter().flat_map(|kind| vec![*kind; page]).collect();
            prop_assert!(found == expected);
        }
    }

    struct Holes<'a>(&'a [u8], &'a [u8]);

    impl Source for Holes<'_> {
        fn length(&self) -> u64 {
            self.0.len() as u64
        }

        fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
            let first = (from / PAGE) as usize;
            let data = (first..self.1.len()).find(|at| self.1[*at] == 1);
            Ok(data.map(|at| {
                let end = (at..self.1.len()).find(|at| self.1[*at] != 1);
                from.max(at as u64 * PAGE)..end.unwrap_or(self.1.len()) as u64 * PAGE
            }))
        }

        fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read(bytes, offset)
        }
    }
}
