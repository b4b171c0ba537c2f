//! Whether a file is in memory, and how to have it not be there.

mod resident;

use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;

use crate::failure::{Attempt, Result};

/// Where Linux forgets what it caches; for root.
const DROP: &str = "/proc/sys/vm/drop_caches";
/// As much of a file is looked at in one go; whole pages.
const WINDOW: u64 = 1 << 30;
/// `statfs` of a tmpfs and a ramfs: what is there cannot leave the memory but to swap.
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether the directory is on a file system that lives in memory.
pub fn is_memory(directory: &Path) -> Result<bool> {
    let status =
        rustix::fs::statfs(directory).attempt(format!("cannot examine {}", directory.display()))?;
    #[allow(clippy::unnecessary_cast)] // it has another type on other machines
    let kind = status.f_type as i64;
    Ok(MEMORY_FILE_SYSTEMS.contains(&kind))
}

/// Drops the pages of a file from the page cache, as far as nobody maps them; what was not written out is first.
pub fn drop_file(path: &Path) -> Result<()> {
    let file = File::open(path).attempt(format!("cannot open {}", path.display()))?;
    // A program that runs cannot be written: nothing of it is to be synced.
    let _ = file.sync_data();
    fadvise(&file, 0, None, Advice::DontNeed)
        .attempt(format!("cannot drop the cache of {}", path.display()))
}

/// Drops everything that Linux caches of files. `false`: only root may.
pub fn drop_all() -> Result<bool> {
    rustix::fs::sync();
    match fs::write(DROP, "3") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => Ok(false),
        Err(error) => Err(error).attempt(format!("cannot write to {DROP}")),
    }
}

/// The share of the file's data that is in memory, 0 to 1; asking does not bring it in. `None`: there is no data, or the
/// file system cannot tell.
pub fn cached_share(path: &Path) -> Result<Option<f64>> {
    let what = || format!("cannot see what of {} is in memory", path.display());
    let file = File::open(path).attempt(format!("cannot open {}", path.display()))?;
    let size = file.metadata().attempt("its size")?.len();
    let (mut pages, mut present, mut offset) = (0_u64, 0_u64, 0_u64);
    while offset < size {
        // Holes are never read from the disk.
        let data = match seek(&file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error).attempt(what()),
        };
        let hole = seek(&file, SeekFrom::Hole(data)).attempt(what())?;
        let begin = data - data % resident::PAGE;
        let length = hole.saturating_sub(begin).min(WINDOW);
        match resident::pages(&file, begin, usize::try_from(length).unwrap_or(usize::MAX)) {
            Ok(found) => present = present.saturating_add(found),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(error) => return Err(error).attempt(what()),
        }
        pages = pages.saturating_add(length.div_ceil(resident::PAGE));
        offset = begin.saturating_add(length.next_multiple_of(resident::PAGE));
    }
    #[allow(clippy::cast_precision_loss)]
    Ok((pages > 0).then(|| present as f64 / pages as f64))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn what_was_just_written_is_in_memory_until_it_is_dropped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![7; 1 << 20]).unwrap();
        assert_eq!(cached_share(file.path()).unwrap(), Some(1.0));
        if is_memory(file.path()).unwrap() {
            return;
        }
        drop_file(file.path()).unwrap();
        // Asked again and again: to ask fetches nothing.
        for _ in 0..20 {
            assert_eq!(cached_share(file.path()).unwrap(), Some(0.0));
        }
    }

    #[test]
    fn only_data_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        assert_eq!(cached_share(file.path()).unwrap(), None);
        file.as_file().write_all_at(&[7; 5000], 8 << 20).unwrap();
        assert_eq!(cached_share(file.path()).unwrap(), Some(1.0));
        // A hole that was read is in memory, and is no data.
        let mut whole = Vec::new();
        File::open(file.path())
            .unwrap()
            .read_to_end(&mut whole)
            .unwrap();
        assert_eq!(cached_share(file.path()).unwrap(), Some(1.0));
    }

    #[test]
    fn half_a_file_is_half_in_memory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        if is_memory(file.path()).unwrap() {
            return;
        }
        fs::write(file.path(), vec![7; 1 << 20]).unwrap();
        drop_file(file.path()).unwrap();
        // Without reading ahead.
        fadvise(file.as_file(), 0, None, Advice::Random).unwrap();
        file.as_file()
            .read_exact_at(&mut [0; 512 << 10], 0)
            .unwrap();
        assert_eq!(cached_share(file.path()).unwrap(), Some(0.5));
    }

    #[test]
    fn what_is_not_there_is_told() {
        assert!(is_memory(Path::new("/proc/none")).is_err());
        assert!(cached_share(Path::new("/proc/none")).is_err());
    }
}
