//! The one map that is asked at every request: which layer has a cluster.
use std::ops::Range;

/// Clusters of one part of the map: 4 KB of memory for 15.6 MiB of disk that a layer has anything of.
const CHUNK: usize = 4000;

/// 0: no layer has it, it is the base's. n: layer n, counted from 1, the lowest.
pub(crate) type Owner = u8;

/// By cluster, the highest layer that has it.
#[derive(Clone, Debug)]
pub(crate) struct Owners {
    clusters: u64,
    chunks: Vec<Option<Box<[Owner; CHUNK]>>>,
}

impl Owners {
    /// All clusters are the base's.
    pub(crate) fn new(clusters: u64) -> Self {
        let chunks = clusters.div_ceil(CHUNK as u64);
        Self {
            clusters,
            chunks: (0..chunks).map(|_| None).collect(),
        }
    }

    pub(crate) fn clusters(&self) -> u64 {
        self.clusters
    }

    pub(crate) fn get(&self, cluster: u64) -> Owner {
        let (chunk, at) = place(cluster);
        let chunk = self.chunks.get(chunk).and_then(Option::as_deref);
        chunk.and_then(|chunk| chunk.get(at)).copied().unwrap_or(0)
    }

    /// How many clusters from `first` on have the same owner, up to `end`.
    pub(crate) fn run(&self, first: u64, end: u64) -> (Owner, u64) {
        let owner = self.get(first);
        let mut at = first;
        while at < end {
            let (chunk, from) = place(at);
            let rest = ((CHUNK - from) as u64).min(end - at);
            let same = match self.chunks.get(chunk).and_then(Option::as_deref) {
                None if owner == 0 => rest,
                None => 0,
                Some(chunk) => {
                    let part = chunk.get(from..from + rest as usize).unwrap_or_default();
                    let other = part.iter().position(|other| *other != owner);
                    other.map_or(rest, |count| count as u64)
                }
            };
            at += same;
            if same < rest {
                break;
            }
        }
        (owner, at - first)
    }

    /// Makes `owner` the one of all of `clusters`.
    pub(crate) fn set(&mut self, clusters: Range<u64>, owner: Owner) {
        let (mut at, end) = (clusters.start, clusters.end.min(self.clusters));
        while at < end {
            let (chunk, from) = place(at);
            let count = ((CHUNK - from) as u64).min(end - at);
            let Some(chunk) = self.chunks.get_mut(chunk) else {
                return;
            };
            let chunk = chunk.get_or_insert_with(|| Box::new([0; CHUNK]));
            if let Some(part) = chunk.get_mut(from..from + count as usize) {
                part.fill(owner);
            }
            at += count;
        }
    }

    /// Gives every owner another number; the base's stay the base's.
    pub(crate) fn rename(&mut self, new: impl Fn(Owner) -> Owner) {
        for owner in self.chunks.iter_mut().flatten().flat_map(|c| c.iter_mut()) {
            if *owner != 0 {
                *owner = new(*owner);
            }
        }
    }
}

fn place(cluster: u64) -> (usize, usize) {
    let chunk = usize::try_from(cluster / CHUNK as u64).unwrap_or(usize::MAX);
    (chunk, (cluster % CHUNK as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_an_array(
            sets in prop::collection::vec((0u64..12_000, 0u64..9_000, 0u8..9), 0..8),
            first in 0u64..12_000,
            len in 0u64..12_000,
        ) {
            let mut owners = Owners::new(12_345);
            let mut model = vec![0u8; 12_345];
            for (first, count, owner) in sets {
                let end = (first + count).min(12_345);
                owners.set(first..end, owner);
                model[first as usize..end as usize].fill(owner);
            }
            let end = (first + len).min(12_345);
            let (owner, count) = owners.run(first, end);
            let wanted = model[first as usize..end as usize]
                .iter()
                .take_while(|o| **o == model[first as usize])
                .count();
            prop_assert_eq!((owner, count), (model[first as usize], wanted as u64));
            owners.rename(|owner| owner / 2 + 1);
            for (cluster, old) in (0u64..).zip(model) {
                let new = if old == 0 { 0 } else { old / 2 + 1 };
                prop_assert_eq!(owners.get(cluster), new);
            }
        }
    }
}
