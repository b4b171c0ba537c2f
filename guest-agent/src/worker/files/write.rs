//! Writing a file: in place, or beside it and then in its place.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use belljar_protocol::transfer::{ChunkReader, Piece};
use belljar_protocol::v1::{
    self, error::Code, reply::Result as Answer, transfer_result, write_file,
};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, StatxFlags, fallocate, fchmod, fchown,
    fstat, fsync, ftruncate, linkat, renameat, statx, unlinkat,
};
use rustix::io::{Errno, pwrite};

use super::change::{Owner, set_modified};
use super::path::GuestPath;
use super::read::check_regular;
use super::rights::{Rights, descriptor_path, reopen};
use super::{failed, info, make, refusal};
use crate::worker::conn::{Conn, ConnError};
use crate::worker::{Answered, Context, Outcome};

/// Of a new file, unless the call says.
const DEFAULT_MODE: u32 = 0o644;

/// Longest file.
const MAX_SIZE: u64 = i64::MAX as u64;

/// Bytes of zeros written at a time where a hole cannot be made.
const ZEROS: usize = 64 << 10;

pub(super) fn write(context: &Context, conn: &mut Conn, call: &v1::WriteFile) -> Answered {
    let path = GuestPath::new(&call.path)?;
    let owner = Owner::parse(&call.owner, true)?;
    let rights = Rights::of(&call.user)?;
    if call.parents {
        let (above, _) = path.split()?;
        make::directories(&rights, &above, None, owner)?;
    }
    let mut target = Target::open(&rights, &path, call)?;
    conn.widen();
    conn.send(&context.head(Answer::WriteFile(v1::WriteStarted {})))?;
    let received = receive(conn, |piece| match piece {
        Piece::Data(data) => target.put(data),
        Piece::Hole(length) => target.hole(length),
        Piece::End(_) | Piece::Error(_) => Ok(()),
    });
    let result = match received {
        Ok(()) => target.finish(call, owner),
        Err(Broken::System(errno)) => Err(errno),
        Err(Broken::Refused(error)) => {
            drop(target);
            return send_result(conn, transfer_result::Result::Error(error));
        }
        Err(Broken::Gone(error)) => return Err(error.into()),
    };
    let result = match result {
        Ok(bytes) => transfer_result::Result::Done(v1::WriteDone {
            bytes,
            ..v1::WriteDone::default()
        }),
        Err(errno) => transfer_result::Result::Error(failed("write", &path, errno)),
    };
    drop(rights);
    send_result(conn, result)
}

pub(super) fn send_result(conn: &mut Conn, result: transfer_result::Result) -> Answered {
    conn.send(&v1::TransferResult {
        result: Some(result),
    })?;
    Ok(Outcome::Streamed)
}

/// Why receiving ended early.
#[derive(Debug)]
pub(super) enum Broken {
    System(Errno),
    Refused(v1::Error),
    Gone(ConnError),
}

impl From<Errno> for Broken {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

impl From<v1::Error> for Broken {
    fn from(error: v1::Error) -> Self {
        Self::Refused(error)
    }
}

impl From<ConnError> for Broken {
    fn from(error: ConnError) -> Self {
        Self::Gone(error)
    }
}

/// Takes the host's stream up to its end.
pub(super) fn receive<E: Into<Broken>>(
    conn: &mut Conn,
    mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<(), Broken> {
    let mut reader = ChunkReader::new();
    loop {
        let mut input = conn.peek()?;
        if input.is_empty() {
            return Err(Broken::Gone(ConnError::HungUp));
        }
        let count = input.len();
        loop {
            let piece = reader
                .feed(&mut input)
                .map_err(|error| refusal(Code::Invalid, error.to_string()))?;
            match piece {
                None => break,
                Some(Piece::End(_)) => {
                    let left = input.len();
                    conn.consume(count.saturating_sub(left));
                    return Ok(());
                }
                // The host gave up.
                Some(Piece::Error(_)) => return Err(Broken::Gone(ConnError::HungUp)),
                Some(piece) => take(piece).map_err(Into::into)?,
            }
        }
        conn.consume(count);
    }
}

/// Where a file without a name, or with a temporary one, goes at the end.
#[derive(Debug)]
struct Place {
    folder: OwnedFd,
    name: CString,
    /// Its name until then, removed with this value.
    temporary: Option<CString>,
    may_replace: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // Gone already, or cannot be helped.
            let _ = unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

/// A file that is being written.
#[derive(Debug)]
struct Target {
    file: OwnedFd,
    place: Option<Place>,
    /// Made by this call: mode and owner are set.
    is_new: bool,
    /// Mode and owner of the file whose place it takes.
    old: Option<(u32, u32, u32)>,
    appends: bool,
    /// Bytes that were there before: only in them holes must be made.
    kept: u64,
    /// What was there before goes at the end, as far as it is not written over. Cutting the file first
    /// would have ext4 write it out when it is closed, and give back pages that are needed again.
    cuts: bool,
    position: u64,
    taken: u64,
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.cuts {
            // A transfer that failed leaves a beginning of the new content, and nothing of the old.
            let _ = ftruncate(&self.file, self.position);
        }
    }
}

impl Target {
    fn open(rights: &Rights, path: &GuestPath, call: &v1::WriteFile) -> Result<Self, v1::Error> {
        match call.mode() {
            write_file::Mode::Replace | write_file::Mode::New => Self::beside(rights, path, call),
            mode => Self::in_place(rights, path, call, mode),
        }
    }

    fn in_place(
        rights: &Rights,
        path: &GuestPath,
        call: &v1::WriteFile,
        mode: write_file::Mode,
    ) -> Result<Self, v1::Error> {
        let error = |errno| failed("write", path, errno);
        let mut flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        if mode == write_file::Mode::Append {
            flags |= OFlags::APPEND;
        }
        let (file, is_new) = match rights.find(path, !call.no_follow) {
            Ok(found) => {
                let what = info::of_descriptor(found.as_fd()).map_err(error)?;
                check_regular("write", path, info::file_type(&what))?;
                (reopen(&found, flags).map_err(error)?, false)
            }
            Err(Errno::NOENT) => {
                let mut flags = flags | OFlags::CREATE;
                if call.no_follow {
                    flags |= OFlags::NOFOLLOW;
                }
                let mode = Mode::from_raw_mode(permissions(call) & 0o777);
                let file = rights.open(path, flags, mode).map_err(error)?;
                (file, true)
            }
            Err(errno) => return Err(error(errno)),
        };
        let size = fstat(&file)
            .map_err(error)
            .map(|stat| u64::try_from(stat.st_size).unwrap_or(0))?;
        let appends = mode == write_file::Mode::Append;
        let position = match mode {
            write_file::Mode::AtOffset => call.offset,
            _ => 0,
        };
        Ok(Self {
            file,
            place: None,
            is_new,
            old: None,
            appends,
            kept: if appends { 0 } else { size },
            cuts: mode == write_file::Mode::Truncate && size > 0,
            position,
            taken: 0,
        })
    }

    fn beside(rights: &Rights, path: &GuestPath, call: &v1::WriteFile) -> Result<Self, v1::Error> {
        let error = |errno| failed("write", path, errno);
        let may_replace = call.mode() == write_file::Mode::Replace;
        let (folder, name) = rights.parent(path)?;
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        let old = match statx(&folder, &name, nofollow, StatxFlags::BASIC_STATS) {
            Ok(_) if !may_replace => return Err(error(Errno::EXIST)),
            Ok(found) => match info::file_type(&found) {
                FileType::Directory => return Err(error(Errno::ISDIR)),
                FileType::RegularFile => Some((
                    u32::from(found.stx_mode) & 0o7777,
                    found.stx_uid,
                    found.stx_gid,
                )),
                _ => None,
            },
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(error(errno)),
        };
        let private = Mode::from_raw_mode(0o600);
        let nameless = rights.open_at(
            folder.as_fd(),
            c".",
            OFlags::TMPFILE | OFlags::WRONLY,
            private,
        );
        let (file, temporary) = match nameless {
            Ok(file) => (file, None),
            // The file system has no files without names.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let name = temporary_name().map_err(error)?;
                let file = rights
                    .open_at(folder.as_fd(), &name, flags, private)
                    .map_err(error)?;
                (file, Some(name))
            }
            Err(errno) => return Err(error(errno)),
        };
        Ok(Self {
            file,
            place: Some(Place {
                folder,
                name,
                temporary,
                may_replace,
            }),
            is_new: true,
            old,
            appends: false,
            kept: 0,
            cuts: false,
            position: 0,
            taken: 0,
        })
    }

    fn put(&mut self, mut data: &[u8]) -> Result<(), Errno> {
        while !data.is_empty() {
            let written = if self.appends {
                rustix::io::write(&self.file, data)
            } else if self.position > MAX_SIZE {
                Err(Errno::FBIG)
            } else {
                pwrite(&self.file, data, self.position)
            };
            match written {
                Ok(0) => return Err(Errno::IO),
                Ok(count) => {
                    self.position = self.position.saturating_add(count as u64);
                    self.taken = self.taken.saturating_add(count as u64);
                    data = data.get(count..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn hole(&mut self, length: u64) -> Result<(), Errno> {
        let end = |from: u64| {
            from.checked_add(length)
                .filter(|&end| end <= MAX_SIZE)
                .ok_or(Errno::FBIG)
        };
        if self.appends {
            let size = u64::try_from(fstat(&self.file)?.st_size).unwrap_or(0);
            ftruncate(&self.file, end(size)?)?;
        } else {
            let end = end(self.position)?;
            let kept = end.min(self.kept);
            if self.position < kept {
                punch(self.file.as_fd(), self.position, kept - self.position)?;
            }
            self.position = end;
        }
        self.taken = self.taken.saturating_add(length);
        Ok(())
    }

    /// Bytes taken, holes included.
    fn finish(mut self, call: &v1::WriteFile, owner: Owner) -> Result<u64, Errno> {
        if !self.appends {
            let size = u64::try_from(fstat(&self.file)?.st_size).unwrap_or(0);
            // The last piece was a hole, or something longer was there.
            if (size < self.position && self.taken > 0) || (self.cuts && size > self.position) {
                ftruncate(&self.file, self.position)?;
            }
            self.cuts = false;
        }
        if self.is_new || call.set_permissions {
            owner.apply_to(self.file.as_fd())?;
            let mut mode = permissions(call);
            if let Some((old, uid, gid)) = self.old {
                let kept = owner.is_given()
                    || fchown(&self.file, Some(make::uid(uid)), Some(make::gid(gid))).is_ok();
                if !call.set_permissions {
                    // Set-id bits belong to an owner.
                    mode = if kept { old } else { old & 0o777 };
                }
            }
            fchmod(&self.file, Mode::from_raw_mode(mode))?;
        } else if owner.is_given() {
            owner.apply_to(self.file.as_fd())?;
        }
        if let Some(modified) = call.modified_ns {
            set_modified(self.file.as_fd(), modified)?;
        }
        let is_durable = call.sync || call.mode() == write_file::Mode::Replace;
        if is_durable {
            fsync(&self.file)?;
        }
        if let Some(place) = &mut self.place {
            put_in_place(self.file.as_fd(), place, is_durable)?;
        }
        Ok(self.taken)
    }
}

fn put_in_place(file: BorrowedFd<'_>, place: &mut Place, is_durable: bool) -> Result<(), Errno> {
    let folder = place.folder.as_fd();
    let own = descriptor_path(file);
    if !place.may_replace {
        match &place.temporary {
            None => linkat(CWD, &own, folder, &place.name, AtFlags::SYMLINK_FOLLOW)?,
            // Its temporary name goes when `place` does.
            Some(name) => linkat(folder, name, folder, &place.name, AtFlags::empty())?,
        }
    } else {
        if place.temporary.is_none() {
            let name = temporary_name()?;
            linkat(CWD, &own, folder, &name, AtFlags::SYMLINK_FOLLOW)?;
            place.temporary = Some(name);
        }
        if let Some(name) = &place.temporary {
            renameat(folder, name, folder, &place.name)?;
        }
        place.temporary = None;
    }
    if is_durable {
        let folder = rustix::fs::openat(
            folder,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        // A directory that may be written to but not read cannot be synced.
        if let Ok(folder) = folder {
            fsync(folder)?;
        }
    }
    Ok(())
}

fn permissions(call: &v1::WriteFile) -> u32 {
    call.permissions.unwrap_or(DEFAULT_MODE) & 0o7777
}

fn temporary_name() -> Result<CString, Errno> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let number = u64::from_ne_bytes(random);
    Ok(CString::new(format!(".belljar-{number:016x}")).unwrap_or_default())
}

/// Makes a range zero, without blocks where the file system can.
fn punch(file: BorrowedFd<'_>, from: u64, length: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, from, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        other => return other,
    }
    let zeros = vec![0; ZEROS];
    let (mut at, end) = (from, from.saturating_add(length));
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(ZEROS).min(ZEROS);
        let written = pwrite(file, zeros.get(..wanted).unwrap_or_default(), at)?;
        if written == 0 {
            return Err(Errno::IO);
        }
        at = at.saturating_add(written as u64);
    }
    Ok(())
}
