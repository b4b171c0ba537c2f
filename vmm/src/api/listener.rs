//! The listening socket: making it, and saying why that fails.
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};

/// The API socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{path}: another process listens there; stop it or choose another path")]
    InUse { path: PathBuf },
    #[error(
        "{path}: a socket is left there by a process that is gone; remove it \
         (rm {path}) or choose another path"
    )]
    Stale { path: PathBuf },
    #[error("{path}: something that is no socket exists there; choose another path")]
    NotASocket { path: PathBuf },
    #[error(
        "{path}: the path has {length} bytes; a Unix socket's has at most 107: use a \
         shorter or a relative one"
    )]
    TooLong { path: PathBuf, length: usize },
    #[error("fd:{name}: the descriptor is not a listening Unix stream socket")]
    NotListening { name: String },
    #[error("{path}: cannot {what}: {error}")]
    Io {
        path: PathBuf,
        what: &'static str,
        error: io::Error,
    },
}

/// `sun_path` without its NUL.
const MAX_PATH: usize = 107;

/// A bound and listening socket. The file goes with it, if it is still the same.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) fd: OwnedFd,
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode: a socket that somebody else put there meanwhile is left alone.
    identity: Option<(u64, u64)>,
}

impl Listener {
    pub(super) fn at_path(path: &Path) -> Result<Self, BindError> {
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            return Err(BindError::TooLong {
                path: path.to_owned(),
                length,
            });
        }
        let io_error = |what| {
            move |e: rustix::io::Errno| BindError::Io {
                path: path.to_owned(),
                what,
                error: e.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(io_error("use this path"))?;
        let fd = stream_socket().map_err(io_error("make a socket"))?;
        match bind(&fd, &address) {
            Ok(()) => {}
            Err(rustix::io::Errno::ADDRINUSE) => return Err(why_in_use(path, &address)),
            Err(e) => return Err(io_error("make the socket there")(e)),
        }
        listen(&fd, 64).map_err(io_error("listen"))?;
        Ok(Self {
            fd,
            file: Some(SocketFile {
                path: path.to_owned(),
                identity: identity(path),
            }),
        })
    }

    /// A socket that listens already (`--api-sock fd:NAME`).
    pub(super) fn from_descriptor(name: &str, fd: OwnedFd) -> Result<Self, BindError> {
        let listens = sockopt::socket_acceptconn(&fd) == Ok(true)
            && sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&fd) == Ok(SocketType::STREAM);
        if !listens {
            return Err(BindError::NotListening {
                name: name.to_owned(),
            });
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| BindError::Io {
            path: PathBuf::from(format!("fd:{name}")),
            what: "make it non-blocking",
            error: e.into(),
        })?;
        Ok(Self { fd, file: None })
    }

    /// Takes the socket file away.
    pub(super) fn remove_file(&mut self) {
        if let Some(file) = self.file.take()
            && file.identity.is_some()
            && identity(&file.path) == file.identity
        {
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove_file();
    }
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    rustix::fs::lstat(path).ok().map(|s| (s.st_dev, s.st_ino))
}

fn why_in_use(path: &Path, address: &SocketAddrUnix) -> BindError {
    let path = path.to_owned();
    match rustix::fs::lstat(&path) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return BindError::NotASocket { path };
        }
        _ => {}
    }
    // A full backlog (EAGAIN) or a lack of permission means that somebody is there, too.
    match stream_socket().and_then(|probe| connect(&probe, address)) {
        Err(rustix::io::Errno::CONNREFUSED) => BindError::Stale { path },
        _ => BindError::InUse { path },
    }
}
