//! The pages that a snapshot's guests needed first, as they are, in one file: the next guest that runs before its
//! memory is here gets them without looking for the chunks they are in.
//!
//! A cache: a page in it is checked before it is used, and one that is damaged comes from its chunk. The file:
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `BJFIRST1` |
//! | 4 | number of pages, n |
//! | n × 8 | their numbers, in the order in which they were needed |
//! | ⌈n ÷ 16⌉ × 32 | BLAKE3 of each group of 16 pages (the last one may have fewer) |
//! | 32 | BLAKE3 of the snapshot's id and all before |
//! | n × 4096 | the pages |
//!
//! Numbers are little-endian.

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use belljar_store::{PAGE, SnapshotId};

const MAGIC: &[u8; 8] = b"BJFIRST1";
/// Pages of a file, at most: 8 MiB.
pub(super) const MOST: usize = 2048;
/// Pages that are checked, and brought in, together.
const GROUP: usize = 16;
const PAGE_BYTES: usize = 4096;
/// Longest file that makes sense.
const LONGEST: usize = 8 + 4 + MOST * (8 + PAGE_BYTES) + MOST.div_ceil(GROUP) * 32 + 32;

/// The pages of a snapshot.
#[derive(Debug)]
pub(super) struct First {
    file: File,
    path: PathBuf,
    /// Where the pages begin in the file.
    start: u64,
    pages: Vec<u64>,
    places: HashMap<u64, usize>,
    sums: Vec<[u8; 32]>,
    brought: Vec<AtomicBool>,
}

impl First {
    /// Opens a snapshot's file, if there is a good one for memory of so many bytes.
    pub(super) fn open(folder: &Path, id: SnapshotId, length: u64) -> Option<Self> {
        let path = path(folder, id);
        let mut file = File::open(&path).ok()?;
        if file.metadata().ok()?.len() > LONGEST as u64 {
            return None;
        }
        let mut start = [0; 12];
        file.read_exact(&mut start).ok()?;
        let (magic, count) = start.split_first_chunk::<8>()?;
        let count = u32::from_le_bytes(*count.first_chunk()?);
        let count = usize::try_from(count).ok().filter(|count| *count <= MOST)?;
        let (numbers, sums) = (
            count.checked_mul(8)?,
            count.div_ceil(GROUP).checked_mul(32)?,
        );
        let mut head = vec![0; numbers.checked_add(sums)?];
        file.read_exact(&mut head).ok()?;
        let mut sum = [0; 32];
        file.read_exact(&mut sum).ok()?;
        if magic != MAGIC || *head_sum(id, &start, &head).as_bytes() != sum {
            return None;
        }
        let (numbers, sums) = head.split_at_checked(numbers)?;
        let pages: Vec<u64> = words(numbers);
        let last = length / PAGE;
        if pages.iter().any(|page| *page >= last) {
            return None;
        }
        let (sums, _) = sums.as_chunks::<32>();
        let places = pages.iter().enumerate().map(|(at, page)| (*page, at));
        Some(Self {
            file,
            path,
            start: (start.len() + head.len() + sum.len()) as u64,
            places: places.collect(),
            brought: sums.iter().map(|_| AtomicBool::new(false)).collect(),
            sums: sums.to_vec(),
            pages,
        })
    }

    /// Writes a snapshot's file, unless there is one. `read` gives a page by its number; it is only not remembered
    /// if something fails.
    pub(super) fn write(
        folder: &Path,
        id: SnapshotId,
        pages: &[u64],
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let path = path(folder, id);
        let pages = pages.get(..pages.len().min(MOST)).unwrap_or_default();
        if pages.is_empty() || path.exists() {
            return Ok(());
        }
        let mut content = vec![0; pages.len().saturating_mul(PAGE_BYTES)];
        for (page, bytes) in pages.iter().zip(content.chunks_mut(PAGE_BYTES)) {
            read(*page, bytes)?;
        }
        let count = u32::try_from(pages.len()).unwrap_or(0).to_le_bytes();
        let start = [&MAGIC[..], &count].concat();
        let mut head: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        for group in content.chunks(GROUP * PAGE_BYTES) {
            head.extend_from_slice(blake3::hash(group).as_bytes());
        }
        let sum = head_sum(id, &start, &head);
        let temporary = path.with_added_extension("new");
        let written = File::create(&temporary).and_then(|mut file| {
            file.set_permissions(Permissions::from_mode(0o600))?;
            for part in [&start[..], &head, sum.as_bytes(), &content] {
                file.write_all(part)?;
            }
            std::fs::rename(&temporary, &path)
        });
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    /// Which group a page is in.
    pub(super) fn group_of(&self, page: u64) -> Option<usize> {
        self.places.get(&page).map(|place| place / GROUP)
    }

    /// How many groups there are.
    pub(super) fn groups(&self) -> usize {
        self.sums.len()
    }

    /// Brings a group in, unless that was done: `fill` is told each run of pages and where in memory it is.
    ///
    /// # Errors
    /// It is damaged, and forgotten; or `fill` fails.
    pub(super) fn bring(
        &self,
        group: usize,
        mut fill: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (Some(sum), Some(brought)) = (self.sums.get(group), self.brought.get(group)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if brought.load(Ordering::Acquire) {
            return Ok(());
        }
        let begin = group.saturating_mul(GROUP);
        let rest = self.pages.get(begin..).unwrap_or_default();
        let pages = rest.get(..rest.len().min(GROUP)).unwrap_or_default();
        let mut bytes = [0; GROUP * PAGE_BYTES];
        let bytes = bytes
            .get_mut(..pages.len().saturating_mul(PAGE_BYTES))
            .unwrap_or_default();
        let at = self.start.saturating_add((begin * PAGE_BYTES) as u64);
        let read = self.file.read_exact_at(bytes, at);
        if read.is_err() || blake3::hash(bytes).as_bytes() != sum {
            let _ = std::fs::remove_file(&self.path);
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut rest: &[u8] = bytes;
        let mut runs = pages;
        while let Some(first) = runs.first() {
            let follows = runs
                .iter()
                .zip(*first..)
                .take_while(|(page, at)| **page == *at);
            let count = follows.count();
            let (run, later) = rest
                .split_at_checked(count.saturating_mul(PAGE_BYTES))
                .unwrap_or_default();
            fill(run, first.saturating_mul(PAGE))?;
            (rest, runs) = (later, runs.get(count..).unwrap_or_default());
        }
        brought.store(true, Ordering::Release);
        Ok(())
    }
}

/// Forgets a snapshot.
pub(super) fn remove(folder: &Path, id: SnapshotId) {
    let _ = std::fs::remove_file(path(folder, id));
}

fn path(folder: &Path, id: SnapshotId) -> PathBuf {
    folder.join(format!("{id}.pages"))
}

fn head_sum(id: SnapshotId, start: &[u8], head: &[u8]) -> blake3::Hash {
    let mut sum = blake3::Hasher::new();
    sum.update(id.to_string().as_bytes());
    sum.update(start).update(head).finalize()
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LENGTH: u64 = 1 << 30;

    fn id(byte: u8) -> SnapshotId {
        format!("{byte:02x}").repeat(16).parse().unwrap()
    }

    fn content(page: u64) -> Vec<u8> {
        let word = page.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        word.repeat(PAGE_BYTES / 8)
    }

    fn written(folder: &Path, pages: &[u64]) -> PathBuf {
        First::write(folder, id(1), pages, |page, bytes| {
            bytes.copy_from_slice(&content(page));
            Ok(())
        })
        .unwrap();
        path(folder, id(1))
    }

    /// Brings all in; which pages that were, each with what it has to be.
    fn brought(first: &First) -> io::Result<Vec<u64>> {
        let mut all = Vec::new();
        for group in 0..first.groups() {
            first.bring(group, |bytes, at| {
                for (number, bytes) in bytes.chunks(PAGE_BYTES).enumerate() {
                    let page = at / PAGE + number as u64;
                    assert_eq!(bytes, content(page));
                    all.push(page);
                }
                Ok(())
            })?;
        }
        Ok(all)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_was_written_is_brought_in_once_in_its_order(
            pages in proptest::collection::hash_set(0_u64..LENGTH / PAGE, 1..100)
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut pages: Vec<u64> = pages.into_iter().collect();
            // Some follow each other.
            let next: Vec<u64> = pages.iter().map(|page| (page + 1) % (LENGTH / PAGE)).collect();
            for page in next {
                if !pages.contains(&page) {
                    pages.push(page);
                }
            }
            written(folder.path(), &pages);
            let first = First::open(folder.path(), id(1), LENGTH).unwrap();
            prop_assert_eq!(brought(&first).unwrap(), pages.clone());
            prop_assert!(brought(&first).unwrap().is_empty());
            for (at, page) in pages.iter().enumerate() {
                prop_assert_eq!(first.group_of(*page), Some(at / GROUP));
            }
            // Of another snapshot, and for less memory.
            std::fs::copy(path(folder.path(), id(1)), path(folder.path(), id(2))).unwrap();
            prop_assert!(First::open(folder.path(), id(2), LENGTH).is_none());
            let last = pages.iter().max().unwrap() * PAGE;
            prop_assert!(First::open(folder.path(), id(1), last).is_none());
        }

        #[test]
        fn damage_anywhere_is_noticed_and_never_brought_in(at in any::<prop::sample::Index>(), bit in 0..8) {
            let folder = tempfile::tempdir().unwrap();
            let pages: Vec<u64> = (0..40).map(|page| page * 3).collect();
            let path = written(folder.path(), &pages);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            std::fs::write(&path, &bytes).unwrap();
            if let Some(first) = First::open(folder.path(), id(1), LENGTH) {
                prop_assert!(brought(&first).is_err());
                prop_assert!(!path.exists(), "it is forgotten");
            }
        }

        #[test]
        fn any_file_is_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), with_magic: bool) {
            let folder = tempfile::tempdir().unwrap();
            let bytes = if with_magic { [&MAGIC[..], &bytes].concat() } else { bytes };
            std::fs::write(path(folder.path(), id(1)), bytes).unwrap();
            prop_assert!(First::open(folder.path(), id(1), LENGTH).is_none());
        }
    }

    #[test]
    fn a_file_that_is_cut_short_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let pages: Vec<u64> = (0..20).collect();
        let path = written(folder.path(), &pages);
        let bytes = std::fs::read(&path).unwrap();
        for cut in [
            0,
            7,
            11,
            100,
            300,
            bytes.len() - PAGE_BYTES,
            bytes.len() - 1,
        ] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            if let Some(first) = First::open(folder.path(), id(1), LENGTH) {
                assert!(brought(&first).is_err(), "{cut}");
            }
        }
    }

    #[test]
    fn it_is_bounded_and_not_written_twice() {
        let folder = tempfile::tempdir().unwrap();
        let pages: Vec<u64> = (0..5000).collect();
        written(folder.path(), &pages);
        written(folder.path(), &[9]);
        let first = First::open(folder.path(), id(1), LENGTH).unwrap();
        assert_eq!(brought(&first).unwrap().len(), MOST);
        remove(folder.path(), id(1));
        assert!(First::open(folder.path(), id(1), LENGTH).is_none());
        // A page that cannot be read: nothing is remembered.
        let failed = First::write(folder.path(), id(1), &[1], |_, _| {
            Err(io::ErrorKind::Other.into())
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
