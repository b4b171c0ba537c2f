//! One client's connection without its socket: bytes, descriptors and the clock come in,
//! calls and bytes go out. Pure.
//!
//! ```text
//!            whole request                       answered
//! Reading ──────────────────► Waiting(call) ───────────────► Reading
//!    │                                              │ not kept alive
//!    │ fault of HTTP, time is up                    ▼
//!    └─────────────────────────────────────► Lingering ──► closed
//! ```
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::command::CallId;
use super::http::{self, MAX_FDS, MAX_HEAD, Parsed};
use super::{Body, Fault, Request, routes};

/// A request must be complete, and an answer taken, within this.
pub(super) const HALF_REQUEST: Duration = Duration::from_secs(10);
/// How long input is thrown away after the last answer, so that a client which is still
/// sending gets to read it instead of a broken pipe.
const LINGER: Duration = Duration::from_millis(500);

/// A call that has arrived whole.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: Request,
    pub(super) fds: Vec<(String, OwnedFd)>,
    /// For the log: `PUT /vsock`.
    pub(super) title: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reading,
    Waiting {
        call: CallId,
        keep_alive: bool,
    },
    /// The end is near: what is still to be sent, then thrown-away input until the instant.
    Lingering {
        until: Instant,
    },
}

#[derive(Debug)]
pub(super) struct Connection {
    state: State,
    input: Vec<u8>,
    /// Descriptors of the request that is being read.
    fds: Vec<OwnedFd>,
    output: Vec<u8>,
    sent: usize,
    /// When the half request, or the unsent output, began.
    busy_since: Option<Instant>,
    last_active: Instant,
    max_body: usize,
    continued: bool,
    peer_done: bool,
}

impl Connection {
    pub(super) fn new(now: Instant, max_body: usize) -> Self {
        Self {
            state: State::Reading,
            input: Vec::new(),
            fds: Vec::new(),
            output: Vec::new(),
            sent: 0,
            busy_since: None,
            last_active: now,
            max_body,
            continued: false,
            peer_done: false,
        }
    }

    /// How many more bytes may be taken in; 0: do not read now.
    pub(super) fn room(&self) -> usize {
        match self.state {
            _ if self.peer_done => 0,
            State::Lingering { .. } => MAX_HEAD,
            // One answer at a time: the next request waits until the last answer is gone.
            State::Reading if self.output.is_empty() => {
                (MAX_HEAD + self.max_body).saturating_sub(self.input.len())
            }
            State::Reading | State::Waiting { .. } => 0,
        }
    }

    /// Takes in what was read. `fds` that cannot be used are closed. `truncated`: the sender
    /// attached more descriptors than fit.
    pub(super) fn received(
        &mut self,
        bytes: &[u8],
        fds: Vec<OwnedFd>,
        truncated: bool,
        now: Instant,
    ) {
        if self.state != State::Reading {
            return;
        }
        self.last_active = now;
        self.busy_since.get_or_insert(now);
        self.input.extend_from_slice(bytes);
        self.fds.extend(fds);
        if truncated || self.fds.len() > MAX_FDS {
            self.refuse(
                Fault::new(format!("a request may carry at most {MAX_FDS} descriptors")),
                now,
            );
        }
    }

    /// The peer will send nothing more.
    pub(super) fn end_of_input(&mut self, now: Instant) {
        self.peer_done = true;
        if self.state == State::Reading && self.output.is_empty() {
            self.linger(now);
        }
    }

    /// The next whole call, if there is one. `Err`: a request that is refused without going
    /// anywhere, with its title; it is answered already.
    pub(super) fn next_call(
        &mut self,
        call: CallId,
        now: Instant,
    ) -> Result<Option<Call>, (String, Fault)> {
        if self.state != State::Reading || !self.output.is_empty() || self.input.is_empty() {
            return Ok(None);
        }
        let (message, length) = match http::parse(&self.input, self.max_body) {
            Ok(Parsed::Complete { message, length }) => (message, length),
            Ok(Parsed::Partial { wants_continue }) => {
                if self.peer_done {
                    self.linger(now);
                } else if wants_continue && !self.continued {
                    self.continued = true;
                    self.output.extend_from_slice(http::CONTINUE);
                }
                return Ok(None);
            }
            Err(fault) => {
                self.refuse(fault.clone(), now);
                return Err(("HTTP".to_owned(), fault));
            }
        };
        let keep_alive = message.keep_alive;
        let title = format!("{} {}", message.method.name(), message.path);
        let fds = std::mem::take(&mut self.fds);
        let parsed = name_fds(fds, &message.fd_names).and_then(|fds| {
            let request = routes::route(message.method, message.path, message.body)?;
            Ok((request, fds))
        });
        if length >= self.input.len() {
            // Gives the memory of a long request back.
            self.input = Vec::new();
        } else {
            self.input.drain(..length);
        }
        self.continued = false;
        self.state = State::Waiting { call, keep_alive };
        match parsed {
            Ok((request, fds)) => Ok(Some(Call {
                request,
                fds,
                title,
            })),
            Err(fault) => {
                let outcome = Err(fault.clone());
                self.answer(call, &outcome, now);
                Err((title, fault))
            }
        }
    }

    /// The answer to `call`; false if this connection does not wait for it.
    pub(super) fn answer(
        &mut self,
        call: CallId,
        outcome: &Result<Body, Fault>,
        now: Instant,
    ) -> bool {
        match self.state {
            State::Waiting {
                call: mine,
                keep_alive,
            } if mine == call => {
                self.output = http::response(outcome, keep_alive);
                self.sent = 0;
                self.busy_since = Some(now);
                self.last_active = now;
                self.state = State::Reading;
                if !keep_alive {
                    self.linger(now);
                }
                true
            }
            _ => false,
        }
    }

    /// What is to be sent.
    pub(super) fn unsent(&self) -> &[u8] {
        self.output.get(self.sent..).unwrap_or_default()
    }

    /// `count` bytes of `unsent` are gone.
    pub(super) fn sent(&mut self, count: usize, now: Instant) {
        self.sent = self.sent.saturating_add(count);
        self.last_active = now;
        if self.sent < self.output.len() {
            return;
        }
        self.output = Vec::new();
        self.sent = 0;
        self.busy_since = (!self.input.is_empty()).then_some(now);
        match self.state {
            State::Lingering { .. } => self.linger(now),
            State::Reading if self.peer_done && self.input.is_empty() => self.linger(now),
            State::Reading | State::Waiting { .. } => {}
        }
    }

    /// True if the connection is to be closed now.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        match self.state {
            State::Lingering { until } => {
                self.unsent().is_empty() && (self.peer_done || now >= until)
                    || now >= until + HALF_REQUEST
            }
            State::Reading | State::Waiting { .. } => false,
        }
    }

    /// Time passes: refuses a request that does not come to its end, gives up on a client
    /// that does not take its answer.
    pub(super) fn tick(&mut self, now: Instant) {
        let late = self
            .busy_since
            .is_some_and(|since| now.duration_since(since) >= HALF_REQUEST);
        if self.state != State::Reading || !late {
            return;
        }
        if self.output.is_empty() {
            self.refuse(
                Fault::new(format!(
                    "Invalid request: not complete after {} seconds.",
                    HALF_REQUEST.as_secs()
                )),
                now,
            );
        } else {
            self.output = Vec::new();
            self.sent = 0;
            self.peer_done = true;
            self.linger(now);
        }
    }

    /// When `tick` or `is_over` must be asked again at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Reading => self.busy_since.map(|since| since + HALF_REQUEST),
            State::Waiting { .. } => None,
            State::Lingering { until } if self.unsent().is_empty() => Some(until),
            State::Lingering { until } => Some(until + HALF_REQUEST),
        }
    }

    /// For choosing whom to drop: since when nothing happened, unless a call is under way.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        match self.state {
            State::Waiting { .. } => None,
            State::Reading | State::Lingering { .. } => Some(self.last_active),
        }
    }

    fn refuse(&mut self, fault: Fault, now: Instant) {
        self.output = http::response(&Err(fault), false);
        self.sent = 0;
        self.fds = Vec::new();
        self.linger(now);
    }

    fn linger(&mut self, now: Instant) {
        self.input = Vec::new();
        self.state = State::Lingering {
            until: now + LINGER,
        };
    }
}

/// Joins descriptors and names; all are closed if they do not fit together.
fn name_fds(fds: Vec<OwnedFd>, names: &[&str]) -> Result<Vec<(String, OwnedFd)>, Fault> {
    if fds.len() != names.len() {
        return Err(Fault::new(format!(
            "Belljar-Fds names {} descriptors, {} arrived",
            names.len(),
            fds.len()
        )));
    }
    Ok(names.iter().map(|n| (*n).to_owned()).zip(fds).collect())
}

#[cfg(test)]
mod tests;
