//! Ways to an agent. A session makes as many connections as it takes.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use belljar_protocol::AGENT_PORT;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::registry::Found;
use crate::state::VSOCK_SOCKET;

/// Makes connections to one agent.
pub trait Dial {
    /// A new connection, not blocking. Returns at once.
    ///
    /// # Errors
    /// `WouldBlock`: worth another try. `NotFound` and `ConnectionRefused`: the guest is gone.
    fn dial(&self) -> io::Result<UnixStream>;

    /// The guest's port to ask the VMM for in the first line; `None`: the other end is the agent itself.
    fn port(&self) -> Option<u32>;
}

/// Through the VMM's vsock socket.
impl Dial for Found {
    fn dial(&self) -> io::Result<UnixStream> {
        connect(self.socket(VSOCK_SOCKET).path())
    }

    fn port(&self) -> Option<u32> {
        Some(AGENT_PORT)
    }
}

/// Straight to an agent that serves on a Unix socket.
#[derive(Debug, Clone)]
pub struct DirectDial {
    path: PathBuf,
}

impl DirectDial {
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

impl Dial for DirectDial {
    fn dial(&self) -> io::Result<UnixStream> {
        connect(&self.path)
    }

    fn port(&self) -> Option<u32> {
        None
    }
}

/// Never waits, not even for room in the queue of the listener.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
