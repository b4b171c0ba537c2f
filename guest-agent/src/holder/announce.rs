//! The one message to the host that says "ready", sent beside everything else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::frame;
use belljar_protocol::{HOST_CID, READY_PORT, v1};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::sys;

/// After this the host does not want to know.
const TIME: Duration = Duration::from_secs(5);

/// A connection to the host on its way.
#[derive(Debug)]
pub(super) struct Announcement {
    fd: OwnedFd,
    message: Vec<u8>,
    sent: usize,
    expires: Instant,
}

impl AsFd for Announcement {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Announcement {
    pub(super) fn begin(ready: &v1::Ready) -> io::Result<Self> {
        let fd: OwnedFd = sys::vsock_connect(HOST_CID, READY_PORT)?;
        let mut message = Vec::new();
        // An announcement is short.
        let _ = frame::encode(ready, &mut message);
        let now = Instant::now();
        Ok(Self {
            fd,
            message,
            sent: 0,
            expires: now.checked_add(TIME).unwrap_or(now),
        })
    }

    pub(super) const fn expires(&self) -> Instant {
        self.expires
    }

    /// The socket has reported itself. True: sent, or nobody listens; either way it is over.
    pub(super) fn advance(&mut self) -> bool {
        loop {
            let rest = self.message.get(self.sent..).unwrap_or_default();
            if rest.is_empty() {
                return true;
            }
            match rustix::net::send(&self.fd, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent = self.sent.saturating_add(sent),
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(_) => return true,
            }
        }
    }
}
