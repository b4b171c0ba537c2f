//! The host's side of a call: synchronous, over any byte stream, with deadlines.
//!
//! Everything that arrives is taken as hostile: bounded by [`crate::frame`], decoded without
//! panics, and a stream that ends early is told as such.

mod exec;
pub mod files;
pub mod ports;
pub mod process;
pub mod system;
pub mod watch;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use prost::Message;

use crate::frame::{self, Decoder, FrameError, MessageError, MessageTooLong};
use crate::hybrid::{is_timeout, remaining};
use crate::{GENERATION, v1};

pub use exec::{Exec, ExecEvent, ExecStdin};

/// Bytes asked for in one read.
const READ_SIZE: usize = 64 << 10;

/// A byte stream whose blocking calls can be given a time limit. `None` waits for ever.
pub trait Stream: Read + Write {
    /// Limits each following read.
    fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()>;
    /// Limits each following write.
    fn limit_writes(&self, limit: Option<Duration>) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)
    }
    fn limit_writes(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_write_timeout(limit)
    }
}

impl Stream for TcpStream {
    fn limit_reads(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)
    }
    fn limit_writes(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_write_timeout(limit)
    }
}

/// Any other stream, without time limits.
#[derive(Debug)]
pub struct Untimed<T>(pub T);

impl<T: Read> Read for Untimed<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<T: Write> Write for Untimed<T> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<T: Read + Write> Stream for Untimed<T> {
    fn limit_reads(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn limit_writes(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The deadline passed.
    #[error("the agent did not answer in time ({doing})")]
    Timeout {
        /// What was waited for.
        doing: &'static str,
    },
    /// The stream ended where a frame was due: the guest ended, or the agent refused the peer.
    #[error("the guest closed the connection ({doing})")]
    Closed {
        /// What was waited for.
        doing: &'static str,
    },
    /// The stream failed.
    #[error("connection to the agent ({doing}): {source}")]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The bytes are no frames.
    #[error("the agent broke the protocol ({doing}): {source}")]
    Frame {
        /// What was waited for.
        doing: &'static str,
        /// What was wrong.
        source: FrameError,
    },
    /// The pieces of a file or tree make no sense.
    #[error("the agent broke the protocol ({doing}): {source}")]
    Transfer {
        /// What was waited for.
        doing: &'static str,
        /// What was wrong.
        source: crate::transfer::TransferError,
    },
    /// The frame holds no such message, or one that is far larger than honest ones.
    #[error("the agent broke the protocol ({doing}): {source}")]
    Decode {
        /// What was waited for.
        doing: &'static str,
        /// What was wrong.
        source: MessageError,
    },
    /// The request is larger than a frame may be.
    #[error("the request is too large: {0}")]
    TooLong(#[from] MessageTooLong),
    /// The agent refused or failed to carry out the call.
    #[error("the agent refused the call: {message} ({})", code.as_str_name())]
    Refused {
        /// Why, for programs.
        code: v1::error::Code,
        /// Why, for people.
        message: String,
        /// Linux errno; 0 if no system call failed.
        errno: u32,
    },
    /// The agent does not know the call: it is older than this program.
    #[error("the guest's agent is of generation {generation}, too old for this: {doing}")]
    TooOld {
        /// What was asked.
        doing: &'static str,
        /// Of the agent.
        generation: u32,
    },
    /// The process of an exec could not be started.
    #[error("{}", .0.message)]
    SpawnFailed(v1::SpawnFailure),
    /// A reply that does not belong to the call.
    #[error("the agent answered {0} with something else")]
    Unexpected(&'static str),
}

impl From<v1::Error> for CallError {
    fn from(error: v1::Error) -> Self {
        Self::Refused {
            code: error.code(),
            message: error.message,
            errno: error.errno,
        }
    }
}

/// What every reply says about the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentInfo {
    /// Generation of the agent.
    pub generation: u32,
    /// Raw [`v1::Ability`] values, unknown ones included.
    pub abilities: Vec<i32>,
    /// Not empty: why the guest is not as it should be.
    pub degraded: String,
}

impl AgentInfo {
    /// Whether the agent says it has `ability`.
    #[must_use]
    pub fn has(&self, ability: v1::Ability) -> bool {
        self.abilities.contains(&(ability as i32))
    }
}

/// One stream with framing on it, in the host's role.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    decoder: Decoder,
    buffer: Vec<u8>,
    /// Unread bytes of `buffer`.
    unread: std::ops::Range<usize>,
    read_limited: bool,
}

impl<S: Stream> Connection<S> {
    /// Takes a connected stream, at its first byte.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            buffer: Vec::new(),
            unread: 0..0,
            read_limited: false,
        }
    }

    /// Sends one message as a frame.
    pub fn send<M: Message>(
        &mut self,
        message: &M,
        doing: &'static str,
        deadline: Option<Instant>,
    ) -> Result<(), CallError> {
        let mut bytes = Vec::new();
        frame::encode(message, &mut bytes)?;
        send_bytes(&mut self.stream, &bytes, doing, deadline)
    }

    /// Waits for one message. `None`: the stream ended between two frames.
    pub fn receive<M: Message + Default>(
        &mut self,
        doing: &'static str,
        deadline: Option<Instant>,
    ) -> Result<Option<M>, CallError> {
        self.receive_as(frame::decode, doing, deadline)
    }

    /// [`Self::receive`] for a message that embeds lists.
    fn receive_lists<M: Message + Default>(
        &mut self,
        doing: &'static str,
        deadline: Option<Instant>,
    ) -> Result<Option<M>, CallError> {
        self.receive_as(frame::decode_lists, doing, deadline)
    }

    fn receive_as<M>(
        &mut self,
        decode: impl Fn(&[u8]) -> Result<M, MessageError>,
        doing: &'static str,
        deadline: Option<Instant>,
    ) -> Result<Option<M>, CallError> {
        loop {
            let mut input = self.buffer.get(self.unread.clone()).unwrap_or_default();
            let fed = self.decoder.feed(&mut input);
            let left = input.len();
            let message = fed
                .map_err(|source| CallError::Frame { doing, source })?
                .map(|frame| decode(&frame))
                .transpose()
                .map_err(|source| CallError::Decode { doing, source })?;
            self.unread.start = self.unread.end.saturating_sub(left);
            if message.is_some() {
                return Ok(message);
            }
            if !self.fill(doing, deadline)? {
                if self.decoder.is_at_boundary() {
                    return Ok(None);
                }
                return Err(CallError::Closed { doing });
            }
        }
    }

    /// Reads once. False at the end of the stream.
    fn fill(&mut self, doing: &'static str, deadline: Option<Instant>) -> Result<bool, CallError> {
        if self.buffer.is_empty() {
            self.buffer.resize(READ_SIZE, 0);
        }
        self.unread = 0..0;
        loop {
            if deadline.is_some() || self.read_limited {
                let limit = deadline.map(remaining).transpose();
                let limit = limit.map_err(|_| CallError::Timeout { doing })?;
                self.stream
                    .limit_reads(limit)
                    .map_err(|source| CallError::Io { doing, source })?;
                self.read_limited = limit.is_some();
            }
            match self.stream.read(&mut self.buffer) {
                Ok(got) => {
                    self.unread = 0..got;
                    return Ok(got != 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A peer that is gone is an end like any other: what matters is whether
                // a whole frame came before it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) if is_timeout(&error) => return Err(CallError::Timeout { doing }),
                Err(source) => return Err(CallError::Io { doing, source }),
            }
        }
    }

    /// Sends `call` and waits for the head of its reply. Errors of the agent become
    /// [`CallError::Refused`] and [`CallError::SpawnFailed`].
    pub fn call(
        &mut self,
        call: v1::request::Call,
        doing: &'static str,
        deadline: Option<Instant>,
    ) -> Result<(AgentInfo, v1::reply::Result), CallError> {
        let deadline_ms = deadline.map_or(0, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
        });
        let request = v1::Request {
            generation: GENERATION,
            deadline_ms,
            call: Some(call),
        };
        self.send(&request, doing, deadline)?;
        let reply: v1::Reply = self
            .receive_lists(doing, deadline)?
            .ok_or(CallError::Closed { doing })?;
        let info = AgentInfo {
            generation: reply.generation,
            abilities: reply.abilities,
            degraded: reply.degraded,
        };
        match reply.result {
            Some(v1::reply::Result::Error(error))
                if error.code() == v1::error::Code::Unimplemented =>
            {
                Err(CallError::TooOld {
                    doing,
                    generation: info.generation,
                })
            }
            Some(v1::reply::Result::Error(error)) => Err(error.into()),
            Some(v1::reply::Result::SpawnFailure(failure)) => Err(CallError::SpawnFailed(failure)),
            Some(result) => Ok((info, result)),
            None => Err(CallError::Unexpected(doing)),
        }
    }

    /// The stream below.
    pub const fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The stream below, and bytes of it that were read already: what follows a `connect` is raw.
    pub fn into_parts(self) -> (S, Vec<u8>) {
        let unread = self.buffer.get(self.unread).unwrap_or_default().to_vec();
        (self.stream, unread)
    }
}

fn send_bytes<S: Stream>(
    stream: &mut S,
    mut bytes: &[u8],
    doing: &'static str,
    deadline: Option<Instant>,
) -> Result<(), CallError> {
    while !bytes.is_empty() {
        if let Some(deadline) = deadline {
            let limit = remaining(deadline).map_err(|_| CallError::Timeout { doing })?;
            stream
                .limit_writes(Some(limit))
                .map_err(|source| CallError::Io { doing, source })?;
        }
        match stream.write(bytes) {
            Ok(0) => return Err(CallError::Closed { doing }),
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_timeout(&error) => return Err(CallError::Timeout { doing }),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Err(CallError::Closed { doing });
            }
            Err(source) => return Err(CallError::Io { doing, source }),
        }
    }
    if deadline.is_some() {
        stream
            .limit_writes(None)
            .map_err(|source| CallError::Io { doing, source })?;
    }
    Ok(())
}

/// Asks whether the agent serves calls.
pub fn ping<S: Stream>(
    stream: S,
    deadline: Option<Instant>,
) -> Result<(AgentInfo, v1::Pong), CallError> {
    let call = v1::request::Call::Ping(v1::Ping {});
    match Connection::new(stream).call(call, "ping", deadline)? {
        (info, v1::reply::Result::Pong(pong)) => Ok((info, pong)),
        _ => Err(CallError::Unexpected("ping")),
    }
}

/// Asks the guest to end all processes and to power off or reboot. Returns when it has begun;
/// `grace` is the time between SIGTERM and SIGKILL.
pub fn shutdown<S: Stream>(
    stream: S,
    mode: v1::shutdown::Mode,
    grace: Option<Duration>,
    deadline: Option<Instant>,
) -> Result<AgentInfo, CallError> {
    let call = v1::request::Call::Shutdown(v1::Shutdown {
        mode: mode.into(),
        grace_ms: grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX)),
    });
    match Connection::new(stream).call(call, "shutdown", deadline)? {
        (info, v1::reply::Result::Shutdown(_)) => Ok(info),
        _ => Err(CallError::Unexpected("shutdown")),
    }
}

/// Reads the one frame of a connection that the agent made to [`crate::READY_PORT`].
pub fn receive_ready<S: Stream>(
    stream: S,
    deadline: Option<Instant>,
) -> Result<v1::Ready, CallError> {
    let doing = "ready message";
    Connection::new(stream)
        .receive(doing, deadline)?
        .ok_or(CallError::Closed { doing })
}

#[cfg(test)]
mod tests;
