//! The host's side of a process as a pure machine: bytes in, events out; what is to be sent is kept.
//!
//! A session outlives its connections. When one is cut, the next asks for the streams from the byte where
//! the last ended, and sends the input that was not taken yet again from its offset; so no byte is lost
//! and none comes twice. A start whose reply was lost is asked for again under the same name, which
//! starts nothing if the first was carried out.
//!
//! ```text
//!  connected() ──► greeting ──► probe? ──► exec or attach ──► streaming ──► end | detached
//!      ▲                                        │ cut             │ cut
//!      └────────────────────────────────────────┴─────────────────┘   disconnected()
//! ```

mod input;
mod streams;

use belljar_protocol::frame::{self, Decoder};
use belljar_protocol::{GENERATION, v1};
use v1::error::Code;
use v1::exec_input::Input as Said;
use v1::exec_output::Output;
use v1::reply::Result as Answer;
use v1::request::Call;

use super::error::SessionError;
use input::Input;
use streams::Cursors;

pub use streams::Channel;

/// Generation from which processes have ids, and so survive a connection.
const RESUMABLE: u32 = 2;
/// Encoded for one connection ahead of what it has taken.
const UNSENT_MAX: usize = 128 << 10;
/// Longest answer line to `CONNECT`: `OK ` and a 32-bit number.
const GREETING_MAX: usize = 32;

/// What the guest said.
#[derive(Debug, PartialEq)]
pub enum Event<'a> {
    /// It was started, or found under its name.
    Started(Started),
    /// The first attach was answered: what the agent knows about the process.
    Attached(&'a v1::ProcessInfo),
    Output(Channel, &'a [u8]),
    /// Bytes `from..to` are lost for this reader.
    Gap {
        channel: Channel,
        from: u64,
        to: u64,
    },
    /// All that was kept has been told.
    CaughtUp,
    /// Another viewer has changed the terminal's size.
    Resized(v1::Terminal),
    /// The last event.
    Ended(v1::End),
    /// The last event: the process goes on without this viewer.
    Detached,
}

/// A process that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// 0: an agent of generation 1.
    pub id: u64,
    pub pid: u32,
    /// It was there already under that name, and nothing was started.
    pub existed: bool,
}

/// What to do after bytes were taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Wait for more.
    Continue,
    /// This connection has done its part: make another at once.
    Redial,
    /// The agent has no room now: make another after a pause.
    Later,
    /// The last event was told.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    /// The VMM's answer line is due.
    Greeting(Ask),
    /// The reply is due.
    Asked(Ask),
    Streaming,
    Over,
}

/// The call that a connection begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// A ping, only to learn the agent's generation.
    Probe,
    Exec,
    Attach,
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    link: Link,
    next: Ask,
    decoder: Decoder,
    /// Begin of the VMM's answer line.
    line: Vec<u8>,
    unsent: Vec<u8>,
    /// Bytes of `unsent` that belong to the request.
    request_left: usize,
    /// Absent: an attach.
    exec: Option<v1::Exec>,
    attach: v1::Attach,
    /// Needs an agent of generation 2; ask before anything is started.
    needs: Option<&'static str>,
    generation: Option<u32>,
    started: Option<Started>,
    /// A start was sent, and its reply was lost.
    maybe_started: bool,
    attached_before: bool,
    cursors: Cursors,
    input: Input,
    /// Not yet in `unsent`.
    controls: Vec<Said>,
    /// In `unsent`, perhaps only in part.
    in_flight: Vec<Said>,
    detaching: bool,
    failed: bool,
}

impl Session {
    /// A start. `needs` names a feature of `exec` that an agent of generation 1 would ignore.
    #[must_use]
    pub fn exec(exec: v1::Exec, needs: Option<&'static str>) -> Self {
        let attach = v1::Attach {
            follow: true,
            owner_key: exec.owner_key.clone(),
            size: exec.terminal,
            ..v1::Attach::default()
        };
        let first = if needs.is_some() {
            Ask::Probe
        } else {
            Ask::Exec
        };
        Self::new(Some(exec), attach, first, needs)
    }

    /// A reader, and if it is not `read_only` a writer, of a process that was started before. The input
    /// session is named by the machine.
    #[must_use]
    pub fn attach(attach: v1::Attach) -> Self {
        Self::new(None, attach, Ask::Attach, None)
    }

    fn new(
        exec: Option<v1::Exec>,
        attach: v1::Attach,
        next: Ask,
        needs: Option<&'static str>,
    ) -> Self {
        Self {
            link: Link::Down,
            next,
            decoder: Decoder::new(),
            line: Vec::new(),
            unsent: Vec::new(),
            request_left: 0,
            exec,
            cursors: Cursors::new(attach.stdout, attach.stderr),
            attach,
            needs,
            generation: None,
            started: None,
            maybe_started: false,
            attached_before: false,
            input: Input::default(),
            controls: Vec::new(),
            in_flight: Vec::new(),
            detaching: false,
            failed: false,
        }
    }

    // ---- Connections ----

    /// A new connection was made. `port`: it is to a VMM, which is asked for that port of its guest first.
    ///
    /// # Errors
    /// The request is too long for a frame.
    pub fn connected(&mut self, port: Option<u32>) -> Result<(), SessionError> {
        self.decoder = Decoder::new();
        self.line.clear();
        self.unsent.clear();
        self.link = match port {
            Some(port) => {
                self.unsent
                    .extend_from_slice(format!("CONNECT {port}\n").as_bytes());
                Link::Greeting(self.next)
            }
            None => Link::Asked(self.next),
        };
        let request = v1::Request {
            generation: GENERATION,
            deadline_ms: 0,
            call: Some(self.call()),
        };
        frame::encode(&request, &mut self.unsent)?;
        self.request_left = self.unsent.len();
        Ok(())
    }

    fn call(&self) -> Call {
        match (self.next, &self.exec) {
            (Ask::Exec, Some(exec)) => {
                let mut exec = exec.clone();
                // What the first try may have started must not be replaced, however quickly it ended.
                exec.replace_ended &= !self.maybe_started;
                Call::Exec(exec)
            }
            (Ask::Attach, _) => {
                let mut attach = self.attach.clone();
                attach.stdout = self.cursors.resume(Channel::Stdout);
                attach.stderr = self.cursors.resume(Channel::Stderr);
                attach.input_session = self.input.session();
                attach.input_offset = self.input.base();
                Call::Attach(attach)
            }
            _ => Call::Ping(v1::Ping {}),
        }
    }

    /// The connection ended. `Ok`: another one is wanted.
    ///
    /// # Errors
    /// Another one is of no use; what the user has to know.
    pub fn disconnected(&mut self) -> Result<(), SessionError> {
        let link = std::mem::replace(&mut self.link, Link::Down);
        if self.failed {
            return Err(SessionError::Failed);
        }
        let lost = std::mem::take(&mut self.in_flight);
        self.controls.splice(0..0, lost);
        match link {
            // Nothing but a question was asked.
            Link::Down
            | Link::Greeting(Ask::Probe | Ask::Attach)
            | Link::Asked(Ask::Probe | Ask::Attach) => {}
            Link::Over => self.link = Link::Over,
            Link::Greeting(Ask::Exec) | Link::Asked(Ask::Exec) => {
                // As long as a byte of the request is here, nobody can have carried it out.
                if self.request_left == 0 {
                    self.maybe_started = true;
                }
                self.next = match self.generation {
                    Some(RESUMABLE..) => Ask::Exec,
                    // An agent that does not know names would start it twice.
                    _ if self.maybe_started => Ask::Probe,
                    _ => self.next,
                };
            }
            Link::Streaming => {
                if self.started.is_some_and(|started| started.id == 0) {
                    return Err(SessionError::Cut {
                        generation: self.generation.unwrap_or_default(),
                    });
                }
                self.next = Ask::Attach;
            }
        }
        self.input.disconnected();
        Ok(())
    }

    /// The connection has done its part ([`Step::Redial`], [`Step::Later`]) and is closed.
    pub fn moved_on(&mut self) {
        self.link = Link::Down;
        self.input.disconnected();
    }

    /// True after the last event.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.link == Link::Over
    }

    /// True once the process is known to have been started or found.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.started.is_some() || self.attached_before
    }

    /// True while frames of the process flow.
    #[must_use]
    pub fn is_streaming(&self) -> bool {
        self.link == Link::Streaming
    }

    /// What was started or found.
    #[must_use]
    pub fn started(&self) -> Option<Started> {
        self.started
    }

    // ---- To the guest ----

    /// What this connection is to be sent next.
    pub fn unsent(&mut self) -> &[u8] {
        if self.link == Link::Streaming {
            self.fill();
        }
        &self.unsent
    }

    /// Whether [`Self::unsent`] has something.
    pub fn has_unsent(&mut self) -> bool {
        !self.unsent().is_empty()
    }

    /// The connection has taken that many bytes.
    pub fn sent(&mut self, count: usize) {
        let count = count.min(self.unsent.len());
        self.unsent.drain(..count);
        self.request_left = self.request_left.saturating_sub(count);
        if self.unsent.is_empty() {
            self.in_flight.clear();
        }
    }

    fn fill(&mut self) {
        for control in self.controls.drain(..) {
            let input = Some(control.clone());
            // A few bytes: it always fits into a frame.
            let _ = frame::encode(&v1::ExecInput { input }, &mut self.unsent);
            self.in_flight.push(control);
        }
        self.input.encode(&mut self.unsent, UNSENT_MAX);
    }

    /// Whether input can be taken in now.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.is_started() && !self.is_over() && !self.detaching && self.input.has_room()
    }

    /// Bytes for the process, held until it is certain that they reach it.
    pub fn input(&mut self, bytes: &[u8]) {
        self.input.push(bytes);
    }

    /// No more input will come.
    pub fn input_end(&mut self) {
        self.input.end();
    }

    /// A signal for the process group of the command.
    pub fn signal(&mut self, number: i32) {
        self.controls.push(Said::Signal(number.unsigned_abs()));
    }

    /// The viewer's terminal has this size now.
    pub fn resize(&mut self, size: v1::Terminal) {
        if self.attach.size == Some(size) {
            return;
        }
        self.attach.size = Some(size);
        // Only the newest counts.
        self.controls
            .retain(|control| !matches!(control, Said::Resize(_)));
        self.controls.push(Said::Resize(size));
    }

    /// Leaves the process alone from now on; [`Event::Detached`] confirms it.
    pub fn detach(&mut self) {
        if !std::mem::replace(&mut self.detaching, true) {
            self.controls.push(Said::Detach(v1::Detach {}));
        }
    }

    // ---- From the guest ----

    /// Takes in bytes of the connection.
    ///
    /// # Errors
    /// The agent refused, or what it sent breaks the protocol. The session is of no use any more.
    pub fn receive(
        &mut self,
        mut input: &[u8],
        mut handle: impl FnMut(Event<'_>),
    ) -> Result<Step, SessionError> {
        let taken = self.take(&mut input, &mut handle);
        self.failed |= taken.is_err();
        taken
    }

    fn take(
        &mut self,
        input: &mut &[u8],
        handle: &mut impl FnMut(Event<'_>),
    ) -> Result<Step, SessionError> {
        if let Link::Greeting(ask) = self.link {
            if !self.greeting(input)? {
                return Ok(Step::Continue);
            }
            self.link = Link::Asked(ask);
        }
        loop {
            if self.link == Link::Over {
                return Ok(Step::Over);
            }
            let Some(message) = self.decoder.feed(input)? else {
                return Ok(Step::Continue);
            };
            let step = match self.link {
                Link::Asked(ask) => self.reply(ask, &message, handle)?,
                _ => self.output(&message, handle)?,
            };
            if step != Step::Continue {
                return Ok(step);
            }
        }
    }

    /// Takes the VMM's answer line. False: it is not whole yet.
    fn greeting(&mut self, input: &mut &[u8]) -> Result<bool, SessionError> {
        while let Some((&byte, rest)) = input.split_first() {
            *input = rest;
            if byte == b'\n' {
                let number = self.line.strip_prefix(b"OK ").unwrap_or_default();
                let good = !number.is_empty() && number.iter().all(u8::is_ascii_digit);
                return if good {
                    Ok(true)
                } else {
                    Err(SessionError::Greeting(printable(&self.line)))
                };
            }
            if self.line.len() >= GREETING_MAX {
                return Err(SessionError::Greeting(printable(&self.line)));
            }
            self.line.push(byte);
        }
        Ok(false)
    }

    fn reply(
        &mut self,
        ask: Ask,
        message: &[u8],
        handle: &mut impl FnMut(Event<'_>),
    ) -> Result<Step, SessionError> {
        let reply = frame::decode_lists::<v1::Reply>(message)?;
        self.generation = Some(reply.generation);
        match (ask, reply.result) {
            (Ask::Probe, Some(Answer::Pong(_))) => self.probed(reply.generation),
            (Ask::Exec, Some(Answer::Exec(started))) => Ok(self.exec_started(started, handle)),
            (Ask::Attach, Some(Answer::Attach(attached))) => self.attached(&attached, handle),
            (Ask::Exec, Some(Answer::SpawnFailure(failure))) => Err(SessionError::Spawn(failure)),
            (_, Some(Answer::Error(error))) => self.refused(ask, error),
            _ => Err(SessionError::Unexpected),
        }
    }

    fn probed(&mut self, generation: u32) -> Result<Step, SessionError> {
        if generation < RESUMABLE {
            return Err(match self.needs {
                Some(feature) => SessionError::TooOld {
                    feature,
                    generation,
                },
                None => SessionError::CutBeforeStart,
            });
        }
        self.next = Ask::Exec;
        Ok(Step::Redial)
    }

    fn exec_started(
        &mut self,
        started: v1::ExecStarted,
        handle: &mut impl FnMut(Event<'_>),
    ) -> Step {
        let started = Started {
            id: started.id,
            pid: started.pid,
            existed: started.existed && started.id != 0,
        };
        let process = v1::process_ref::Ref::Id(started.id);
        self.attach.process = Some(v1::ProcessRef {
            r#ref: Some(process),
        });
        self.cursors.begin();
        let detached = self.exec.as_ref().is_some_and(|exec| exec.detached);
        if started.existed {
            self.input.renumber();
            if self.maybe_started {
                // Ours, if the key fits.
                self.next = Ask::Attach;
                return Step::Redial;
            }
            return self.found(started, detached, handle);
        }
        self.started = Some(started);
        self.input
            .start(started.id != 0 && !self.attach.owner_key.is_empty());
        handle(Event::Started(started));
        if detached {
            return self.over();
        }
        self.link = Link::Streaming;
        Step::Continue
    }

    /// Somebody else's process has that name.
    fn found(
        &mut self,
        started: Started,
        detached: bool,
        handle: &mut impl FnMut(Event<'_>),
    ) -> Step {
        self.started = Some(started);
        self.attach.owner_key.clear();
        handle(Event::Started(started));
        if detached {
            return self.over();
        }
        self.next = Ask::Attach;
        Step::Redial
    }

    fn attached(
        &mut self,
        attached: &v1::Attached,
        handle: &mut impl FnMut(Event<'_>),
    ) -> Result<Step, SessionError> {
        self.input
            .attached(attached.input_session, attached.input_taken)?;
        let info = attached.process.clone().unwrap_or_default();
        // The reply to a start was lost, and this is what it started.
        if self.started.is_none() && self.exec.is_some() {
            let started = Started {
                id: info.id,
                pid: info.pid,
                existed: false,
            };
            self.started = Some(started);
            handle(Event::Started(started));
            if self.exec.as_ref().is_some_and(|exec| exec.detached) {
                return Ok(self.over());
            }
        }
        if !std::mem::replace(&mut self.attached_before, true) {
            handle(Event::Attached(&info));
            if self.attach.process.is_none() || info.id != 0 {
                // From now on this very process, whoever gets its name.
                let process = v1::process_ref::Ref::Id(info.id);
                self.attach.process = Some(v1::ProcessRef {
                    r#ref: Some(process),
                });
            }
        }
        for (channel, from) in [
            (Channel::Stdout, attached.stdout_from),
            (Channel::Stderr, attached.stderr_from),
        ] {
            if let Some((from, to)) = self.cursors.attached(channel, from)? {
                handle(Event::Gap { channel, from, to });
            }
        }
        let detach = Said::Detach(v1::Detach {});
        // A worker that died may have taken it and told nobody.
        if self.detaching && !self.controls.contains(&detach) {
            self.controls.push(detach);
        }
        self.link = Link::Streaming;
        Ok(Step::Continue)
    }

    fn refused(&mut self, ask: Ask, error: v1::Error) -> Result<Step, SessionError> {
        let code = error.code();
        let unsure = ask == Ask::Attach && self.started.is_none() && self.exec.is_some();
        match code {
            Code::Unimplemented => Err(SessionError::TooOld {
                feature: if ask == Ask::Exec { "exec" } else { "attach" },
                generation: self.generation.unwrap_or_default(),
            }),
            // The name belongs to somebody else: so the first start was not carried out.
            Code::Conflict | Code::NotFound | Code::Invalid if unsure && self.maybe_started => {
                self.maybe_started = false;
                self.next = Ask::Exec;
                Ok(Step::Redial)
            }
            Code::NotFound if self.is_started() => Err(SessionError::Vanished),
            Code::Busy if self.is_started() => Ok(Step::Later),
            _ => Err(SessionError::Refused {
                code,
                message: error.message,
            }),
        }
    }

    fn output(
        &mut self,
        message: &[u8],
        handle: &mut impl FnMut(Event<'_>),
    ) -> Result<Step, SessionError> {
        match frame::decode::<v1::ExecOutput>(message)?.output {
            Some(Output::Stdout(bytes)) => self.bytes(Channel::Stdout, &bytes, handle)?,
            Some(Output::Stderr(bytes)) => self.bytes(Channel::Stderr, &bytes, handle)?,
            Some(Output::Gap(gap)) => {
                let channel = Channel::of(gap.stream());
                if let Some((from, to)) = self.cursors.gap(channel, gap.to) {
                    handle(Event::Gap { channel, from, to });
                }
            }
            Some(Output::InputTaken(count)) => self.input.taken(count)?,
            Some(Output::Resized(size)) => {
                handle(Event::Resized(size));
            }
            Some(Output::CaughtUp(_)) => handle(Event::CaughtUp),
            Some(Output::End(end)) => {
                handle(Event::Ended(end));
                return Ok(self.over());
            }
            Some(Output::Detached(_)) => {
                handle(Event::Detached);
                return Ok(self.over());
            }
            // A kind of output from a later generation.
            None => {}
        }
        Ok(Step::Continue)
    }

    fn bytes(
        &mut self,
        channel: Channel,
        bytes: &[u8],
        handle: &mut impl FnMut(Event<'_>),
    ) -> Result<(), SessionError> {
        self.cursors.advance(channel, bytes.len())?;
        handle(Event::Output(channel, bytes));
        Ok(())
    }

    fn over(&mut self) -> Step {
        self.link = Link::Over;
        Step::Over
    }
}

fn printable(line: &[u8]) -> String {
    line.escape_ascii().to_string()
}

#[cfg(test)]
mod tests;
