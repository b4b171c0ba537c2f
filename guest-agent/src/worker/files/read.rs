//! Reading a file: ranges, and holes as such.

use std::os::fd::{AsFd, BorrowedFd};

use belljar_protocol::transfer::ChunkBuffer;
use belljar_protocol::v1::{self, error::Code, file_chunk::Piece, reply::Result as Answer};
use rustix::fs::{FileType, OFlags, SeekFrom, seek};
use rustix::io::{Errno, pread};

use super::info::{Names, describe, file_type, of_descriptor};
use super::path::GuestPath;
use super::rights::{Rights, reopen};
use super::{failed, refusal};
use crate::worker::conn::{Conn, ConnError, send_all};
use crate::worker::{Answered, Context, Outcome};

/// How regular files are opened: should it have become something else meanwhile, nothing waits.
pub(super) const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::NOFOLLOW);

pub(super) fn read(context: &Context, conn: &mut Conn, call: &v1::ReadFile) -> Answered {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let found = rights
        .find(&path, !call.no_follow)
        .map_err(|errno| failed("read", &path, errno))?;
    let what = of_descriptor(found.as_fd()).map_err(|errno| failed("read", &path, errno))?;
    check_regular("read", &path, file_type(&what))?;
    let file = reopen(&found, READ.difference(OFlags::NOFOLLOW))
        .map_err(|errno| failed("read", &path, errno))?;
    drop(found);
    let info = describe(&what, &mut Names::default());
    let size = info.size;
    let is_sparse = call.sparse && info.allocated < size;
    conn.send(&context.head(Answer::ReadFile(info)))?;
    let range = Range::new(call.offset, call.length, size);
    let mut sender = Sender::new(conn);
    let sent = if is_sparse {
        send_sparse(&mut sender, file.as_fd(), range)
    } else {
        send_data(&mut sender, file.as_fd(), range.from, range.to).map(drop)
    };
    let last = match sent {
        Ok(()) => {
            sender.flush()?;
            Piece::End(v1::TransferEnd::default())
        }
        Err(Broken::System(errno)) => {
            sender.flush()?;
            Piece::Error(failed("read", &path, errno))
        }
        Err(Broken::Gone(error)) => return Err(error.into()),
    };
    sender.conn.send(&v1::FileChunk { piece: Some(last) })?;
    drop(rights);
    Ok(Outcome::Streamed)
}

/// Nothing else is opened: a FIFO would wait, and a device may act on being opened.
pub(super) fn check_regular(
    doing: &str,
    path: &GuestPath,
    kind: FileType,
) -> Result<(), v1::Error> {
    let name = match kind {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => return Err(failed(doing, path, Errno::ISDIR)),
        FileType::Symlink => return Err(failed(doing, path, Errno::LOOP)),
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "of an unknown type",
    };
    Err(refusal(
        Code::Invalid,
        format!("cannot {doing} {path}: it is {name}, not a regular file"),
    ))
}

/// Why sending ended early.
#[derive(Debug)]
pub(super) enum Broken {
    System(Errno),
    Gone(ConnError),
}

impl From<Errno> for Broken {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

impl From<ConnError> for Broken {
    fn from(error: ConnError) -> Self {
        Self::Gone(error)
    }
}

#[derive(Debug, Clone, Copy)]
struct Range {
    from: u64,
    to: u64,
}

impl Range {
    /// A file that is written to while it is read ends where it ended at first. Files of the kernel say
    /// nothing about their size.
    fn new(offset: u64, length: Option<u64>, size: u64) -> Self {
        let end = if size == 0 { u64::MAX } else { size };
        let to = length.map_or(end, |length| offset.saturating_add(length).min(end));
        Self { from: offset, to }
    }
}

/// Fills frames and sends them.
#[derive(Debug)]
pub(super) struct Sender<'a> {
    pub(super) conn: &'a mut Conn,
    buffer: ChunkBuffer,
}

impl<'a> Sender<'a> {
    pub(super) fn new(conn: &'a mut Conn) -> Self {
        Self {
            conn,
            buffer: ChunkBuffer::new(),
        }
    }

    /// Room for at most `wanted` bytes.
    pub(super) fn space(&mut self, wanted: u64) -> &mut [u8] {
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        let space = self.buffer.space();
        let room = space.len().min(wanted);
        space.get_mut(..room).unwrap_or_default()
    }

    pub(super) fn filled(&mut self, count: usize) -> Result<(), ConnError> {
        self.buffer.filled(count);
        if self.buffer.is_full() {
            self.flush()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<(), ConnError> {
        if !self.buffer.is_empty() {
            send_all(self.conn.as_fd(), self.buffer.frame())?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn hole(&mut self, length: u64) -> Result<(), ConnError> {
        self.flush()?;
        let piece = Some(Piece::Hole(length));
        self.conn.send(&v1::FileChunk { piece })
    }
}

/// Sends bytes [from, to) or up to the end of the file; returns where it ended.
fn send_data(
    sender: &mut Sender<'_>,
    file: BorrowedFd<'_>,
    mut from: u64,
    to: u64,
) -> Result<u64, Broken> {
    while from < to {
        match pread(file, sender.space(to - from), from) {
            // The end; or a file of the kernel with nothing in it now.
            Ok(0) | Err(Errno::AGAIN) => break,
            Ok(got) => {
                from = from.saturating_add(got as u64);
                sender.filled(got)?;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(from)
}

fn send_sparse(sender: &mut Sender<'_>, file: BorrowedFd<'_>, range: Range) -> Result<(), Broken> {
    let mut at = range.from;
    while at < range.to {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(range.to),
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => range.to,
            Err(errno) => return Err(errno.into()),
        };
        if data > at {
            sender.hole(data - at)?;
            at = data;
            continue;
        }
        let hole = match seek(file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.min(range.to),
            // It became shorter meanwhile.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = send_data(sender, file, at, hole)?;
        if end < hole {
            break;
        }
        at = hole;
    }
    Ok(())
}
