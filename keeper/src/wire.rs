//! Messages with descriptors over a Unix socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Longest message.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Most descriptors of one message.
pub const MAX_DESCRIPTORS: usize = 8;
/// Descriptors that may wait to be taken by a message.
const MAX_WAITING: usize = 32;

/// What is wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the connection ended")]
    Closed,
    #[error("it was not heard from in time")]
    Late,
    #[error("the other side broke the protocol: {0}")]
    Malformed(&'static str),
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// One side of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Connection {
    /// Of a connected socket, at its first byte.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            bytes: Vec::new(),
            descriptors: VecDeque::new(),
        }
    }

    /// The socket, for its time limits.
    #[must_use]
    pub const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The socket alone. What had arrived and was not asked for is lost.
    #[must_use]
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// It is too long, or what happened to the connection.
    pub fn send(
        &mut self,
        message: &impl Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        let bytes = message.encode_length_delimited_to_vec();
        if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(WireError::Malformed("a message is too long to be sent"));
        }
        let mut rest = &bytes[..];
        let mut with = descriptors;
        while !rest.is_empty() {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !with.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(with)) {
                return Err(WireError::Malformed("too many descriptors"));
            }
            let sent = sendmsg(
                &self.stream,
                &[IoSlice::new(rest)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            );
            match sent {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    with = &[];
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        Ok(())
    }

    /// The next message; `None` if the other side has ended the connection between two messages.
    ///
    /// # Errors
    /// What happened to the connection, or what was wrong with the message.
    pub fn receive<M: Message + Default>(&mut self) -> Result<Option<M>, WireError> {
        loop {
            if let Some(message) = self.take_message()? {
                return Ok(Some(message));
            }
            if self.read_more()? == 0 {
                return if self.bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(WireError::Closed)
                };
            }
        }
    }

    /// Takes the descriptors that came with a message.
    ///
    /// # Errors
    /// There are not as many.
    pub fn take(&mut self, count: u32) -> Result<Vec<OwnedFd>, WireError> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > self.descriptors.len() {
            return Err(WireError::Malformed("descriptors are missing"));
        }
        Ok(self.descriptors.drain(..count).collect())
    }

    fn take_message<M: Message + Default>(&mut self) -> Result<Option<M>, WireError> {
        let mut bytes = &self.bytes[..];
        let length = match prost::encoding::decode_varint(&mut bytes) {
            Ok(length) => usize::try_from(length).unwrap_or(usize::MAX),
            // Ten bytes are the longest varint.
            Err(_) if self.bytes.len() < 10 => return Ok(None),
            Err(_) => return Err(WireError::Malformed("no length")),
        };
        if length > MAX_MESSAGE {
            return Err(WireError::Malformed("a message is too long"));
        }
        let Some(body) = bytes.get(..length) else {
            return Ok(None);
        };
        let message = M::decode(body).map_err(|_| WireError::Malformed("no such message"))?;
        let used = self.bytes.len() - bytes.len() + length;
        self.bytes.drain(..used);
        Ok(Some(message))
    }

    fn read_more(&mut self) -> Result<usize, WireError> {
        let mut buffer = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            match recvmsg(
                &self.stream,
                &mut slices,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(got) => break got,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > MAX_WAITING {
            return Err(WireError::Malformed("too many descriptors"));
        }
        self.bytes
            .extend_from_slice(buffer.get(..got.bytes).unwrap_or_default());
        Ok(got.bytes)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Progress, Reply, reply};
    use proptest::prelude::*;
    use std::io::{Read, Seek, Write};

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        (Connection::new(a), Connection::new(b))
    }

    fn progress(done: u64) -> Reply {
        Reply {
            descriptors: 0,
            result: Some(reply::Result::Progress(Progress { done, total: 9 })),
        }
    }

    #[test]
    fn messages_and_their_descriptors_arrive_in_order() {
        let (mut ours, mut theirs) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        let mut with = progress(1);
        with.descriptors = 1;
        ours.send(&with, &[file.as_fd()]).unwrap();
        ours.send(&progress(2), &[]).unwrap();
        let first: Reply = theirs.receive().unwrap().unwrap();
        let second: Reply = theirs.receive().unwrap().unwrap();
        assert_eq!((&first, second), (&with, progress(2)));
        let mut got = std::fs::File::from(theirs.take(1).unwrap().remove(0));
        got.rewind().unwrap();
        let mut text = String::new();
        got.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(matches!(theirs.take(1), Err(WireError::Malformed(_))));
        drop(ours);
        assert!(theirs.receive::<Reply>().unwrap().is_none());
    }

    #[test]
    fn a_message_that_is_cut_or_too_long_is_told() {
        let (ours, mut theirs) = pair();
        ours.stream().write_all(&[200, 1, 8]).unwrap();
        drop(ours);
        assert!(matches!(theirs.receive::<Reply>(), Err(WireError::Closed)));
        let (ours, mut theirs) = pair();
        ours.stream().write_all(&[0xff, 0xff, 0xff, 0x7f]).unwrap();
        assert!(matches!(
            theirs.receive::<Reply>(),
            Err(WireError::Malformed(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (ours, mut theirs) = pair();
            ours.stream().write_all(&bytes).unwrap();
            drop(ours);
            while let Ok(Some(_)) = theirs.receive::<crate::v1::Request>() {}
        }
    }
}
