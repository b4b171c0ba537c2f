//! Non-blocking Unix stream sockets whose data goes straight from and to guest RAM.
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use vm_memory::GuestMemoryBackend;

use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// Longest path of a Unix socket in bytes: `sun_path` has 108 with the NUL.
pub const MAX_PATH: usize = 107;

/// Waiting connections the kernel keeps for us (`net.core.somaxconn` may lower it).
const BACKLOG: i32 = 256;

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("socket path {path} has {len} bytes; a Unix socket's may have at most {MAX_PATH}")]
    TooLong { path: PathBuf, len: usize },
    #[error("{path} is in use: another process listens on it")]
    InUse { path: PathBuf },
    #[error("{path} exists and is not a socket")]
    NotASocket { path: PathBuf },
    #[error("listening on {path}: {source}")]
    Listen { path: PathBuf, source: io::Error },
    #[error("the descriptor is not a listening Unix stream socket")]
    NotAListener,
    #[error("preparing the listening descriptor: {0}")]
    Descriptor(io::Error),
}

/// A listening socket. One that was bound here is removed from the file system on drop.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    bound: Option<SocketFile>,
}

/// A socket file, known by more than its name so that nobody else's is removed.
#[derive(Clone, Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let file = std::fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: file.dev(),
            inode: file.ino(),
        })
    }

    /// Removes the file, unless another has taken its place.
    pub fn remove(&self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == (self.device, self.inode));
        if ours {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens on `path`. A socket file there that nobody listens on is a dead process's: it
    /// is replaced.
    ///
    /// # Errors
    /// The path is too long, served by a live process, or something else than a socket.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let len = path.as_os_str().len();
        if len > MAX_PATH {
            let path = path.to_owned();
            return Err(ListenError::TooLong { path, len });
        }
        let failed = |source: io::Error| ListenError::Listen {
            path: path.to_owned(),
            source,
        };
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        let fd = stream_socket().map_err(failed)?;
        match rustix::net::bind(&fd, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::ADDRINUSE) => {
                remove_stale(path)?;
                rustix::net::bind(&fd, &address).map_err(|e| failed(e.into()))?;
            }
            Err(e) => return Err(failed(e.into())),
        }
        let bound = Some(SocketFile::of(path).map_err(failed)?);
        let listener = Self { fd, bound };
        rustix::net::listen(&listener.fd, BACKLOG).map_err(|e| failed(e.into()))?;
        Ok(listener)
    }

    /// Takes over a socket that listens already.
    ///
    /// # Errors
    /// It is something else, or cannot be made non-blocking.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, ListenError> {
        let listens = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&fd) == Ok(SocketType::STREAM)
            && sockopt::socket_acceptconn(&fd) == Ok(true);
        if !listens {
            return Err(ListenError::NotAListener);
        }
        rustix::fs::fcntl_getfl(&fd)
            .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK))
            .map_err(|e| ListenError::Descriptor(e.into()))?;
        Ok(Self { fd, bound: None })
    }

    /// The file that was made here, to be removed by whoever ends the process without drops.
    pub fn socket_file(&self) -> Option<SocketFile> {
        self.bound.clone()
    }

    /// The listening descriptor alone: the socket file stays, for its owner to remove.
    pub fn into_fd(mut self) -> io::Result<OwnedFd> {
        self.bound = None;
        self.fd.try_clone()
    }

    /// Takes the next waiting connection; `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<Stream> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other.map(Stream)?),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.bound {
            file.remove();
        }
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// Removes a socket file that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Listen {
        path: path.to_owned(),
        source,
    };
    let path_of = || path.to_owned();
    let file = std::fs::symlink_metadata(path).map_err(failed)?;
    if !file.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path_of() });
    }
    match Stream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // Connected, or its backlog is full, or it is not a stream socket: somebody's.
        Ok(_) => Err(ListenError::InUse { path: path_of() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            Err(ListenError::InUse { path: path_of() })
        }
        Err(e) => Err(failed(e)),
    }
}

/// A connected, non-blocking stream socket. No call raises SIGPIPE.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Stream {
    /// Connects to the socket file `path`. On Unix sockets this succeeds or fails at once:
    /// `ConnectionRefused` or `NotFound` without a listener, `WouldBlock` with a full backlog.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let fd = stream_socket()?;
        rustix::net::connect(&fd, &address)?;
        Ok(Self(fd))
    }

    /// Reads what is there; 0 is the end of the stream.
    pub fn recv(&self, data: &mut [u8]) -> io::Result<usize> {
        retry(|| Ok(rustix::net::recv(&self.0, &mut *data, RecvFlags::empty())?.0))
    }

    /// Writes as much as fits.
    pub fn send(&self, data: &[u8]) -> io::Result<usize> {
        retry(|| Ok(rustix::net::send(&self.0, data, SendFlags::NOSIGNAL)?))
    }

    /// Fills `buffers` from the socket in order; 0 is the end of the stream.
    pub fn recv_vectored(&self, buffers: &IoVecs<'_>) -> io::Result<usize> {
        let (fd, vecs) = (self.raw(), &buffers.vecs);
        retry(|| {
            let count = libc::c_int::try_from(vecs.len()).unwrap_or(libc::c_int::MAX);
            // SAFETY: `count` iovecs, made by `IoVecs::push` from guest RAM, which stays mapped
            // for the lifetime that `buffers` carries. Guest RAM is only ever accessed as
            // volatile memory, so the kernel's writes race with nothing Rust relies on.
            check(unsafe { libc::readv(fd, vecs.as_ptr(), count) })
        })
    }

    /// Writes as much of `buffers` as fits, in order.
    pub fn send_vectored(&self, buffers: &IoVecs<'_>) -> io::Result<usize> {
        // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = buffers.vecs.as_ptr().cast_mut();
        message.msg_iovlen = buffers.vecs.len();
        retry(|| {
            // SAFETY: the message names `msg_iovlen` iovecs that live as long as `buffers`; the
            // kernel reads them and the guest RAM behind them, and writes to neither.
            check(unsafe { libc::sendmsg(self.raw(), &raw const message, libc::MSG_NOSIGNAL) })
        })
    }

    /// The peer will read the end of the stream after what was sent.
    pub fn finish_sending(&self) {
        // Fails only if the peer is gone, which the next read tells.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Write);
    }

    /// The peer's writes fail from now on.
    pub fn stop_receiving(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Read);
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Stream {
    /// `fd` must be non-blocking.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Most pieces of guest RAM in one system call (`UIO_MAXIOV`).
pub const MAX_VECS: usize = 1024;

/// Pieces of guest RAM for one vectored call. `'m` is the borrow of guest RAM.
#[derive(Debug, Default)]
pub struct IoVecs<'m> {
    vecs: Vec<libc::iovec>,
    bytes: usize,
    memory: PhantomData<&'m GuestRam>,
}

/// The array of an [`IoVecs`] between two uses, so that no call allocates.
#[derive(Debug, Default)]
pub struct Spare(Vec<libc::iovec>);

// SAFETY: a spare array is empty: it holds no pointers.
unsafe impl Send for Spare {}

impl<'m> IoVecs<'m> {
    /// Empty, with the array of `spare`.
    pub fn new(spare: &mut Spare) -> Self {
        Self {
            vecs: std::mem::take(&mut spare.0),
            bytes: 0,
            memory: PhantomData,
        }
    }

    /// Gives the array back.
    pub fn recycle(mut self, spare: &mut Spare) {
        self.vecs.clear();
        spare.0 = self.vecs;
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Appends up to `limit` bytes of `segments`, `skip` bytes from their start. Returns how many
    /// were appended: fewer where `segments` end, are not in RAM, or [`MAX_VECS`] is reached.
    pub fn push(
        &mut self,
        mem: &'m GuestRam,
        segments: &[Segment],
        skip: u32,
        limit: usize,
    ) -> usize {
        let before = self.bytes;
        let mut skip = u64::from(skip);
        let mut left = limit;
        for segment in segments {
            let len = u64::from(segment.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let Some(addr) = segment.addr.0.checked_add(skip) else {
                break;
            };
            let want = usize::try_from(len - skip).unwrap_or(usize::MAX).min(left);
            skip = 0;
            if want == 0 {
                break;
            }
            let pieces = GuestMemoryBackend::get_slices(mem, vm_memory::GuestAddress(addr), want);
            for piece in pieces {
                let Ok(piece) = piece else {
                    return self.bytes - before;
                };
                if self.vecs.len() == MAX_VECS {
                    return self.bytes - before;
                }
                self.vecs.push(libc::iovec {
                    iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                    iov_len: piece.len(),
                });
                self.bytes += piece.len();
                left -= piece.len();
            }
        }
        self.bytes - before
    }
}
