//! Which pages the guests of a snapshot needed first: brought in early for the next one. A hint: a wrong one costs
//! time, not correctness.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use belljar_store::SnapshotId;

use super::first;

/// Pages that are remembered, at most: 64 KiB come with each, so that is 256 MiB.
const MOST: usize = 4096;
/// Pages that are expected to be needed again by guests of snapshots that were taken later.
pub(super) const EXPECTED: usize = 1024;
/// How the file begins; then a word for each page: its number times two, and one if it was written.
const MAGIC: &[u8; 8] = b"BJTOUCH1";

/// Pages in the order in which they were first touched, reads and writes apart.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Touched {
    order: Vec<(u64, bool)>,
    known: HashSet<u64>,
}

impl Touched {
    /// Remembers a page, the first time.
    pub(super) fn note(&mut self, page: u64, is_write: bool) {
        if self.order.len() < MOST && page <= u64::MAX >> 1 && self.known.insert(page) {
            self.order.push((page, is_write));
        }
    }

    /// Those that were read first, then those that were written: a guest that goes on reads before it writes.
    pub(super) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        let of = |written: bool| {
            self.order
                .iter()
                .filter(move |(_, write)| *write == written)
        };
        of(false).chain(of(true)).map(|(page, _)| *page)
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// All, in the order in which they were touched.
    pub(super) fn in_order(&self) -> impl Iterator<Item = u64> + '_ {
        self.order.iter().map(|(page, _)| *page)
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// These, and behind them what an earlier guest needed, as far as so many can be expected again: who was given
    /// a page before it was needed does not touch it in a way that is noticed, and what is not needed any more has to
    /// be forgotten at last.
    pub(super) fn followed_by(mut self, earlier: &Self) -> Self {
        for (page, is_write) in &earlier.order {
            if self.len() >= EXPECTED {
                break;
            }
            self.note(*page, *is_write);
        }
        self
    }

    fn encode(&self) -> Vec<u8> {
        let words = self.order.iter();
        let words = words.flat_map(|(page, write)| (page << 1 | u64::from(*write)).to_le_bytes());
        MAGIC.iter().copied().chain(words).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.strip_prefix(MAGIC)?.as_chunks::<8>() else {
            return None;
        };
        let mut touched = Self::default();
        for word in words {
            let word = u64::from_le_bytes(*word);
            touched.note(word >> 1, word & 1 == 1);
        }
        Some(touched)
    }

    /// Of an earlier guest; nothing if there is no good record.
    pub(super) fn load(folder: &Path, id: SnapshotId) -> Self {
        let bytes = std::fs::read(path(folder, id)).unwrap_or_default();
        Self::decode(&bytes).unwrap_or_default()
    }

    /// The first record of a snapshot stays.
    pub(super) fn save(&self, folder: &Path, id: SnapshotId) {
        let path = path(folder, id);
        if self.order.is_empty() || path.exists() {
            return;
        }
        let temporary = path.with_added_extension("new");
        // It is only not remembered.
        let _ = std::fs::write(&temporary, self.encode())
            .and_then(|()| std::fs::rename(temporary, path));
    }
}

/// Forgets a snapshot.
pub(super) fn remove(folder: &Path, id: SnapshotId) {
    let _ = std::fs::remove_file(path(folder, id));
    first::remove(folder, id);
}

/// Forgets all but these: a keeper may have ended before it forgot one that was removed.
pub(super) fn keep_only(folder: &Path, ids: &HashSet<SnapshotId>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let (id, rest) = name.split_once('.').unwrap_or((name, ""));
        let is_kept = id.parse().is_ok_and(|id| ids.contains(&id));
        if !is_kept || !["", "pages", "pages.ok"].contains(&rest) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn path(folder: &Path, id: SnapshotId) -> PathBuf {
    folder.join(id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_order_is_kept_with_the_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let id = SnapshotId([1; 16]);
        let mut touched = Touched::default();
        for (page, write) in [(9, true), (3, false), (9, false), (1, false)] {
            touched.note(page, write);
        }
        touched.save(folder.path(), id);
        let loaded = Touched::load(folder.path(), id);
        assert_eq!(loaded, touched);
        assert_eq!(loaded.pages().collect::<Vec<_>>(), [3, 1, 9]);
        remove(folder.path(), id);
        assert_eq!(Touched::load(folder.path(), id), Touched::default());
    }

    #[test]
    fn what_was_expected_follows_until_there_is_enough() {
        let of = |pages: std::ops::Range<u64>| {
            let mut touched = Touched::default();
            pages.for_each(|page| touched.note(page, page % 2 == 0));
            touched
        };
        let both = of(3..5).followed_by(&of(0..5));
        assert_eq!(both.in_order().collect::<Vec<_>>(), [3, 4, 0, 1, 2]);
        assert_eq!(both.pages().collect::<Vec<_>>(), [3, 1, 4, 0, 2]);
        let most = EXPECTED as u64;
        let both = of(0..most - 1).followed_by(&of(most..2 * most));
        assert_eq!(both.len(), EXPECTED);
        assert_eq!(both.in_order().last(), Some(most));
        // What was noticed is never forgotten for it.
        assert_eq!(of(0..2 * most).followed_by(&of(0..9)).len(), 2 * EXPECTED);
    }

    #[test]
    fn it_has_an_end() {
        let mut touched = Touched::default();
        (0..10_000).for_each(|page| touched.note(page, false));
        assert_eq!(touched.pages().count(), MOST);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let with = [MAGIC.as_slice(), &bytes].concat();
            if let Some(touched) = Touched::decode(&with) {
                prop_assert!(touched.pages().count() <= bytes.len() / 8);
            }
        }
    }

    #[test]
    fn what_no_snapshot_has_goes() {
        let folder = tempfile::tempdir().unwrap();
        let ids: Vec<SnapshotId> = ["01", "02"]
            .map(|byte| byte.repeat(16).parse().unwrap())
            .into();
        let names = ["", ".pages", ".pages.ok", ".new", ".pages.new"];
        for id in &ids {
            for name in names {
                std::fs::write(folder.path().join(format!("{id}{name}")), "x").unwrap();
            }
        }
        std::fs::write(folder.path().join("other"), "x").unwrap();
        keep_only(folder.path(), &HashSet::from([ids[1]]));
        let left = std::fs::read_dir(folder.path()).unwrap().flatten();
        let mut left: Vec<_> = left
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        left.sort();
        let kept = ["", ".pages", ".pages.ok"].map(|name| format!("{}{name}", ids[1]));
        assert_eq!(left, kept);
    }
}
