//! Whether a file is in memory, and how to have it not be there.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::path::Path;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::failure::{Attempt, Result};

/// Where Linux forgets what it caches; for root.
const DROP: &str = "/proc/sys/vm/drop_caches";
/// Pages that are looked at.
const PROBES: u64 = 64;
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

/// The share of the file's data that is in memory, 0 to 1, by [`PROBES`] pages spread over its data; asking does not
/// bring them in. `None`: the file system cannot tell.
pub fn cached_share(path: &Path) -> Result<Option<f64>> {
    let file = File::open(path).attempt(format!("cannot open {}", path.display()))?;
    let size = file.metadata().attempt("its size")?.len();
    let step = (size / PROBES).max(4096);
    let (mut probed, mut present, mut offset) = (0_u32, 0_u32, 0);
    while offset < size {
        // Holes are never read from the disk.
        let Ok(data) = seek(&file, SeekFrom::Data(offset)) else {
            break;
        };
        let mut byte = [0];
        let mut into = [IoSliceMut::new(&mut byte)];
        match preadv2(&file, &mut into, data, ReadWriteFlags::NOWAIT) {
            Ok(_) => present = present.saturating_add(1),
            Err(Errno::AGAIN) => {}
            Err(Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error).attempt(format!("cannot read {}", path.display())),
        }
        probed = probed.saturating_add(1);
        offset = data.saturating_add(step);
    }
    Ok((probed > 0).then(|| f64::from(present) / f64::from(probed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_in_memory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        // None: not every file system can tell.
        if let Some(share) = cached_share(&path).unwrap() {
            assert!(share > 0.99, "{share}");
        }
        drop_file(&path).unwrap();
        if !is_memory(directory.path()).unwrap()
            && let Some(share) = cached_share(&path).unwrap()
        {
            assert!(share < 0.5, "{share}");
        }
        assert!(is_memory(Path::new("/proc/none")).is_err());
    }
}
