//! Which clusters a layer has: one bit each, by pages of the map; pages without any take no memory.
use crate::format::{PAGE_CLUSTERS, PAGE_WORDS};

type Page = Box<[u64; PAGE_WORDS]>;

/// A layer's bitmap.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bitmap {
    pages: Vec<Option<Page>>,
}

impl Bitmap {
    /// Of a layer whose map has `pages` pages; no cluster is there.
    pub(crate) fn new(pages: u32) -> Self {
        Self {
            pages: (0..pages).map(|_| None).collect(),
        }
    }

    pub(crate) fn page(&self, index: u32) -> Option<&[u64; PAGE_WORDS]> {
        self.pages.get(index as usize)?.as_deref()
    }

    pub(crate) fn set_page(&mut self, index: u32, words: Page) {
        if let Some(page) = self.pages.get_mut(index as usize) {
            *page = words.iter().any(|word| *word != 0).then_some(words);
        }
    }

    pub(crate) fn has(&self, cluster: u64) -> bool {
        let (page, bit) = place(cluster);
        let word = self.pages.get(page).and_then(Option::as_deref);
        let word = word.and_then(|words| words.get(bit / 64));
        word.is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    /// The layer has these from now on. Tells which pages of the map that changes.
    pub(crate) fn set(&mut self, first: u64, count: u64, mut changed: impl FnMut(u32)) {
        let (mut at, end) = (first, first.saturating_add(count));
        while at < end {
            let (index, bit) = place(at);
            let here = (end - at).min((PAGE_CLUSTERS as usize - bit) as u64);
            let Some(page) = self.pages.get_mut(index) else {
                return;
            };
            let words = page.get_or_insert_with(|| Box::new([0; PAGE_WORDS]));
            if set_bits(words, bit, here as usize) {
                changed(index as u32);
            }
            at += here;
        }
    }

    /// All runs of clusters that are there, in order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let pages = self.pages.iter().zip(0u64..);
        pages.flat_map(|(page, index)| {
            let first = index * PAGE_CLUSTERS;
            let words = page.as_deref().map_or(&[][..], |words| &words[..]);
            Runs { words, bit: 0 }.map(move |(bit, count)| (first + bit, count))
        })
    }
}

/// Page and bit in it.
fn place(cluster: u64) -> (usize, usize) {
    let page = usize::try_from(cluster / PAGE_CLUSTERS).unwrap_or(usize::MAX);
    (page, (cluster % PAGE_CLUSTERS) as usize)
}

/// True if a bit was not set before.
fn set_bits(words: &mut [u64; PAGE_WORDS], first: usize, count: usize) -> bool {
    let (mut bit, end) = (first, first + count);
    let mut changed = false;
    while bit < end {
        let (word, low) = (bit / 64, bit % 64);
        let here = (64 - low).min(end - bit);
        let mask = (u64::MAX >> (64 - here)) << low;
        if let Some(word) = words.get_mut(word) {
            changed |= *word & mask != mask;
            *word |= mask;
        }
        bit += here;
    }
    changed
}

/// Runs of set bits of one page.
struct Runs<'a> {
    words: &'a [u64],
    bit: u64,
}

impl Runs<'_> {
    /// The first bit from `self.bit` on that is `wanted`, or the end.
    fn next_bit(&self, wanted: bool) -> u64 {
        let end = self.words.len() as u64 * 64;
        let mut bit = self.bit;
        while let Some(word) = self.words.get((bit / 64) as usize) {
            let word = if wanted { *word } else { !*word };
            let rest = word >> (bit % 64);
            if rest != 0 {
                return (bit + u64::from(rest.trailing_zeros())).min(end);
            }
            bit = (bit / 64 + 1) * 64;
        }
        end
    }
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        self.bit = self.next_bit(true);
        let first = self.bit;
        self.bit = self.next_bit(false);
        (self.bit > first).then_some((first, self.bit - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set_of_numbers(
            sets in prop::collection::vec((0u64..70_000, 0u64..40_000), 0..6),
            probes in prop::collection::vec(0u64..96_000, 20),
        ) {
            let mut map = Bitmap::new(3);
            let mut model = vec![false; 3 * PAGE_CLUSTERS as usize];
            for (first, count) in sets {
                let end = (first + count).min(96_000);
                let mut pages = Vec::new();
                map.set(first, end - first, |page| pages.push(page));
                for page in 0..3u64 {
                    let range = page * PAGE_CLUSTERS..(page + 1) * PAGE_CLUSTERS;
                    let new = range.clone().any(|c| (first..end).contains(&c) && !model[c as usize]);
                    prop_assert_eq!(new, pages.contains(&(page as u32)));
                }
                model[first as usize..end as usize].fill(true);
            }
            for probe in probes {
                prop_assert_eq!(map.has(probe), model[probe as usize]);
            }
            let mut seen = vec![false; model.len()];
            for (first, count) in map.runs() {
                prop_assert!(count > 0);
                seen[first as usize..(first + count) as usize].fill(true);
            }
            prop_assert!(seen == model);
        }
    }
}
