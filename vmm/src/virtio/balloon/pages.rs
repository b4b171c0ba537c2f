//! Page frame numbers to ranges.
use std::ops::Range;

/// Page frames are 4 KiB whatever the guest's page size (virtio 1.2 §5.5.6).
pub(super) const PAGE_SHIFT: u32 = 12;

/// Most page frame numbers of one request. Linux sends 256, others a page of them.
pub(super) const MAX_PFNS: usize = 1024;

/// Sorts `pfns` and calls `run` for each range of guest-physical addresses they make up: in
/// any order and however often they name a page, neighbours cost one system call.
pub(super) fn runs(pfns: &mut [u32], mut run: impl FnMut(Range<u64>)) {
    pfns.sort_unstable();
    let mut current: Option<Range<u64>> = None;
    for pfn in pfns {
        let start = u64::from(*pfn) << PAGE_SHIFT;
        let end = start + (1 << PAGE_SHIFT);
        match &mut current {
            Some(range) if start <= range.end => range.end = end,
            _ => {
                if let Some(range) = current.replace(start..end) {
                    run(range);
                }
            }
        }
    }
    if let Some(range) = current {
        run(range);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn collect(mut pfns: Vec<u32>) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        runs(&mut pfns, |range| ranges.push(range));
        ranges
    }

    #[test]
    fn neighbours_merge_in_any_order() {
        assert_eq!(
            collect(vec![5, 4, 3, 3, 9]),
            [0x3000..0x6000, 0x9000..0xa000]
        );
        assert_eq!(collect(vec![]), []);
        let last = u64::from(u32::MAX) << PAGE_SHIFT;
        assert_eq!(collect(vec![u32::MAX, u32::MAX]).len(), 1);
        assert_eq!(
            collect(vec![u32::MAX]).first(),
            Some(&(last..last + 0x1000))
        );
    }

    proptest! {
        #[test]
        fn ranges_cover_exactly_the_pages(pfns in prop::collection::vec(0u32..64, 0..64)) {
            let pages: BTreeSet<u64> = pfns.iter().map(|pfn| u64::from(*pfn)).collect();
            let ranges = collect(pfns);
            let covered: Vec<u64> = ranges
                .iter()
                .flat_map(|r| (r.start >> PAGE_SHIFT)..(r.end >> PAGE_SHIFT))
                .collect();
            prop_assert_eq!(&covered, &pages.into_iter().collect::<Vec<_>>());
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
