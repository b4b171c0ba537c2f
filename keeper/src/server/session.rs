//! One connection: calls one after another.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::names::refusal;
use super::quiet::Still;
use super::rescue::Held;
use super::{Busy, Point, calls, capture, log};
use crate::VERSION;
use crate::v1::{self, error::Code, reply::Result as Answer, request::Call};
use crate::wire::{Connection, MAX_MESSAGE, WireError};
use prost::Message as _;

/// Whoever does not take an answer within this time has gone.
const WRITE_LIMIT: Duration = Duration::from_secs(30);

/// Between two words about how far it has come.
const PROGRESS: Duration = Duration::from_millis(100);

/// An answer with the descriptors that belong to it.
pub(super) type Answered = Result<(Answer, Vec<OwnedFd>), v1::Error>;

/// Serves a connection in a thread of its own.
pub(super) fn start(stream: UnixStream, busy: Busy) {
    let made = std::thread::Builder::new()
        .name("session".to_owned())
        .spawn(move || {
            let mut session = Session {
                connection: Connection::new(stream),
                busy,
                held: None,
                files: None,
            };
            match session.serve() {
                Ok(()) | Err(WireError::Closed) => {}
                Err(error) => log::line(&format!("a connection is given up: {error}")),
            }
        });
    if let Err(error) = made {
        // The connection is cut before Hello, so its other side tries again.
        log::line(&format!("cannot serve a connection: {error}"));
    }
}

struct Session {
    connection: Connection,
    busy: Busy,
    /// The sandbox that stands still for a capture.
    held: Option<Held>,
    files: Option<capture::Files>,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            held.let_go();
        }
    }
}

impl Session {
    fn serve(&mut self) -> Result<(), WireError> {
        self.connection
            .stream()
            .set_write_timeout(Some(WRITE_LIMIT))
            .map_err(WireError::from)?;
        let hello = v1::Hello {
            version: VERSION,
            pid: std::process::id(),
        };
        self.connection.send(&hello, &[])?;
        while let Some(request) = self.connection.receive::<v1::Request>()? {
            let descriptors = self.connection.take(request.descriptors)?;
            let answered = match request.call {
                Some(call) => self.answer(call, descriptors),
                None => Err(refusal(Code::Invalid, "this keeper does not know the call")),
            };
            match answered {
                Ok((answer, descriptors)) => self.reply(answer, &descriptors)?,
                Err(error) => self.reply(Answer::Error(error), &[])?,
            }
        }
        Ok(())
    }

    fn reply(&mut self, answer: Answer, descriptors: &[OwnedFd]) -> Result<(), WireError> {
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let reply = v1::Reply {
            descriptors: u32::try_from(borrowed.len()).unwrap_or(u32::MAX),
            result: Some(answer),
        };
        if reply.encoded_len() > MAX_MESSAGE {
            let message = "the answer is longer than a message can be";
            let reply = v1::Reply {
                descriptors: 0,
                result: Some(Answer::Error(refusal(Code::Failed, message))),
            };
            return self.connection.send(&reply, &[]);
        }
        self.connection.send(&reply, &borrowed)
    }

    fn answer(&mut self, call: Call, descriptors: Vec<OwnedFd>) -> Answered {
        let shared = std::sync::Arc::clone(self.busy.shared());
        let done = || Ok((Answer::Done(v1::Done {}), Vec::new()));
        match call {
            Call::Ping(_) => done(),
            Call::Begin(begin) => self.begin(&begin, descriptors.into_iter().next()),
            Call::Settle(_) => {
                self.held = None;
                done()
            }
            Call::Keep(keep) => self.keep(keep, descriptors),
            other => {
                let caller = self.connection.stream().try_clone().ok();
                let mut meanwhile = |answer| self.reply(answer, &[]).is_ok();
                calls::answer(&shared, other, descriptors, caller, &mut meanwhile)
            }
        }
    }

    fn begin(&mut self, begin: &v1::Begin, turn: Option<OwnedFd>) -> Answered {
        let files = capture::files(self.busy.shared(), begin)?;
        let surroundings = &self.busy.shared().surroundings;
        surroundings
            .at(Point::Begun)
            .map_err(super::names::io_error("hand over a file"))?;
        let clone = |file: &std::fs::File| {
            let again = file.try_clone().map(OwnedFd::from);
            again.map_err(super::names::io_error("hand over a file"))
        };
        let parts = [
            Some(&files.state),
            files.memory.as_ref(),
            files.disk.as_ref(),
        ];
        let descriptors = parts
            .into_iter()
            .flatten()
            .map(clone)
            .collect::<Result<_, _>>()?;
        if !begin.sandbox_dir.is_empty() {
            self.held = Some(Held {
                dir: PathBuf::from(&begin.sandbox_dir),
                was_paused: begin.was_paused,
                _turn: turn,
                _still: Still::begin(&self.busy.shared().quiet),
            });
        }
        let begun = v1::Begun {
            has_base: files.base.is_some(),
        };
        self.files = Some(files);
        Ok((Answer::Begun(begun), descriptors))
    }

    fn keep(&mut self, keep: v1::Keep, layers: Vec<OwnedFd>) -> Answered {
        let mut files = self
            .files
            .take()
            .ok_or_else(|| refusal(Code::Invalid, "no capture was begun"))?;
        if keep.disk_layers > 0 {
            files.layers = Some(capture::layers(keep.disk_layers, layers)?);
        }
        let busy = Busy::begin(self.busy.shared());
        let storing = capture::keep(busy, files, keep)?;
        let id = storing.id.to_string();
        // If that cannot be sent, nobody waits; the snapshot is stored all the same.
        let mut waits = self
            .reply(Answer::Accepted(v1::Accepted { id }), &[])
            .is_ok();
        let outcome = loop {
            match storing.end.recv_timeout(PROGRESS) {
                Ok(outcome) => break outcome,
                Err(RecvTimeoutError::Timeout) => {
                    waits = waits && self.tell(storing.progress()).is_ok();
                }
                Err(RecvTimeoutError::Disconnected) => {
                    break Err(refusal(Code::Failed, "storing it broke off"));
                }
            }
        };
        let kept = outcome?;
        if waits {
            let _ = self.tell(storing.progress());
        }
        Ok((Answer::Kept(kept), Vec::new()))
    }

    fn tell(&mut self, progress: v1::Progress) -> Result<(), WireError> {
        self.reply(Answer::Progress(progress), &[])
    }
}
