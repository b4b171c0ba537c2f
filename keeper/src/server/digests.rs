//! Contents of base images: BLAKE3 of the whole file, remembered as long as the file is the same.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};

use super::locked;
use crate::changed_ns;
use crate::v1::BaseFile;

/// Which file, in which state: device, inode, bytes, change time in nanoseconds.
type Key = [u64; 4];
/// More are not remembered.
const MOST: usize = 1024;
/// Two changes within this time may bear the same time: what was changed just now is not remembered.
const GRAIN: Duration = Duration::from_millis(100);

/// What is known of files.
pub(crate) struct Digests {
    path: PathBuf,
    known: Mutex<HashMap<Key, String>>,
}

impl Digests {
    /// What a keeper before this one has learnt; a file that is not good is as none.
    pub(super) fn load(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        Self {
            path: path.to_path_buf(),
            known: Mutex::new(text.lines().take(MOST).filter_map(parse).collect()),
        }
    }

    /// BLAKE3 of a file, as lower-case hexadecimal.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn of(&self, path: &Path) -> io::Result<String> {
        self.of_open(&open(path)?)
    }

    /// BLAKE3 of a file that is used, as lower-case hexadecimal.
    ///
    /// # Errors
    /// It cannot be read; another one has its name now; it was changed.
    pub(super) fn of_used(&self, used: &BaseFile) -> io::Result<String> {
        let file = open(Path::new(&used.path))?;
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) != (used.device, used.inode) {
            return Err(io::Error::other(
                "the file was replaced by another one while it was in use",
            ));
        }
        let changed = || {
            io::Error::other(
                "the file was changed while it was in use: the guest may have seen some of either content",
            )
        };
        let as_opened = [used.device, used.inode, used.bytes, used.changed];
        if used.changed != 0 && key(&file)? != as_opened {
            return Err(changed());
        }
        let digest = self.of_open(&file)?;
        if used.changed != 0 && key(&file)? != as_opened {
            return Err(changed());
        }
        Ok(digest)
    }

    fn of_open(&self, file: &File) -> io::Result<String> {
        let key = key(file)?;
        if let Some(known) = locked(&self.known).get(&key) {
            return Ok(known.clone());
        }
        let [.., changed] = key;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let is_settled = now.is_ok_and(|now| now > Duration::from_nanos(changed) + GRAIN);
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut &*file, &mut hasher)?;
        let digest = hasher.finalize().to_hex().to_string();
        // Changed while it was read: right for now, and not remembered.
        if is_settled && self::key(file)? == key {
            let mut known = locked(&self.known);
            if known.len() >= MOST {
                known.clear();
            }
            known.insert(key, digest.clone());
            self.save(&known);
        }
        Ok(digest)
    }

    /// Only a cache: what cannot be saved is found out anew.
    fn save(&self, known: &HashMap<Key, String>) {
        let lines: String = known
            .iter()
            .map(|([device, inode, bytes, changed], digest)| {
                format!("{device} {inode} {bytes} {changed} {digest}\n")
            })
            .collect();
        let temporary = self.path.with_extension("new");
        let _ = std::fs::write(&temporary, lines)
            .and_then(|()| std::fs::rename(&temporary, &self.path));
    }
}

fn open(path: &Path) -> io::Result<File> {
    // Whoever wrote a snapshot chose the path: a pipe must not stop the keeper, nor an endless device.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

fn key(file: &File) -> io::Result<Key> {
    let metadata = file.metadata()?;
    Ok([
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        changed_ns(&metadata),
    ])
}

fn parse(line: &str) -> Option<(Key, String)> {
    let mut words = line.split(' ');
    let mut number = || words.next()?.parse::<u64>().ok();
    let key = [number()?, number()?, number()?, number()?];
    let digest = words.next()?;
    let good = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    (good && words.next().is_none()).then(|| (key, digest.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_took_the_place_of_the_one_in_use_is_told_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("image"), dir.path().join("new"));
        std::fs::write(&path, b"one").unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        let used = BaseFile {
            path: path.to_string_lossy().into_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            changed: changed_ns(&metadata),
        };
        let digests = Digests::load(&dir.path().join("digests"));
        digests.of_used(&used).unwrap();
        // The same file, with the same length and time of writing.
        let file = File::options().write(true).open(&path).unwrap();
        std::thread::sleep(Duration::from_millis(15));
        std::os::unix::fs::FileExt::write_all_at(&file, b"two", 0).unwrap();
        file.set_modified(metadata.modified().unwrap()).unwrap();
        let error = digests.of_used(&used).unwrap_err();
        assert!(error.to_string().contains("was changed"), "{error}");
        let two = digests.of(&path).unwrap();
        assert_eq!(two, blake3::hash(b"two").to_hex().to_string());
        std::fs::write(&new, b"one").unwrap();
        std::fs::rename(&new, &path).unwrap();
        let error = digests.of_used(&used).unwrap_err();
        assert!(error.to_string().contains("replaced"), "{error}");
    }

    #[test]
    fn a_file_is_known_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (file, cache) = (dir.path().join("image"), dir.path().join("digests"));
        std::fs::write(&file, b"one").unwrap();
        let digests = Digests::load(&cache);
        digests.of(&file).unwrap();
        assert_eq!(
            Digests::load(&cache).known.lock().unwrap().len(),
            0,
            "it may yet change without a trace"
        );
        std::thread::sleep(GRAIN * 2);
        let one = digests.of(&file).unwrap();
        assert_eq!(one, blake3::hash(b"one").to_hex().to_string());
        assert_eq!(Digests::load(&cache).known.lock().unwrap().len(), 1);
        std::fs::write(&file, b"three").unwrap();
        assert_ne!(digests.of(&file).unwrap(), one);
        assert!(digests.of(&dir.path().join("none")).is_err());
        assert!(digests.of(Path::new("/dev/zero")).is_err());
        assert!(digests.of(dir.path()).is_err());
        for bad in ["", "1 2 3 4", "1 2 3 x 00", "1 2 3 4 zz", &"9 ".repeat(9)] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
