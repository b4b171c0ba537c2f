//! The pages that a snapshot's guests needed first, as they are, in one file: the next guest that runs before its
//! memory is here gets them without looking for the chunks they are in.
//!
//! A cache, believed by the rule of complete templates: its record says which pages they are, and of which file it
//! speaks; one that was changed or replaced since is not used. `ID.pages` holds the pages, nothing else. The record
//! `ID.pages.ok`, which is written when they are durable:
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `BJFIRST2` |
//! | 6 × 8 | device, inode, time of the last writing and of the last change (seconds, nanoseconds) of the file of pages |
//! | n × 8 | numbers of the pages, in their order in that file |
//! | 32 | BLAKE3 of the snapshot's id and all before |
//!
//! Words are little-endian.

use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use belljar_store::{PAGE, SnapshotId};
use rustix::fs::sendfile;

const MAGIC: &[u8; 8] = b"BJFIRST2";
/// Pages of a file, at most: 8 MiB.
pub(super) const MOST: usize = 2048;
/// So many of them, those that were needed first, are brought in before the guest runs.
const EARLY: usize = 1024;
const PAGE_BYTES: usize = 4096;
/// Words of a record that say which file it speaks of.
const IDENTITY: usize = 6;
/// Longest record that makes sense.
const LONGEST_BYTES: usize = 8 + (IDENTITY + MOST) * 8 + 32;
const LONGEST: u64 = LONGEST_BYTES as u64;

/// The pages of a snapshot.
#[derive(Debug)]
pub(super) struct First {
    file: File,
    /// Those that were needed first, at most [`EARLY`], and the others; both in ascending order.
    pages: Vec<u64>,
}

impl First {
    /// Opens a snapshot's file, if there is a good one for memory of so many bytes.
    pub(super) fn open(folder: &Path, id: SnapshotId, length: u64) -> Option<Self> {
        let path = path(folder, id);
        let mut record = Vec::with_capacity(LONGEST_BYTES);
        let text = File::open(record_path(&path)).ok()?;
        text.take(LONGEST + 1).read_to_end(&mut record).ok()?;
        if record.len() as u64 > LONGEST {
            return None;
        }
        let (record, sum) = record.split_last_chunk::<32>()?;
        if record_sum(id, record).as_bytes() != sum {
            return None;
        }
        let words = words(record.strip_prefix(MAGIC)?);
        let (identity, pages) = words.split_first_chunk::<IDENTITY>()?;
        let file = File::open(&path).ok()?;
        let is = file.metadata().ok()?;
        let last = length / PAGE;
        let good = *identity == identity_of(&is)
            && is.len() == (pages.len() as u64).saturating_mul(PAGE)
            && pages.iter().all(|page| *page < last);
        good.then(|| Self {
            file,
            pages: pages.to_vec(),
        })
    }

    /// Writes a snapshot's file, unless there is one, of the pages in the order in which they were needed. `read`
    /// gives a page by its number; it is only not remembered if something fails.
    pub(super) fn write(
        folder: &Path,
        id: SnapshotId,
        pages: &[u64],
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let path = path(folder, id);
        let record = record_path(&path);
        if pages.is_empty() || record.exists() {
            return Ok(());
        }
        let mut pages = pages
            .get(..pages.len().min(MOST))
            .unwrap_or_default()
            .to_vec();
        // Those that follow each other are brought in together.
        let count = pages.len().min(EARLY);
        let (early, later) = pages.split_at_mut(count);
        early.sort_unstable();
        later.sort_unstable();
        let temporary = path.with_added_extension("new");
        let mut write = || -> io::Result<()> {
            let mut content = vec![0; pages.len().saturating_mul(PAGE_BYTES)];
            for (page, bytes) in pages.iter().zip(content.chunks_mut(PAGE_BYTES)) {
                read(*page, bytes)?;
            }
            let mut file = File::create(&temporary)?;
            file.set_permissions(Permissions::from_mode(0o400))?;
            file.write_all(&content)?;
            std::fs::rename(&temporary, &path)?;
            file.sync_all()?;
            let identity = identity_of(&file.metadata()?);
            let words = identity.iter().chain(&pages);
            let words = words.flat_map(|word| word.to_le_bytes());
            let mut text: Vec<u8> = MAGIC.iter().copied().chain(words).collect();
            let sum = record_sum(id, &text);
            text.extend_from_slice(sum.as_bytes());
            std::fs::write(&temporary, text)?;
            File::open(&temporary)?.sync_all()?;
            std::fs::rename(&temporary, &record)
        };
        let written = write();
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
            remove(folder, id);
        }
        written
    }

    /// Copies those that were needed first to where they are in `memory`, from one page cache to the other.
    ///
    /// # Errors
    /// What the kernel says. Then nobody may use `memory`: a page in it may be there in part.
    pub(super) fn bring_early(&self, mut memory: &File) -> io::Result<()> {
        let mut from = 0;
        for run in self
            .parts()
            .0
            .chunk_by(|page, next| page.checked_add(1) == Some(*next))
        {
            let start = run.first().map_or(0, |page| page.saturating_mul(PAGE));
            memory.seek(SeekFrom::Start(start))?;
            let mut rest = run.len().saturating_mul(PAGE_BYTES);
            while rest > 0 {
                match sendfile(memory, &self.file, Some(&mut from), rest) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(done) => rest = rest.saturating_sub(done),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(())
    }

    /// Those that were needed first, and the others.
    fn parts(&self) -> (&[u64], &[u64]) {
        self.pages.split_at(self.pages.len().min(EARLY))
    }

    /// Those that are brought in when the guest runs.
    pub(super) fn later(&self) -> impl Iterator<Item = u64> + '_ {
        self.parts().1.iter().copied()
    }

    /// All, in no order that matters.
    pub(super) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().copied()
    }

    /// Reads a page, if it is one of these.
    pub(super) fn read(&self, page: u64, bytes: &mut [u8; PAGE_BYTES]) -> Option<io::Result<()>> {
        let (early, later) = self.parts();
        let place = early.binary_search(&page).ok().or_else(|| {
            let place = later.binary_search(&page).ok()?;
            place.checked_add(early.len())
        })?;
        let at = (place as u64).saturating_mul(PAGE);
        Some(self.file.read_exact_at(bytes, at))
    }
}

/// The snapshots of which there is something.
pub(super) fn all(folder: &Path) -> Vec<SnapshotId> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter_map(|name| name.strip_suffix(".pages.ok")?.parse().ok())
        .collect()
}

/// Forgets a snapshot.
pub(super) fn remove(folder: &Path, id: SnapshotId) {
    let path = path(folder, id);
    let _ = std::fs::remove_file(record_path(&path));
    let _ = std::fs::remove_file(path);
}

fn path(folder: &Path, id: SnapshotId) -> PathBuf {
    folder.join(format!("{id}.pages"))
}

fn record_path(path: &Path) -> PathBuf {
    path.with_added_extension("ok")
}

/// Of an unchanged file. Who writes to it can set the time of its last writing back, and not that of its last change.
fn identity_of(file: &Metadata) -> [u64; IDENTITY] {
    [
        file.dev(),
        file.ino(),
        file.mtime().cast_unsigned(),
        file.mtime_nsec().cast_unsigned(),
        file.ctime().cast_unsigned(),
        file.ctime_nsec().cast_unsigned(),
    ]
}

fn record_sum(id: SnapshotId, record: &[u8]) -> blake3::Hash {
    let mut sum = blake3::Hasher::new();
    sum.update(id.to_string().as_bytes());
    sum.update(record).finalize()
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
        let word = (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
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

    /// Brings the early ones in; which pages are there then, each with what it has to be.
    fn brought(first: &First) -> io::Result<Vec<u64>> {
        let memory = tempfile::tempfile()?;
        memory.set_len(LENGTH)?;
        first.bring_early(&memory)?;
        let mut there = Vec::new();
        let mut bytes = vec![0; PAGE_BYTES];
        for page in first.pages() {
            memory.read_exact_at(&mut bytes, page * PAGE)?;
            if bytes == content(page) {
                there.push(page);
            } else {
                assert!(bytes.iter().all(|byte| *byte == 0), "page {page}");
            }
        }
        let blocks = memory.metadata()?.blocks();
        assert!(blocks / 8 <= 2 * there.len() as u64 + 64, "{blocks}");
        Ok(there)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_was_written_is_brought_in_and_read(
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
            let last = pages.iter().max().unwrap() * PAGE;
            pages.sort_unstable();
            prop_assert_eq!(brought(&first).unwrap(), pages.clone());
            prop_assert_eq!(first.later().count(), 0);
            let mut bytes = [0; PAGE_BYTES];
            for page in &pages {
                first.read(*page, &mut bytes).unwrap().unwrap();
                prop_assert_eq!(&bytes[..], &content(*page));
            }
            let other = (0..).find(|page| !pages.contains(page)).unwrap();
            prop_assert!(first.read(other, &mut bytes).is_none());
            // For less memory.
            prop_assert!(First::open(folder.path(), id(1), last).is_none());
        }

        #[test]
        fn damage_of_the_record_is_noticed(at in any::<prop::sample::Index>(), bit in 0..8, cut: bool) {
            let folder = tempfile::tempdir().unwrap();
            let pages: Vec<u64> = (0..40).map(|page| page * 3).collect();
            let record = record_path(&written(folder.path(), &pages));
            let mut bytes = std::fs::read(&record).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            if cut {
                bytes.truncate(at);
            }
            std::fs::write(&record, &bytes).unwrap();
            prop_assert!(First::open(folder.path(), id(1), LENGTH).is_none());
        }

        #[test]
        fn any_record_is_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), with_magic: bool) {
            let folder = tempfile::tempdir().unwrap();
            written(folder.path(), &[1]);
            let mut bytes = if with_magic { [&MAGIC[..], &bytes].concat() } else { bytes };
            let sum = record_sum(id(1), &bytes);
            bytes.extend_from_slice(sum.as_bytes());
            std::fs::write(record_path(&path(folder.path(), id(1))), bytes).unwrap();
            prop_assert!(First::open(folder.path(), id(1), LENGTH).is_none());
        }
    }

    #[test]
    fn pages_that_were_changed_replaced_or_are_of_another_are_not_used() {
        type Spoil = fn(&Path);
        let spoils: [Spoil; 6] = [
            |path| {
                let times = std::fs::metadata(path).unwrap().modified().unwrap();
                std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
                let mut file = File::options().write(true).open(path).unwrap();
                file.write_all(b"other").unwrap();
                file.set_modified(times).unwrap();
            },
            |path| {
                let copy = path.with_extension("copy");
                std::fs::copy(path, &copy).unwrap();
                std::fs::rename(copy, path).unwrap();
            },
            |path| {
                std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
                let file = File::options().write(true).open(path).unwrap();
                file.set_len(PAGE).unwrap();
            },
            |path| std::fs::remove_file(path).unwrap(),
            |path| std::fs::remove_file(record_path(path)).unwrap(),
            |path| std::fs::write(record_path(path), vec![0xff; 1 << 20]).unwrap(),
        ];
        for (number, spoil) in spoils.iter().enumerate() {
            let folder = tempfile::tempdir().unwrap();
            let path = written(folder.path(), &[3, 4, 9]);
            assert!(First::open(folder.path(), id(1), LENGTH).is_some());
            std::thread::sleep(std::time::Duration::from_millis(15));
            spoil(&path);
            let found = First::open(folder.path(), id(1), LENGTH);
            assert!(found.is_none(), "{number}");
        }
        let folder = tempfile::tempdir().unwrap();
        let one = written(folder.path(), &[3]);
        let other = path(folder.path(), id(2));
        std::fs::rename(record_path(&one), record_path(&other)).unwrap();
        std::fs::rename(one, other).unwrap();
        assert!(First::open(folder.path(), id(2), LENGTH).is_none());
    }

    #[test]
    fn a_file_that_gets_shorter_meanwhile_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path(), &[3, 4, 9]);
        let first = First::open(folder.path(), id(1), LENGTH).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(PAGE + 1).unwrap();
        assert!(brought(&first).is_err());
        assert!(first.read(9, &mut [0; PAGE_BYTES]).unwrap().is_err());
    }

    #[test]
    fn it_is_bounded_and_not_written_twice() {
        let folder = tempfile::tempdir().unwrap();
        let pages: Vec<u64> = (0..5000).rev().collect();
        written(folder.path(), &pages);
        written(folder.path(), &[9]);
        let first = First::open(folder.path(), id(1), LENGTH).unwrap();
        // Those that were needed first, in a convenient order.
        let early: Vec<u64> = (5000 - EARLY as u64..5000).collect();
        assert_eq!(brought(&first).unwrap(), early);
        assert_eq!(first.pages().count(), MOST);
        assert_eq!(first.later().count(), MOST - EARLY);
        assert_eq!(all(folder.path()), [id(1)]);
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
