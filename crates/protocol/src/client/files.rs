//! File calls: one connection each, on streams that are made for them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{CallError, Connection, Stream, is_timeout, send_bytes};
use crate::frame;
use crate::transfer::{
    CHUNK, ChunkBuffer, ChunkReader, LONG_CHUNK, Piece, TransferError, announce,
};
use crate::v1::{self, file_chunk, reply::Result as Answer, request::Call};

/// Bytes that may wait in the socket of an upload. Linux gives less if it is set up so.
const SEND_BUFFER: usize = 1 << 20;

/// Makes a function for a call with a single reply.
macro_rules! simple {
    ($(#[$doc:meta])* $name:ident, $call:ident($message:ident) -> $answer:ident($result:ident)) => {
        $(#[$doc])*
        pub fn $name<S: Stream>(
            stream: S,
            call: v1::$message,
            deadline: Option<Instant>,
        ) -> Result<v1::$result, CallError> {
            let doing = stringify!($name);
            match Connection::new(stream).call(Call::$call(call), doing, deadline)? {
                (_, Answer::$answer(result)) => Ok(result),
                _ => Err(CallError::Unexpected(doing)),
            }
        }
    };
}

simple! {
    /// What a path is.
    stat, Stat(Stat) -> Stat(FileInfo)
}
simple! {
    /// Makes a directory.
    make_directory, MakeDirectory(MakeDirectory) -> Changed(Changed)
}
simple! {
    /// Removes a file, or a directory with all that is in it.
    remove, Remove(Remove) -> Changed(Changed)
}
simple! {
    /// Gives a file another name.
    rename, Rename(Rename) -> Changed(Changed)
}
simple! {
    /// Copies within the guest.
    copy, Copy(CopyPath) -> Changed(Changed)
}
simple! {
    /// Makes a symlink or another name for a file.
    make_link, MakeLink(MakeLink) -> Changed(Changed)
}
simple! {
    /// Mode, owner, times, length.
    change, Change(Change) -> Changed(Changed)
}
simple! {
    /// Sets, removes and lists extended attributes.
    xattrs, Xattrs(Xattrs) -> Xattrs(XattrList)
}
simple! {
    /// How full a file system is.
    stat_fs, StatFs(StatFs) -> StatFs(FileSystemInfo)
}

/// Lists a directory: `take` gets each entry as it comes. Returns the cursor to go on with; empty: that
/// was all. `idle` bounds each wait for a page.
pub fn list_directory<S: Stream, E: From<CallError>>(
    stream: S,
    call: v1::ListDirectory,
    idle: Option<Duration>,
    mut take: impl FnMut(v1::DirectoryEntry) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    let doing = "list_directory";
    let soon = || idle.and_then(|idle| Instant::now().checked_add(idle));
    let mut connection = Connection::new(stream);
    match connection.call(Call::ListDirectory(call), doing, soon())? {
        (_, Answer::ListDirectory(_)) => {}
        _ => return Err(CallError::Unexpected(doing).into()),
    }
    loop {
        let page: v1::DirectoryPage = connection
            .receive(doing, soon())?
            .ok_or(CallError::Closed { doing })?;
        for entry in page.entries {
            take(entry)?;
        }
        if let Some(error) = page.error {
            return Err(CallError::from(error).into());
        }
        if page.last {
            return Ok(page.cursor);
        }
    }
}

/// A file or a tree that the agent sends.
#[derive(Debug)]
pub struct Download<S> {
    connection: Connection<S>,
    doing: &'static str,
}

/// Begins to read a file: what it is, and its content.
pub fn read_file<S: Stream>(
    stream: S,
    call: v1::ReadFile,
    deadline: Option<Instant>,
) -> Result<(v1::FileInfo, Download<S>), CallError> {
    let doing = "read_file";
    let mut connection = Connection::new(stream);
    match connection.call(Call::ReadFile(call), doing, deadline)? {
        (_, Answer::ReadFile(info)) => Ok((info, Download { connection, doing })),
        _ => Err(CallError::Unexpected(doing)),
    }
}

/// Begins to read a tree: what its root is, and a tar stream.
pub fn read_tree<S: Stream>(
    stream: S,
    call: v1::ReadTree,
    deadline: Option<Instant>,
) -> Result<(v1::FileInfo, Download<S>), CallError> {
    let doing = "read_tree";
    let mut connection = Connection::new(stream);
    match connection.call(Call::ReadTree(call), doing, deadline)? {
        (_, Answer::ReadTree(started)) => Ok((
            started.info.unwrap_or_default(),
            Download { connection, doing },
        )),
        _ => Err(CallError::Unexpected(doing)),
    }
}

impl<S: Stream> Download<S> {
    /// Reads to the end; `take` gets data and holes as they come. `idle` bounds each wait for bytes.
    pub fn run<E: From<CallError>>(
        mut self,
        idle: Option<Duration>,
        mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<v1::TransferEnd, E> {
        let doing = self.doing;
        let connection = &mut self.connection;
        let limited = connection.stream.limit_reads(idle);
        limited.map_err(|source| CallError::Io { doing, source })?;
        let mut reader = ChunkReader::new();
        loop {
            let mut input = connection
                .buffer
                .get(connection.unread.clone())
                .unwrap_or_default();
            while let Some(piece) = reader
                .feed(&mut input)
                .map_err(|source| broken(doing, source))?
            {
                match piece {
                    Piece::End(end) => return Ok(end),
                    Piece::Error(error) => return Err(CallError::from(error).into()),
                    piece => take(piece)?,
                }
            }
            if connection.buffer.len() < CHUNK {
                connection.buffer.resize(CHUNK, 0);
            }
            connection.unread = 0..0;
            match connection.stream.read(&mut connection.buffer) {
                Ok(0) => return Err(CallError::Closed { doing }.into()),
                Ok(got) => connection.unread = 0..got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(CallError::Closed { doing }.into());
                }
                Err(error) if is_timeout(&error) => {
                    return Err(CallError::Timeout { doing }.into());
                }
                Err(source) => return Err(CallError::Io { doing, source }.into()),
            }
        }
    }
}

fn broken(doing: &'static str, source: TransferError) -> CallError {
    CallError::Transfer { doing, source }
}

/// A file or a tree that the agent takes.
#[derive(Debug)]
pub struct Upload<S> {
    connection: Connection<S>,
    buffer: ChunkBuffer,
    doing: &'static str,
    idle: Option<Duration>,
}

/// Why a file was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The agent, or the way to it.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The file cannot be read.
    #[error("cannot read the file: {}", io::Error::from(*.0))]
    File(#[from] Errno),
}

/// Begins to write a file. `idle` bounds each wait for the agent, now and later.
pub fn write_file<S: Stream + AsFd>(
    stream: S,
    call: v1::WriteFile,
    idle: Option<Duration>,
) -> Result<Upload<S>, CallError> {
    Upload::start(stream, Call::WriteFile(call), "write_file", idle)
}

/// Begins to write a tree: a tar stream. `idle` bounds each wait for the agent, now and later.
pub fn write_tree<S: Stream + AsFd>(
    stream: S,
    call: v1::WriteTree,
    idle: Option<Duration>,
) -> Result<Upload<S>, CallError> {
    Upload::start(stream, Call::WriteTree(call), "write_tree", idle)
}

impl<S: Stream + AsFd> Upload<S> {
    fn start(
        stream: S,
        call: Call,
        doing: &'static str,
        idle: Option<Duration>,
    ) -> Result<Self, CallError> {
        let mut connection = Connection::new(stream);
        let deadline = idle.and_then(|idle| Instant::now().checked_add(idle));
        match connection.call(call, doing, deadline)? {
            (_, Answer::WriteFile(_) | Answer::WriteTree(_)) => {}
            _ => return Err(CallError::Unexpected(doing)),
        }
        let limited = connection.stream.limit_writes(idle);
        limited.map_err(|source| CallError::Io { doing, source })?;
        // Fewer turns between the two ends; without it the transfer is slower, and nothing else.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&connection.stream, SEND_BUFFER);
        Ok(Self {
            connection,
            buffer: ChunkBuffer::new(),
            doing,
            idle,
        })
    }

    /// Where the next bytes may be put; never empty. Call [`Self::filled`] with how much it was.
    pub fn space(&mut self) -> &mut [u8] {
        self.buffer.space()
    }

    /// Takes bytes that were put into [`Self::space`]; sends what makes a full frame.
    pub fn filled(&mut self, count: usize) -> Result<(), CallError> {
        self.buffer.filled(count);
        if self.buffer.is_full() {
            self.flush()?;
        }
        Ok(())
    }

    /// Takes bytes from elsewhere.
    pub fn put(&mut self, mut data: &[u8]) -> Result<(), CallError> {
        while !data.is_empty() {
            let count = self.buffer.put(data);
            data = data.get(count..).unwrap_or_default();
            if self.buffer.is_full() {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Sends at most `length` bytes of a file from where it stands, without their passing through this
    /// program where the system can do that. Returns how many there were.
    pub fn send_file(&mut self, file: impl AsFd, length: u64) -> Result<u64, SendError> {
        let file = file.as_fd();
        self.flush()?;
        let mut sent = 0;
        while sent < length {
            let size = rustix::fs::fstat(file)?.st_size;
            let position = rustix::fs::tell(file)?;
            let there = u64::try_from(size).unwrap_or(0).saturating_sub(position);
            let wanted = there.min(length - sent).min(LONG_CHUNK as u64);
            if wanted == 0 {
                break;
            }
            let wanted = usize::try_from(wanted).unwrap_or(0);
            self.check_early()?;
            let header = announce(wanted);
            let begun = send_bytes(&mut self.connection.stream, &header, self.doing, None);
            self.explain(begun)?;
            self.send_promised(file, wanted)?;
            sent = sent.saturating_add(wanted as u64);
        }
        Ok(sent)
    }

    fn send_promised(&mut self, file: BorrowedFd<'_>, mut left: usize) -> Result<(), SendError> {
        while left > 0 {
            let doing = self.doing;
            match rustix::fs::sendfile(&self.connection.stream, file, None, left) {
                // The file became shorter: the promise cannot be kept, and the stream is of no use.
                Ok(0) => return Err(SendError::File(Errno::NODATA)),
                Ok(count) => left = left.saturating_sub(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(CallError::Timeout { doing }.into()),
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    return Ok(self.explain(Err(CallError::Closed { doing }))?);
                }
                // No page cache, as in some file systems: by hand.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    let mut data = vec![0; left.min(CHUNK)];
                    let got = rustix::io::read(file, &mut data)?;
                    if got == 0 {
                        return Err(SendError::File(Errno::NODATA));
                    }
                    let data = data.get(..got).unwrap_or_default();
                    let sent = send_bytes(&mut self.connection.stream, data, doing, None);
                    self.explain(sent)?;
                    left = left.saturating_sub(got);
                }
                Err(errno) => return Err(SendError::File(errno)),
            }
        }
        Ok(())
    }

    /// Says that `length` zero bytes follow which are a hole.
    pub fn hole(&mut self, length: u64) -> Result<(), CallError> {
        self.flush()?;
        self.send(file_chunk::Piece::Hole(length))
    }

    /// Sends what is held.
    pub fn flush(&mut self) -> Result<(), CallError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.check_early()?;
        let sent = send_bytes(
            &mut self.connection.stream,
            self.buffer.frame(),
            self.doing,
            None,
        );
        self.buffer.clear();
        self.explain(sent)
    }

    /// Tells the end and waits for the result.
    pub fn finish(mut self) -> Result<v1::WriteDone, CallError> {
        self.flush()?;
        self.send(file_chunk::Piece::End(v1::TransferEnd::default()))?;
        self.result()
    }

    /// Tells the agent that the source failed: it keeps what came so far as if the connection had broken.
    pub fn abort(mut self, error: v1::Error) -> Result<(), CallError> {
        self.buffer.clear();
        self.send(file_chunk::Piece::Error(error))
    }

    fn send(&mut self, piece: file_chunk::Piece) -> Result<(), CallError> {
        let mut bytes = Vec::new();
        frame::encode(&v1::FileChunk { piece: Some(piece) }, &mut bytes)?;
        let sent = send_bytes(&mut self.connection.stream, &bytes, self.doing, None);
        self.explain(sent)
    }

    /// The agent says nothing before the end, unless it failed.
    fn check_early(&mut self) -> Result<(), CallError> {
        let mut set = [PollFd::new(&self.connection.stream, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut set, Some(&now)) {
            Ok(1) => self.result().and(Err(CallError::Unexpected(self.doing))),
            _ => Ok(()),
        }
    }

    /// A connection that broke while sending may hold the reason.
    fn explain(&mut self, sent: Result<(), CallError>) -> Result<(), CallError> {
        match sent {
            Err(CallError::Closed { doing }) => self.result().and(Err(CallError::Closed { doing })),
            other => other,
        }
    }

    fn result(&mut self) -> Result<v1::WriteDone, CallError> {
        let doing = self.doing;
        let deadline = self.idle.and_then(|idle| Instant::now().checked_add(idle));
        let result: v1::TransferResult = self
            .connection
            .receive_lists(doing, deadline)?
            .ok_or(CallError::Closed { doing })?;
        match result.result {
            Some(v1::transfer_result::Result::Done(done)) => Ok(done),
            Some(v1::transfer_result::Result::Error(error)) => Err(error.into()),
            None => Err(CallError::Unexpected(doing)),
        }
    }
}
