//! The host's side of a copy: files and trees of this machine.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use belljar_protocol::client::CallError;
use belljar_protocol::client::files::{SendError, Upload};
use belljar_protocol::transfer::{LONG_CHUNK, Piece};
use belljar_protocol::v1;
use belljar_tree::pack::Sink;
use rustix::fs::{SeekFrom, Timespec, Timestamps, UTIME_NOW, futimens, seek};

use super::copy::{CopyError, Counter};

/// What of a guest's mode is believed.
const MODE_MASK: u32 = 0o777;

pub(super) fn failed(doing: &'static str, path: &Path, source: io::Error) -> CopyError {
    CopyError::Host {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// A tree that is packed straight into the frames that are sent.
pub(super) struct TreeSink<'a, 'b> {
    pub(super) upload: &'a mut Upload<UnixStream>,
    pub(super) counter: &'a mut Counter<'b>,
}

impl Sink for TreeSink<'_, '_> {
    type Error = CallError;

    fn space(&mut self) -> &mut [u8] {
        self.upload.space()
    }

    fn filled(&mut self, count: usize) -> Result<(), CallError> {
        self.counter.add(count as u64);
        self.upload.filled(count)
    }
}

/// Sends the content of a file, holes as such. What is no regular file is read up to its end.
pub(super) fn send_file(
    file: &File,
    path: &Path,
    upload: &mut Upload<UnixStream>,
    counter: &mut Counter<'_>,
) -> Result<(), Sending> {
    let info = file
        .metadata()
        .map_err(|error| Sending::Host(failed("read", path, error)))?;
    let size = info.len();
    // Files of the kernel say nothing about their size.
    if !info.is_file() || size == 0 {
        return send_range(file, path, upload, counter, u64::MAX);
    }
    if info.blocks().saturating_mul(512) >= size {
        return send_data(file, path, upload, counter, size);
    }
    let mut at = 0;
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(rustix::io::Errno::NXIO) => size,
            Err(error) => return Err(Sending::Host(failed("read", path, error.into()))),
        };
        if data > at {
            upload.hole(data - at)?;
            counter.add(data - at);
            at = data;
            continue;
        }
        let hole = seek(file, SeekFrom::Hole(at)).map_or(size, |hole| hole.min(size));
        seek(file, SeekFrom::Start(at))
            .map_err(|error| Sending::Host(failed("read", path, error.into())))?;
        send_data(file, path, upload, counter, hole.saturating_sub(at))?;
        at = hole.max(at + 1);
    }
    Ok(())
}

/// Why sending ended: reading here, or the guest.
#[derive(Debug)]
pub(super) enum Sending {
    Host(CopyError),
    Guest(CallError),
}

impl From<CallError> for Sending {
    fn from(error: CallError) -> Self {
        Self::Guest(error)
    }
}

/// Of a regular file: straight from the page cache to the socket.
fn send_data(
    file: &File,
    path: &Path,
    upload: &mut Upload<UnixStream>,
    counter: &mut Counter<'_>,
    length: u64,
) -> Result<(), Sending> {
    let mut left = length;
    while left > 0 {
        let sent = upload.send_file(file, left.min(LONG_CHUNK as u64));
        let sent = sent.map_err(|error| match error {
            SendError::Call(error) => Sending::Guest(error),
            SendError::File(errno) => Sending::Host(failed("read", path, errno.into())),
        })?;
        if sent == 0 {
            break;
        }
        counter.add(sent);
        left = left.saturating_sub(sent);
    }
    Ok(())
}

/// Of a pipe or the like, up to its end.
fn send_range(
    mut file: &File,
    path: &Path,
    upload: &mut Upload<UnixStream>,
    counter: &mut Counter<'_>,
    mut left: u64,
) -> Result<(), Sending> {
    while left > 0 {
        let space = upload.space();
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(space.len());
        match file.read(space.get_mut(..room).unwrap_or_default()) {
            Ok(0) => break,
            Ok(got) => {
                upload.filled(got)?;
                counter.add(got as u64);
                left = left.saturating_sub(got as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Sending::Host(failed("read", path, error))),
        }
    }
    Ok(())
}

/// A file of this machine that a guest's content is written to. Dropped before [`Self::finish`] it goes
/// away again, if it was made for this.
#[derive(Debug)]
pub(super) struct HostFile {
    file: File,
    path: PathBuf,
    position: u64,
    /// Length of what was there before. It is written over and cut at the end: cutting it first would give
    /// back pages that are needed again.
    old: u64,
    is_new: bool,
    is_regular: bool,
    done: bool,
}

impl HostFile {
    /// `may_follow`: the user named this very path; otherwise its last part came from the guest, and a
    /// symlink that an earlier copy left there leads nowhere.
    pub(super) fn create(path: &Path, may_follow: bool) -> Result<Self, CopyError> {
        let error = |source| failed("write", path, source);
        if !may_follow
            && path
                .symlink_metadata()
                .is_ok_and(|info| info.file_type().is_symlink())
        {
            std::fs::remove_file(path).map_err(error)?;
        }
        let is_new = path.symlink_metadata().is_err();
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        if !may_follow {
            options.custom_flags(libc::O_NOFOLLOW);
        }
        let file = options.open(path).map_err(error)?;
        let info = file.metadata().map_err(error)?;
        let is_regular = info.is_file();
        Ok(Self {
            file,
            path: path.to_owned(),
            position: 0,
            old: if is_regular { info.len() } else { 0 },
            is_new,
            is_regular,
            done: false,
        })
    }

    pub(super) fn take(&mut self, piece: &Piece<'_>) -> Result<(), CopyError> {
        let written = match piece {
            Piece::Data(data) if self.is_regular => {
                let at = self.position;
                self.position = at.saturating_add(data.len() as u64);
                self.file.write_all_at(data, at)
            }
            Piece::Data(data) => io::Write::write_all(&mut self.file, data),
            Piece::Hole(length) if self.is_regular => {
                let cut = self.cut();
                self.position = self.position.saturating_add(*length);
                cut
            }
            Piece::Hole(length) => {
                io::copy(&mut io::repeat(0).take(*length), &mut self.file).map(drop)
            }
            Piece::End(_) | Piece::Error(_) => Ok(()),
        };
        written.map_err(|source| failed("write", &self.path, source))
    }

    /// Nothing of what was there before is left behind the position.
    fn cut(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.old) > self.position {
            self.file.set_len(self.position)?;
        }
        Ok(())
    }

    /// Mode (of a new file) and time are the guest's.
    pub(super) fn finish(mut self, info: &v1::FileInfo) -> Result<(), CopyError> {
        let cut = self.cut();
        let error = |source| failed("write", &self.path, source);
        cut.map_err(error)?;
        if self.is_regular {
            let size = self.file.metadata().map_err(error)?.len();
            if size < self.position {
                self.file.set_len(self.position).map_err(error)?;
            }
            if self.is_new {
                let mode = Permissions::from_mode(info.mode & MODE_MASK);
                self.file.set_permissions(mode).map_err(error)?;
            }
            let times = Timestamps {
                last_access: Timespec {
                    tv_sec: 0,
                    tv_nsec: UTIME_NOW as _,
                },
                last_modification: Timespec {
                    tv_sec: info.modified_ns.div_euclid(1_000_000_000),
                    tv_nsec: info.modified_ns.rem_euclid(1_000_000_000),
                },
            };
            futimens(&self.file, &times).map_err(|errno| error(errno.into()))?;
        }
        self.done = true;
        Ok(())
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        if self.is_new && self.is_regular && !self.done {
            // Half a file helps nobody; the failure is told by whoever has it.
            let _ = std::fs::remove_file(&self.path);
        } else if !self.done {
            // A beginning of the new content, and nothing of the old.
            let _ = self.cut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, pieces: &[Piece<'_>], finish: bool) {
        let mut file = HostFile::create(path, true).unwrap();
        for piece in pieces {
            file.take(piece).unwrap();
        }
        if finish {
            file.finish(&v1::FileInfo::default()).unwrap();
        }
    }

    #[test]
    fn nothing_of_longer_content_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let old = [b'o'; 10_000];
        std::fs::write(&path, old).unwrap();
        write(&path, &[Piece::Data(b"new")], true);
        assert_eq!(std::fs::read(&path).unwrap(), b"new");

        std::fs::write(&path, old).unwrap();
        let pieces = [Piece::Data(b"a"), Piece::Hole(5000), Piece::Data(b"z")];
        write(&path, &pieces, true);
        let mut expected = vec![0; 5002];
        expected[0] = b'a';
        expected[5001] = b'z';
        assert_eq!(std::fs::read(&path).unwrap(), expected);

        std::fs::write(&path, old).unwrap();
        write(&path, &[Piece::Data(b"half")], false);
        assert_eq!(std::fs::read(&path).unwrap(), b"half");

        std::fs::write(&path, old).unwrap();
        write(&path, &[], true);
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn half_a_file_that_was_made_for_it_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, &[Piece::Data(b"half")], false);
        assert!(!path.exists());
    }
}
