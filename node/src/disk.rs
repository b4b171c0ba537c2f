//! Writable disks: made once per size, then copied so that a copy costs only what it holds.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::SeekFrom as SparseSeek;
use rustix::io::Errno;

use crate::assets::Assets;
use crate::size::Size;

/// A copy could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot copy the disk image {} to {}: {source}", from.display(), to.display())]
pub struct CopyError {
    from: PathBuf,
    to: PathBuf,
    source: io::Error,
}

/// A disk of this size could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    #[error("a disk of {0} cannot be made: from 16M to 16T, in multiples of 4096 bytes")]
    Size(Size),
    #[error("cannot make an empty disk of {size}: {source}")]
    Io { size: Size, source: io::Error },
    #[error("cannot make an empty disk of {size}: mke2fs said: {said}")]
    Mke2fs { size: Size, said: String },
}

impl MakeError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Size(_) => "write for example --disk 2G".to_owned(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "install e2fsprogs, which has mke2fs".to_owned()
            }
            _ => {
                "check the space in the cache directory; 'belljar doctor' lists the sizes there are"
                    .to_owned()
            }
        }
    }
}

/// Smallest and largest disk: ext4 with its journal and blocks of 4 KiB.
const SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=16 << 40;
/// The file system's id and hash seed, the same for all: a disk is a function of its size.
const DISK_UUID: &str = "be117a40-0000-4000-8000-000000000002";
/// Time stamps in an empty disk.
const EPOCH: &str = "1735689600";

/// The empty disk of this size from the assets; made there, the first time one is asked for. The options
/// of the file system are those of `rootfs/disk`.
///
/// # Errors
/// The size is out of bounds, `mke2fs` is missing, or the assets cannot be written.
pub fn empty_of(size: Size, assets: &Assets) -> Result<PathBuf, MakeError> {
    if let Ok(path) = assets.disk(size) {
        return Ok(path);
    }
    if !SIZES.contains(&size.0) || !size.0.is_multiple_of(4096) {
        return Err(MakeError::Size(size));
    }
    let io_failed = |source| MakeError::Io { size, source };
    let path = assets.dir().join(format!("disk-{size}"));
    let temporary = assets
        .dir()
        .join(format!(".disk-{size}.{}", std::process::id()));
    let made = File::create(&temporary)
        .and_then(|file| file.set_len(size.0))
        .map_err(io_failed)
        .and_then(|()| format_ext4(&temporary, size))
        .and_then(|()| std::fs::rename(&temporary, &path).map_err(io_failed));
    if made.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    made.map(|()| path)
}

fn format_ext4(path: &Path, size: Size) -> Result<(), MakeError> {
    let journal_mib = match size.0 >> 20 {
        0..256 => 4,
        256..4096 => 16,
        _ => 64,
    };
    // Users who are not root have no sbin in their path.
    let mut search = std::env::var_os("PATH").unwrap_or_default();
    search.push(":/usr/sbin:/sbin");
    let output = Command::new("mke2fs")
        .env("PATH", search)
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .env("E2FSPROGS_FAKE_TIME", EPOCH)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-i", "16384"])
        .args(["-U", DISK_UUID, "-J", &format!("size={journal_mib}")])
        .args(["-O", "^resize_inode,^orphan_file,metadata_csum,64bit,sparse_super2"])
        .arg("-E")
        .arg(format!(
            "hash_seed={DISK_UUID},nodiscard,assume_storage_prezeroed=1,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
        ))
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| MakeError::Io { size, source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = crate::bounded_log::last_lines(&output.stderr, 3).join("; ");
    Err(MakeError::Mke2fs { size, said })
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
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    copy_into(source, target)
}

/// Copies what a file holds into an empty one, in the same way.
///
/// # Errors
/// The file cannot be read, or the file system is full.
pub fn copy_into(source: File, target: File) -> io::Result<()> {
    let length = source.metadata()?.len();
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
    fn a_size_that_is_not_there_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let assets = Assets::locate(Some(dir.path())).unwrap();
        let size = Size(24 * MIB);
        let path = empty_of(size, &assets).unwrap();
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!(made.len(), size.0);
        assert!(made.blocks() * 512 < 8 * MIB, "{} blocks", made.blocks());
        assert_eq!(empty_of(size, &assets).unwrap(), path);
        let entries: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(entries.len(), 1, "{entries:?}");
        for bytes in [0, MIB, 17 * MIB + 1, 17 << 40] {
            assert!(matches!(
                empty_of(Size(bytes), &assets),
                Err(MakeError::Size(_))
            ));
        }
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
