//! Which pages a restored guest of a snapshot wrote first, as its VMM wrote them down (`docs/api.md`,
//! `/snapshot/working-set`): copied at once for the next one. A hint: a wrong one costs time, not correctness. What no
//! VMM would read is not kept, and not handed out.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use belljar_store::{PAGE, SnapshotId};

/// How it begins, which is its version, too. Runs of pages follow: where, and how many, two words each.
const MAGIC: &[u8; 8] = b"BJWSET1\n";
/// Bytes of a run.
const RUN: usize = 16;
/// Most runs, and most pages in all.
const MAX_RUNS: usize = 1 << 16;
const MAX_PAGES: u64 = 1 << 16;
const MAX_LEN: u64 = (MAGIC.len() + MAX_RUNS * RUN) as u64;

/// The folder of recordings.
pub(crate) struct Recordings {
    folder: PathBuf,
    /// One is written at a time.
    keeping: Mutex<()>,
}

impl Recordings {
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        // What was being written when somebody was killed.
        for entry in std::fs::read_dir(folder)?.flatten() {
            if entry.path().extension().is_some() {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            keeping: Mutex::default(),
        })
    }

    /// That of an earlier guest, at its beginning. One that is not good goes.
    pub(super) fn get(&self, id: SnapshotId) -> Option<File> {
        let mut file = File::open(self.path(id)).ok()?;
        let good = read(&mut file).is_ok_and(|bytes| is_good(&bytes));
        if good && file.rewind().is_ok() {
            return Some(file);
        }
        self.remove(id);
        None
    }

    /// The same, good or not.
    pub(super) fn peek(&self, id: SnapshotId) -> Option<File> {
        File::open(self.path(id)).ok()
    }

    /// Keeps one of a snapshot, the first that comes.
    ///
    /// # Errors
    /// It is none, or cannot be kept.
    pub(super) fn keep(&self, id: SnapshotId, from: impl Read) -> io::Result<()> {
        let path = self.path(id);
        let _turn = super::locked(&self.keeping);
        if path.exists() {
            return Ok(());
        }
        let bytes = read(from)?;
        if !is_good(&bytes) {
            return Err(io::Error::other("it is no recording of a working set"));
        }
        let temporary = path.with_added_extension("new");
        let _ = std::fs::remove_file(&temporary);
        let mut file = File::create_new(&temporary)?;
        file.write_all(&bytes)?;
        file.set_permissions(Permissions::from_mode(0o400))?;
        std::fs::rename(temporary, path)
    }

    /// Forgets a snapshot.
    pub(super) fn remove(&self, id: SnapshotId) {
        let _ = std::fs::remove_file(self.path(id));
    }

    fn path(&self, id: SnapshotId) -> PathBuf {
        self.folder.join(id.to_string())
    }
}

fn read(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than there can be, so that it is noticed.
    from.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether a VMM takes it.
fn is_good(bytes: &[u8]) -> bool {
    let Some(rest) = bytes.strip_prefix(MAGIC) else {
        return false;
    };
    let (runs, odd) = rest.as_chunks::<RUN>();
    let mut pages: u64 = 0;
    let good = |run: &[u8; RUN]| {
        let (words, _) = run.as_chunks::<8>();
        let [start, count] = *words else {
            return false;
        };
        let (start, count) = (u64::from_le_bytes(start), u64::from_le_bytes(count));
        pages = pages.saturating_add(count);
        let end = count
            .checked_mul(PAGE)
            .and_then(|length| start.checked_add(length));
        // The lowest bit says what they are.
        count > 0 && pages <= MAX_PAGES && end.is_some() && (start & !1) % PAGE == 0
    };
    odd.is_empty() && runs.len() <= MAX_RUNS && runs.iter().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recording(runs: &[(u64, u64)]) -> Vec<u8> {
        let words = runs.iter().flat_map(|(start, count)| [*start, *count]);
        let bytes = words.flat_map(u64::to_le_bytes);
        MAGIC.iter().copied().chain(bytes).collect()
    }

    #[test]
    fn the_first_one_stays_until_its_snapshot_goes() {
        let dir = tempfile::tempdir().unwrap();
        let recordings = Recordings::open(&dir.path().join("recordings")).unwrap();
        let id = SnapshotId([1; 16]);
        assert!(recordings.get(id).is_none());
        let (one, two) = (recording(&[(4097, 3), (0, 1)]), recording(&[(1, 1)]));
        recordings.keep(id, &one[..]).unwrap();
        recordings.keep(id, &two[..]).unwrap();
        for _ in 0..2 {
            assert_eq!(read(recordings.get(id).unwrap()).unwrap(), one);
        }
        recordings.remove(id);
        assert!(recordings.get(id).is_none());
    }

    #[test]
    fn what_is_none_is_neither_kept_nor_given() {
        let dir = tempfile::tempdir().unwrap();
        let recordings = Recordings::open(dir.path()).unwrap();
        let id = SnapshotId([1; 16]);
        let mut cut = recording(&[(1, 1)]);
        cut.pop();
        let bad = [
            Vec::new(),
            b"BJWSET2\n".to_vec(),
            cut,
            recording(&[(1, 0)]),
            recording(&[(3, 1)]),
            recording(&[(1, MAX_PAGES), (1, 1)]),
            recording(&[(u64::MAX - PAGE + 2, 1)]),
            recording(&vec![(1, 1); MAX_RUNS + 1]),
        ];
        for bytes in bad {
            assert!(recordings.keep(id, &bytes[..]).is_err());
            std::fs::write(dir.path().join(id.to_string()), bytes).unwrap();
            assert!(recordings.get(id).is_none());
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
        // It has an end, whatever it is read from.
        assert!(recordings.keep(id, io::repeat(7)).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let with = [MAGIC.as_slice(), &bytes].concat();
            prop_assert!(!is_good(&bytes) || bytes.starts_with(MAGIC));
            if is_good(&with) {
                prop_assert_eq!(bytes.len() % RUN, 0);
            }
        }
    }
}
