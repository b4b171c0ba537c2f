//! A listener on this machine whose connections go to a port of a guest.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use belljar_protocol::client::ports;
use belljar_protocol::{relay, v1};
use rustix::net::SocketFlags;

use super::spec::{Forward, Listen, Target};
use crate::guest::{self, GuestError};
use crate::poll::PollSet;
use crate::registry::Found;

/// Connections at a time, and so threads. Further ones wait in the listener's queue.
pub const MAX_CONNECTIONS: usize = 256;

/// Stack of a connection's thread.
const STACK: usize = 128 << 10;

/// How often a full forwarder looks whether a connection has ended.
const FULL_PAUSE: Duration = Duration::from_millis(10);

/// A pause after a failure to take a connection: out of descriptors, for example.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// A forwarding could not begin.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("cannot listen on {listen}: {source}")]
    Listen { listen: String, source: io::Error },
    #[error("cannot serve {listen}: {source}")]
    Start { listen: String, source: io::Error },
}

impl ForwardError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => Some(
                    "something else listens there: choose another port, or 0 for any that is free",
                ),
                io::ErrorKind::PermissionDenied => {
                    Some("ports below 1024 are root's: choose a higher one")
                }
                io::ErrorKind::AddrNotAvailable => Some("the address is none of this machine's"),
                _ => None,
            },
            Self::Start { .. } => None,
        }
    }
}

/// What happens to connections, for a log.
#[derive(Debug)]
pub enum Note {
    /// A connection could not be passed on, and was reset.
    Refused(GuestError),
    /// No connection could be taken.
    Accept(io::Error),
}

/// A listener that passes its connections on, in threads of its own, until it is dropped.
#[derive(Debug)]
pub struct Forwarding {
    listen: Listen,
    target: Target,
    shared: Arc<Shared>,
    /// Closing it ends all threads.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// A socket's file, and its inode: removed at the end.
    file: Option<(PathBuf, u64)>,
}

#[derive(Debug, Default)]
struct Shared {
    open: AtomicUsize,
    total: AtomicUsize,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Forwarding {
    /// Begins to listen. `note` is called from several threads.
    ///
    /// # Errors
    /// The address is taken or not ours to take.
    pub fn start(
        found: Found,
        forward: &Forward,
        note: impl Fn(Note) + Send + Sync + 'static,
    ) -> Result<Self, ForwardError> {
        let failed = |source| ForwardError::Listen {
            listen: forward.listen.to_string(),
            source,
        };
        let (listener, listen, file) = bind(&forward.listen).map_err(failed)?;
        let failed = |source| ForwardError::Start {
            listen: forward.listen.to_string(),
            source,
        };
        let (stopped, stop) = io::pipe().map_err(failed)?;
        let shared = Arc::new(Shared::default());
        let server = Server {
            listener,
            found,
            target: forward.target.clone(),
            shared: Arc::clone(&shared),
            stopped: stopped.into(),
            note,
        };
        let thread = thread::Builder::new()
            .name("forward".into())
            .stack_size(STACK)
            .spawn(move || Server::serve(&Arc::new(server)))
            .map_err(failed)?;
        Ok(Self {
            listen,
            target: forward.target.clone(),
            shared,
            stop: Some(stop.into()),
            thread: Some(thread),
            file,
        })
    }

    /// Where it listens, with the port that was chosen if none was asked for.
    #[must_use]
    pub fn listen(&self) -> &Listen {
        &self.listen
    }

    /// Where in the guest connections go.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Connections open now, and taken so far.
    #[must_use]
    pub fn connections(&self) -> (usize, usize) {
        let count = |number: &AtomicUsize| number.load(Ordering::Acquire);
        (count(&self.shared.open), count(&self.shared.total))
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Only if it is still this listener's.
        if let Some((path, inode)) = self.file.take()
            && fs::symlink_metadata(&path).is_ok_and(|file| file.ino() == inode)
        {
            let _ = fs::remove_file(&path);
        }
    }
}

type Bound = (Listener, Listen, Option<(PathBuf, u64)>);

fn bind(listen: &Listen) -> io::Result<Bound> {
    match listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok((Listener::Tcp(listener), Listen::Tcp(address), None))
        }
        Listen::Unix(path) => {
            let listener = bind_unix(path)?;
            listener.set_nonblocking(true)?;
            let inode = fs::symlink_metadata(path)?.ino();
            let file = Some((path.clone(), inode));
            Ok((Listener::Unix(listener), listen.clone(), file))
        }
    }
}

/// Takes the place of a socket on which nobody listens any more.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            _ => Err(error),
        },
        other => other,
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

struct Server<N> {
    listener: Listener,
    found: Found,
    target: Target,
    shared: Arc<Shared>,
    /// Ends when the forwarding is dropped.
    stopped: OwnedFd,
    note: N,
}

impl<N: Fn(Note) + Send + Sync + 'static> Server<N> {
    fn serve(self: &Arc<Self>) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        loop {
            threads.retain(|thread| !thread.is_finished());
            let full = threads.len() >= MAX_CONNECTIONS;
            let mut set = PollSet::default();
            let stopped = set.readable(self.stopped.as_fd());
            let waiting = (!full).then(|| set.readable(self.listener.as_fd()));
            let polled = set.wait(full.then(|| Instant::now() + FULL_PAUSE));
            match polled {
                Ok(polled) if polled.is_ready(stopped) => break,
                Ok(polled) if waiting.is_some_and(|slot| polled.is_ready(slot)) => {
                    threads.extend(self.take());
                }
                Ok(_) => {}
                Err(error) => {
                    (self.note)(Note::Accept(error));
                    break;
                }
            }
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn take(self: &Arc<Self>) -> Option<JoinHandle<()>> {
        let flags = SocketFlags::CLOEXEC;
        let client = match rustix::net::accept_with(&self.listener, flags) {
            Ok(client) => client,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => return None,
            Err(error) => {
                (self.note)(Note::Accept(error.into()));
                thread::sleep(FAILURE_PAUSE);
                return None;
            }
        };
        self.shared.total.fetch_add(1, Ordering::AcqRel);
        self.shared.open.fetch_add(1, Ordering::AcqRel);
        let server = Arc::clone(self);
        let made = thread::Builder::new().stack_size(STACK).spawn(move || {
            server.pass_on(&client);
            server.shared.open.fetch_sub(1, Ordering::AcqRel);
        });
        match made {
            Ok(thread) => Some(thread),
            Err(error) => {
                self.shared.open.fetch_sub(1, Ordering::AcqRel);
                (self.note)(Note::Accept(error));
                None
            }
        }
    }

    fn pass_on(&self, client: &OwnedFd) {
        if matches!(self.listener, Listener::Tcp(_)) {
            let _ = rustix::net::sockopt::set_tcp_nodelay(client, true);
        }
        let call = v1::Connect {
            target: Some(self.target.call()),
            time_limit_ms: 0,
        };
        let connected = guest::call(&self.found, Some(guest::soon()), |stream, deadline| {
            ports::connect(stream, call, deadline)
        });
        match connected {
            Ok((guest, early)) => {
                // The calls above may have left a limit behind.
                let _ = guest.set_read_timeout(None);
                let _ = guest.set_write_timeout(None);
                let stop = Some(self.stopped.as_fd());
                relay::relay(guest.as_fd(), client.as_fd(), early, stop, || {});
            }
            Err(error) => {
                // Closed at once with what it sent unread: a reset, not an end like any other.
                let _ = rustix::net::sockopt::set_socket_linger(client, Some(Duration::ZERO));
                (self.note)(Note::Refused(error));
            }
        }
    }
}
