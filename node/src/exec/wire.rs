//! The host's side of an exec as a pure machine: bytes in, events out; what is to be sent is kept.

use std::io;
use std::time::Duration;

use belljar_protocol::frame::{self, Decoder, FrameError, MessageTooLong};
use belljar_protocol::{GENERATION, v1};
use prost::Message;

/// Field of `ExecInput.stdin`.
const STDIN_FIELD: u32 = 1;

/// A command could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("{}", spawn_failure(.0))]
    Spawn(v1::SpawnFailure),
    #[error("the agent refused the command: {0}")]
    Refused(String),
    #[error("the agent did not start the command within {} s", .0.as_secs())]
    NoAnswer(Duration),
    #[error("the connection to the guest was cut before the command was started")]
    CutBeforeStart,
    #[error("the agent broke the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("the agent broke the protocol: {0}")]
    Decode(#[from] prost::DecodeError),
    #[error("the agent answered something else than asked")]
    Unexpected,
    #[error("the command is too long: {0}")]
    TooLong(#[from] MessageTooLong),
    #[error("cannot pass on input and output: {0}")]
    Io(#[from] io::Error),
}

fn spawn_failure(failure: &v1::SpawnFailure) -> String {
    if failure.message.is_empty() {
        format!("the command could not be started (errno {})", failure.errno)
    } else {
        failure.message.clone()
    }
}

impl ExecError {
    /// The exit status of a command line: 127 not found, 126 not executable, else 125.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        use v1::spawn_failure::Kind;
        match self {
            Self::Spawn(failure) => match failure.kind() {
                Kind::NotFound => 127,
                Kind::NotExecutable => 126,
                _ => 125,
            },
            _ => 125,
        }
    }
}

/// What the guest said.
#[derive(Debug, PartialEq)]
pub enum WireEvent<'a> {
    Stdout(&'a [u8]),
    Stderr(&'a [u8]),
    End(v1::end::How),
}

#[derive(Debug)]
pub(super) struct Wire {
    decoder: Decoder,
    unsent: Vec<u8>,
    started: bool,
    ended: bool,
}

impl Wire {
    pub(super) fn start(exec: &v1::Exec) -> Result<Self, ExecError> {
        let request = v1::Request {
            generation: GENERATION,
            deadline_ms: 0,
            call: Some(v1::request::Call::Exec(exec.clone())),
        };
        let mut unsent = Vec::new();
        frame::encode(&request, &mut unsent)?;
        Ok(Self {
            decoder: Decoder::new(),
            unsent,
            started: false,
            ended: false,
        })
    }

    pub(super) fn is_started(&self) -> bool {
        self.started
    }

    pub(super) fn unsent(&self) -> &[u8] {
        &self.unsent
    }

    pub(super) fn sent(&mut self, count: usize) {
        self.unsent.drain(..count.min(self.unsent.len()));
    }

    /// At most `MAX_CHUNK` bytes.
    pub(super) fn input(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = frame::encode_chunk(STDIN_FIELD, bytes, &mut self.unsent);
            bytes = bytes.get(taken..).unwrap_or_default();
        }
    }

    pub(super) fn input_end(&mut self) -> Result<(), ExecError> {
        self.put(v1::exec_input::Input::StdinEof(v1::StdinEof {}))
    }

    /// Sends a signal to the command.
    pub(super) fn signal(&mut self, number: i32) -> Result<(), ExecError> {
        self.put(v1::exec_input::Input::Signal(number.unsigned_abs()))
    }

    fn put(&mut self, input: v1::exec_input::Input) -> Result<(), ExecError> {
        let input = Some(input);
        Ok(frame::encode(&v1::ExecInput { input }, &mut self.unsent)?)
    }

    /// The connection ended. Before the end of the command was told, it is lost.
    pub(super) fn cut(&mut self) -> Result<v1::end::How, ExecError> {
        if self.started {
            Ok(lost("the connection to the guest was cut"))
        } else {
            Err(ExecError::CutBeforeStart)
        }
    }

    pub(super) fn receive(
        &mut self,
        mut input: &[u8],
        mut handle: impl FnMut(WireEvent<'_>),
    ) -> Result<(), ExecError> {
        while let Some(message) = self.decoder.feed(&mut input)? {
            if self.ended {
                return Err(ExecError::Unexpected);
            }
            if self.started {
                self.output(&message, &mut handle)?;
            } else {
                self.reply(&message)?;
            }
        }
        Ok(())
    }

    fn reply(&mut self, message: &[u8]) -> Result<(), ExecError> {
        match v1::Reply::decode(message)?.result {
            Some(v1::reply::Result::Exec(_)) => {
                self.started = true;
                Ok(())
            }
            Some(v1::reply::Result::SpawnFailure(failure)) => Err(ExecError::Spawn(failure)),
            Some(v1::reply::Result::Error(error)) => Err(ExecError::Refused(error.message)),
            _ => Err(ExecError::Unexpected),
        }
    }

    fn output(
        &mut self,
        message: &[u8],
        handle: &mut impl FnMut(WireEvent<'_>),
    ) -> Result<(), ExecError> {
        match v1::ExecOutput::decode(message)?.output {
            Some(v1::exec_output::Output::Stdout(bytes)) => handle(WireEvent::Stdout(&bytes)),
            Some(v1::exec_output::Output::Stderr(bytes)) => handle(WireEvent::Stderr(&bytes)),
            Some(v1::exec_output::Output::End(end)) => {
                self.ended = true;
                let unknown = || lost("the agent told an end that this program does not know");
                handle(WireEvent::End(end.how.unwrap_or_else(unknown)));
            }
            // A kind of output from a later generation, or one that was not asked for.
            _ => {}
        }
        Ok(())
    }
}

fn lost(reason: &str) -> v1::end::How {
    v1::end::How::Lost(v1::Lost {
        reason: reason.to_owned(),
    })
}
