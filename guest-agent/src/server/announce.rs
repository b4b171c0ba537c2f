//! The one message to the host that says "ready", sent beside everything else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::{HOST_CID, READY_PORT, v1};

use super::socket::Socket;
use crate::sys;

/// After this the host does not want to know.
const TIME: Duration = Duration::from_secs(5);

/// A connection to the host on its way.
pub(super) struct Announcement {
    socket: Socket,
    expires: Instant,
}

impl AsFd for Announcement {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Announcement {
    pub(super) fn begin(ready: &v1::Ready) -> io::Result<Self> {
        let fd: OwnedFd = sys::vsock_connect(HOST_CID, READY_PORT)?;
        let mut socket = Socket::new(fd);
        socket.writable = false;
        socket.queue(ready);
        let now = Instant::now();
        Ok(Self {
            socket,
            expires: now.checked_add(TIME).unwrap_or(now),
        })
    }

    pub(super) const fn expires(&self) -> Instant {
        self.expires
    }

    /// The socket has reported itself. True: sent, or nobody listens; either way it is over.
    pub(super) fn advance(&mut self) -> bool {
        self.socket.writable = true;
        self.socket.flush().is_err() || self.socket.is_drained()
    }
}
