//! A process on a connection of its own, synchronous: what tests and simple programs need. It does not
//! outlive its connection; `belljar-node` has the session that does.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::{AgentInfo, CallError, Connection, Stream, send_bytes};
use crate::frame::{self, MAX_CHUNK};
use crate::v1;

/// A process that runs in the guest, tied to this value: dropping it kills the process.
#[derive(Debug)]
pub struct Exec<S> {
    connection: Connection<S>,
    info: AgentInfo,
    pid: u32,
    ended: bool,
}

/// What a process in the guest did.
#[derive(Debug, Clone, PartialEq)]
pub enum ExecEvent {
    /// Bytes from its standard output.
    Stdout(Vec<u8>),
    /// Bytes from its standard error.
    Stderr(Vec<u8>),
    /// It ended; the last event.
    Ended(v1::end::How),
}

impl<S: Stream> Exec<S> {
    /// Starts a process. `deadline` bounds the start, not the run ([`v1::Exec::time_limit_ms`]).
    pub fn start(stream: S, exec: v1::Exec, deadline: Option<Instant>) -> Result<Self, CallError> {
        let mut connection = Connection::new(stream);
        match connection.call(v1::request::Call::Exec(exec), "exec", deadline)? {
            (info, v1::reply::Result::Exec(started)) => Ok(Self {
                connection,
                info,
                pid: started.pid,
                ended: false,
            }),
            _ => Err(CallError::Unexpected("exec")),
        }
    }

    /// What the reply said about the agent.
    pub const fn info(&self) -> &AgentInfo {
        &self.info
    }

    /// The stream below.
    pub const fn get_ref(&self) -> &S {
        self.connection.get_ref()
    }

    /// Process id in the guest.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the next event; `None` after the end. A connection that is cut ends the process
    /// as [`v1::end::How::Lost`]. After [`CallError::Timeout`] it may be called again.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<ExecEvent>, CallError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            let message: Option<v1::ExecOutput> =
                match self.connection.receive("output of exec", deadline) {
                    Ok(message) => message,
                    Err(CallError::Closed { .. }) => None,
                    Err(error) => return Err(error),
                };
            let Some(message) = message else {
                return Ok(Some(self.end(lost("the connection to the guest was cut"))));
            };
            match message.output {
                Some(v1::exec_output::Output::Stdout(bytes)) => {
                    return Ok(Some(ExecEvent::Stdout(bytes)));
                }
                Some(v1::exec_output::Output::Stderr(bytes)) => {
                    return Ok(Some(ExecEvent::Stderr(bytes)));
                }
                Some(v1::exec_output::Output::End(end)) => {
                    let how = end.how.unwrap_or_else(|| {
                        lost("the agent told an end that this program does not know")
                    });
                    return Ok(Some(self.end(how)));
                }
                // A kind of output from a later generation, or one that was not asked for.
                _ => {}
            }
        }
    }

    /// Collects everything up to the end: (stdout, stderr, end). `limit` bounds the bytes of both
    /// streams together; what is beyond is read and thrown away.
    pub fn finish(
        mut self,
        limit: usize,
        deadline: Option<Instant>,
    ) -> Result<(Vec<u8>, Vec<u8>, v1::end::How), CallError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let left = limit.saturating_sub(stdout.len().saturating_add(stderr.len()));
            let (stream, bytes) = match self.next(deadline)? {
                Some(ExecEvent::Stdout(bytes)) => (&mut stdout, bytes),
                Some(ExecEvent::Stderr(bytes)) => (&mut stderr, bytes),
                Some(ExecEvent::Ended(how)) => return Ok((stdout, stderr, how)),
                None => return Ok((stdout, stderr, lost("already ended"))),
            };
            stream.extend_from_slice(bytes.get(..left).unwrap_or(&bytes));
        }
    }

    fn end(&mut self, how: v1::end::How) -> ExecEvent {
        self.ended = true;
        ExecEvent::Ended(how)
    }
}

impl Exec<UnixStream> {
    /// The way to the process's standard input, usable from another thread.
    pub fn stdin(&self) -> io::Result<ExecStdin<UnixStream>> {
        Ok(ExecStdin {
            stream: self.connection.get_ref().try_clone()?,
        })
    }
}

fn lost(reason: &str) -> v1::end::How {
    v1::end::How::Lost(v1::Lost {
        reason: reason.to_owned(),
    })
}

/// Standard input of a process that was started with `STDIN_STREAM`.
#[derive(Debug)]
pub struct ExecStdin<S> {
    stream: S,
}

impl<S: Stream> ExecStdin<S> {
    /// The sending half of an exec's connection.
    pub const fn new(stream: S) -> Self {
        Self { stream }
    }

    /// Sends bytes; blocks while the process does not read.
    pub fn write(&mut self, data: &[u8]) -> Result<(), CallError> {
        let mut bytes = Vec::new();
        for chunk in data.chunks(MAX_CHUNK) {
            bytes.clear();
            frame::encode_chunk(1, chunk, &mut bytes);
            send_bytes(&mut self.stream, &bytes, "input of exec", None)?;
        }
        Ok(())
    }

    /// Tells the end of the input. The connection stays open: closing it would kill the process.
    pub fn close(mut self) -> Result<(), CallError> {
        let input = Some(v1::exec_input::Input::StdinEof(v1::StdinEof {}));
        let mut bytes = Vec::new();
        frame::encode(&v1::ExecInput { input }, &mut bytes)?;
        send_bytes(&mut self.stream, &bytes, "input of exec", None)
    }
}
