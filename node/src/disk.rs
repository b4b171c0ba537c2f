//! Private copies of disk images that cost only what they hold.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom as SparseSeek;
use rustix::io::Errno;

/// A copy could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot copy the disk image {} to {}: {source}", from.display(), to.display())]
pub struct CopyError {
    from: PathBuf,
    to: PathBuf,
    source: io::Error,
}

/// Copies `from` to the new file `to`: by reference where the file system can, else the data extents
/// alone; holes stay holes.
///
/// # Errors
/// `to` exists already, `from` cannot be read, or the file system is full.
pub fn private_copy(from: &Path, to: &Path) -> Result<(), CopyError> {
    copy(from, to).map_err(|source| CopyError {
        from: from.to_path_buf(),
        to: to.to_path_buf(),
        source,
    })
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let length = source.metadata()?.len();
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    target.set_len(length)?;
    copy_extents(source, target, length)
}

fn copy_extents(mut source: File, mut target: File, length: u64) -> io::Result<()> {
    let mut position = 0;
    while position < length {
        let data = match rustix::fs::seek(&source, SparseSeek::Data(position)) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            // The file system does not know holes: all of it is data.
            Err(Errno::INVAL) => position,
            Err(error) => return Err(error.into()),
        };
        let hole = match rustix::fs::seek(&source, SparseSeek::Hole(data)) {
            Ok(hole) => hole.min(length),
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => length,
            Err(error) => return Err(error.into()),
        };
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        let wanted = hole.saturating_sub(data);
        // Between two files this is copy_file_range, with read and write where that is not possible.
        let copied = io::copy(&mut source.by_ref().take(wanted), &mut target)?;
        if copied < wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        position = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    const MIB: u64 = 1 << 20;

    #[test]
    fn holes_stay_holes_and_data_is_equal() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let source = File::create(&from).unwrap();
        source.set_len(64 * MIB).unwrap();
        source.write_all_at(&[7; 5000], 3 * MIB + 17).unwrap();
        source.write_all_at(&[9; 100], 63 * MIB).unwrap();

        private_copy(&from, &to).unwrap();

        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        let blocks = std::fs::metadata(&to).unwrap().blocks();
        assert!(blocks * 512 < MIB, "{blocks} blocks are allocated");
    }

    #[test]
    fn an_empty_image_and_a_full_one() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [("empty", vec![]), ("full", vec![3u8; 300_001])] {
            let from = dir.path().join(name);
            let to = dir.path().join(format!("{name}-copy"));
            std::fs::write(&from, &content).unwrap();
            private_copy(&from, &to).unwrap();
            assert_eq!(std::fs::read(&to).unwrap(), content);
        }
    }

    #[test]
    fn an_existing_file_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, b"new").unwrap();
        std::fs::write(&to, b"precious").unwrap();
        let error = private_copy(&from, &to).unwrap_err();
        assert!(error.to_string().contains("from"), "{error}");
        assert_eq!(std::fs::read(&to).unwrap(), b"precious");
    }
}
