//! A connection of the host, blocking: frames in, frames out, one call long.

use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_protocol::frame::{self, Decoder, FrameError};
use prost::Message;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Timespec;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// Most bytes asked for in one read: a few frames of stream data.
const READ_SIZE: usize = 128 << 10;

/// Bytes asked for in the first read; twice as many whenever they have all come. So a connection that
/// carries little is small.
const FIRST_READ: usize = 4 << 10;

/// Bytes of small messages that are sent together.
const SEND_SIZE: usize = 64 << 10;

/// What the host may have sent that is not read yet, on a connection that carries much.
const WIDE: u64 = 1 << 20;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnError {
    #[error("the host hung up")]
    HungUp,
    #[error("no frame came in time")]
    Late,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("not the message that was due: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("connection failed: {0}")]
    System(#[from] Errno),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Conn {
    fd: Arc<OwnedFd>,
    decoder: Decoder,
    buffer: Vec<u8>,
    unread: Range<usize>,
    out: Vec<u8>,
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Conn {
    /// Takes a blocking stream socket at its first byte.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd: Arc::new(fd),
            decoder: Decoder::new(),
            buffer: Vec::new(),
            unread: 0..0,
            out: Vec::new(),
        }
    }

    /// True if bytes were read that no message has been made of yet: ask [`Self::buffered_frame`] before
    /// waiting for the socket.
    pub(crate) const fn has_unread(&self) -> bool {
        self.unread.start < self.unread.end
    }

    /// Waits for one message. `None`: the host closed its side between two frames.
    pub(crate) fn receive<M: Message + Default>(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<Option<M>, ConnError> {
        loop {
            if let Some(message) = self.decode()? {
                return Ok(Some(message));
            }
            if let Some(deadline) = deadline
                && !wait_readable(self.fd.as_fd(), deadline)?
            {
                return Err(ConnError::Late);
            }
            if !self.fill()? {
                return if self.decoder.is_at_boundary() {
                    Ok(None)
                } else {
                    Err(ConnError::HungUp)
                };
            }
        }
    }

    /// For a connection that carries much: the host may send further ahead.
    pub(crate) fn widen(&self) {
        crate::sys::widen_vsock(self.fd.as_fd(), WIDE);
    }

    /// A frame out of the bytes that are here already.
    pub(crate) fn buffered_frame(&mut self) -> Result<Option<Cow<'_, [u8]>>, ConnError> {
        if !self.has_unread() {
            return Ok(None);
        }
        let mut input = self.buffer.get(self.unread.clone()).unwrap_or_default();
        let fed = self.decoder.feed(&mut input);
        self.unread.start = self.unread.end.saturating_sub(input.len());
        Ok(fed?)
    }

    /// Reads once; for a socket that is known to be readable. False at the end of the stream.
    pub(crate) fn read_more(&mut self) -> Result<bool, ConnError> {
        self.fill()
    }

    /// Sends what the socket takes at once; returns how many bytes that were.
    pub(crate) fn send_now(&self, data: &[u8]) -> Result<usize, ConnError> {
        send_now(self.fd.as_fd(), data)
    }

    fn decode<M: Message + Default>(&mut self) -> Result<Option<M>, ConnError> {
        if !self.has_unread() {
            return Ok(None);
        }
        let mut input = self.buffer.get(self.unread.clone()).unwrap_or_default();
        let fed = self.decoder.feed(&mut input);
        let left = input.len();
        let message = fed?.map(|frame| M::decode(&*frame)).transpose()?;
        self.unread.start = self.unread.end.saturating_sub(left);
        Ok(message)
    }

    /// Reads once. False at the end of the stream.
    fn fill(&mut self) -> Result<bool, ConnError> {
        if self.buffer.is_empty() {
            self.buffer.resize(FIRST_READ, 0);
        } else if self.unread.end == self.buffer.len() && self.buffer.len() < READ_SIZE {
            self.buffer = vec![0; self.buffer.len().saturating_mul(2)];
        }
        self.unread = 0..0;
        loop {
            match rustix::net::recv(&self.fd, self.buffer.as_mut_slice(), RecvFlags::empty()) {
                Ok((_, got)) => {
                    self.unread = 0..got;
                    return Ok(got != 0);
                }
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends one message as a frame; blocks while the host does not read.
    pub(crate) fn send<M: Message>(&mut self, message: &M) -> Result<(), ConnError> {
        self.out.clear();
        if frame::encode(message, &mut self.out).is_err() {
            crate::log!("dropped a message longer than a frame");
            return Ok(());
        }
        send_all(self.fd.as_fd(), &self.out)
    }

    /// Sends messages, each a frame, in as few pieces as possible.
    pub(crate) fn send_each<M: Message>(&mut self, messages: &[M]) -> Result<(), ConnError> {
        self.out.clear();
        for message in messages {
            if frame::encode(message, &mut self.out).is_err() {
                crate::log!("dropped a message longer than a frame");
            }
            if self.out.len() >= SEND_SIZE {
                send_all(self.fd.as_fd(), &self.out)?;
                self.out.clear();
            }
        }
        send_all(self.fd.as_fd(), &self.out)
    }

    /// Bytes that are here, after a read if there are none; empty at the end of the stream. They stay
    /// until [`Self::consume`] takes them. For streams that are not decoded frame by frame.
    pub(crate) fn peek(&mut self) -> Result<&[u8], ConnError> {
        if !self.has_unread() {
            self.fill()?;
        }
        Ok(self.buffer.get(self.unread.clone()).unwrap_or_default())
    }

    /// Takes bytes off the front of what [`Self::peek`] showed.
    pub(crate) fn consume(&mut self, count: usize) {
        self.unread.start = self.unread.start.saturating_add(count).min(self.unread.end);
    }

    /// The socket.
    pub(super) const fn socket(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Bytes that were read already and belong to no frame: what follows a `connect` is raw.
    pub(crate) fn take_unread(&mut self) -> Vec<u8> {
        let unread = self
            .buffer
            .get(self.unread.clone())
            .unwrap_or_default()
            .to_vec();
        self.buffer = Vec::new();
        self.unread = 0..0;
        unread
    }
}

/// Sends all bytes on a blocking socket.
pub(crate) fn send_all(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), ConnError> {
    while !data.is_empty() {
        match rustix::net::send(fd, data, SendFlags::NOSIGNAL) {
            Ok(sent) => data = data.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnError::HungUp),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sends what the socket takes at once; returns how many bytes that were.
pub(crate) fn send_now(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<usize, ConnError> {
    let all = data.len();
    while !data.is_empty() {
        match rustix::net::send(fd, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => data = data.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnError::HungUp),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(all.saturating_sub(data.len()))
}

/// Waits until there is something to read, or an end. False: the deadline came first.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut set = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut set, Some(&timespec(left))) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// A duration for the kernel.
pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}
