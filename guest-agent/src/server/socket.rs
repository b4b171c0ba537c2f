//! The byte side of a connection: non-blocking, with what could not be sent yet.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use belljar_protocol::frame;

/// The other side is gone, or the socket failed; what is left is to close it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

/// A connection with edge-triggered readiness: `readable` and `writable` stay set until the
/// system says otherwise.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    out: Vec<u8>,
    sent: usize,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The peer has closed its sending side, or all of the connection.
    pub(crate) hung_up: bool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    pub(crate) const fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            out: Vec::new(),
            sent: 0,
            readable: false,
            writable: true,
            hung_up: false,
        }
    }

    /// True when all that was queued is sent: the back-pressure of this protocol.
    pub(crate) const fn is_drained(&self) -> bool {
        self.out.is_empty()
    }

    /// Queues a message. The agent's own messages always fit into a frame: their texts are short.
    pub(crate) fn queue<M: Message>(&mut self, message: &M) {
        if frame::encode(message, &mut self.out).is_err() {
            crate::log!("dropped a message longer than a frame");
        }
    }

    /// Queues a piece of output as the `bytes` field `field` of a message.
    pub(crate) fn queue_chunk(&mut self, field: u32, mut data: &[u8]) {
        while !data.is_empty() {
            let taken = frame::encode_chunk(field, data, &mut self.out);
            data = data.get(taken..).unwrap_or_default();
        }
    }

    /// Sends what it can.
    pub(crate) fn flush(&mut self) -> Result<(), Gone> {
        while self.writable && !self.out.is_empty() {
            let rest = self.out.get(self.sent..).unwrap_or_default();
            match rustix::net::send(&self.fd, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent = self.sent.saturating_add(sent),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
            if self.sent >= self.out.len() {
                self.out.clear();
                self.sent = 0;
            }
        }
        Ok(())
    }

    /// Reads once into `buffer`; `Ok(0)` if nothing is there now.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Gone> {
        if !self.readable {
            return Ok(0);
        }
        loop {
            match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::empty()) {
                Ok((_, 0)) => return Err(Gone),
                Ok((_, got)) => return Ok(got),
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return Ok(0);
                }
                Err(Errno::INTR) => {}
                Err(_) => return Err(Gone),
            }
        }
    }

    /// Tells the peer that nothing more will come.
    pub(crate) fn finish(&self) {
        // It may be gone by now, which is as good.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }
}
