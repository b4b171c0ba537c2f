//! Which pages go into which chunk. Pure.
//!
//! A region is cut alone, so that equal regions make equal chunks. In it, a slot (a run of pages at a
//! multiple of the slot size) that is mostly there becomes a chunk of its own: found again wherever it is
//! unchanged. Pages of slots with few pages are gathered, in order, into common chunks: so that scattered
//! changes cost what they are, and not a slot each.

use std::ops::Range;

use crate::manifest::Extent;

/// Pages of a region: what is cut at once.
pub(crate) const REGION_PAGES: u64 = 256;

/// The numbers of the pages of each chunk, for the pages of one region that are to be stored (in rising order).
pub(crate) fn chunks_of(pages: &[u64], slot_pages: u64) -> Vec<Vec<u64>> {
    let mut chunks = Vec::new();
    let mut gathered = Vec::new();
    for slot in pages.chunk_by(|a, b| a / slot_pages == b / slot_pages) {
        if slot.len() as u64 * 4 >= slot_pages * 3 {
            chunks.push(slot.to_vec());
        } else {
            gathered.extend_from_slice(slot);
        }
    }
    let most = usize::try_from(slot_pages).unwrap_or(usize::MAX).max(1);
    chunks.extend(gathered.chunks(most).map(<[u64]>::to_vec));
    chunks
}

/// The extents of a chunk that has these pages, one after another.
pub(crate) fn extents_of(pages: &[u64], chunk: u32) -> impl Iterator<Item = Extent> + '_ {
    let mut chunk_page = 0;
    pages
        .chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .filter_map(move |run| {
            let pages = u32::try_from(run.len()).ok()?;
            let extent = Extent {
                page: *run.first()?,
                pages,
                chunk,
                chunk_page,
            };
            chunk_page = chunk_page.checked_add(pages)?;
            Some(extent)
        })
}

/// Ranges in rising order, without overlap, empty or touching ones.
pub(crate) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut done: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match done.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => done.push(range),
        }
    }
    done
}

/// Whether all bytes are zero; eight at a time, which compilers turn into vectors.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|byte| *byte == 0)
        && blocks
            .iter()
            .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn full_slots_stand_alone_and_stray_pages_are_gathered() {
        let pages: Vec<u64> = (0..16).chain([20, 40, 41]).chain(64..79).collect();
        let chunks = chunks_of(&pages, 16);
        assert_eq!(chunks.len(), 3);
        assert_eq!(chunks[0], (0..16).collect::<Vec<_>>());
        assert_eq!(chunks[1], (64..79).collect::<Vec<_>>());
        assert_eq!(chunks[2], [20, 40, 41]);
        let extents: Vec<_> = extents_of(&chunks[2], 9).collect();
        assert_eq!(extents.len(), 2);
        assert_eq!(
            (extents[1].page, extents[1].pages, extents[1].chunk_page),
            (40, 2, 1)
        );
    }

    proptest! {
        #[test]
        fn every_page_is_in_one_chunk_and_none_is_too_long(
            set in proptest::collection::btree_set(0..256_u64, 0..256), slot in prop::sample::select(vec![4_u64, 16, 64]),
        ) {
            let pages: Vec<u64> = set.iter().copied().collect();
            let chunks = chunks_of(&pages, slot);
            prop_assert!(chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() as u64 <= slot));
            let mut all: Vec<u64> = chunks.concat();
            all.sort_unstable();
            prop_assert_eq!(all, pages);
        }

        #[test]
        fn zero_means_every_byte(length in 0..300_usize, at in any::<usize>()) {
            let mut bytes = vec![0; length];
            prop_assert!(is_zero(&bytes));
            if length > 0 {
                bytes[at % length] = 1;
                prop_assert!(!is_zero(&bytes));
            }
        }
    }
}
