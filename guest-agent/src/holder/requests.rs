//! What the worker asks for on a channel.

use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, error::Code, exec_output::Output as Told};
use prost::Message;
use rustix::event::epoll::EventFlags;

use super::channel::{Broken, Channel, INPUT_WINDOW, Role, Viewer};
use super::process::{Owner, sane_size};
use super::{Ended, Holder, KIND_CHANNEL, MAX_CHANNELS, token};
use crate::wire::{ToHolder, from_holder::Message as Said, to_holder::Message as Asked};

/// How long the owner of a tied process may take to come back after the worker died.
const OWNER_TIME: Duration = Duration::from_secs(10);

/// Longest reference to a process by name, and other short texts, bytes.
pub(super) const MAX_NAME: usize = 128;

/// Answers that a channel may leave unread, bytes: more than the longest one.
const MAX_UNSENT: usize = 2 << 20;

/// Largest event that the worker may post, bytes.
const MAX_EVENT: usize = 4096;

impl Holder {
    /// A channel more.
    pub(super) fn add_channel(&mut self, fd: std::os::fd::OwnedFd) {
        if self.channels.len() >= MAX_CHANNELS {
            crate::log!("too many channels of the worker: one refused");
            return;
        }
        self.last_channel = self.last_channel.wrapping_add(1);
        let id = self.last_channel;
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if let Err(error) = self.watch(&fd, token(id, KIND_CHANNEL), flags) {
            crate::log!("cannot watch a channel of the worker: {error}");
            return;
        }
        // The first request is in it already.
        self.channels.insert(id, Channel::new(fd));
        self.serve_channel(id);
    }

    /// Reads what a channel has to say and does it.
    pub(super) fn serve_channel(&mut self, id: u64) {
        let mut scratch = std::mem::take(&mut self.inbox);
        let served = self.read_channel(id, &mut scratch);
        self.inbox = scratch;
        if served.is_err() {
            self.drop_channel(id);
            return;
        }
        let process = match self.channels.get_mut(&id).map(|channel| &channel.role) {
            Some(Role::Viewer(viewer)) => viewer.process,
            Some(Role::Events { .. }) => return self.begin_events(id),
            _ => return,
        };
        self.drive(process);
    }

    fn read_channel(&mut self, id: u64, scratch: &mut [u8]) -> Result<(), Broken> {
        loop {
            let channel = self.channels.get_mut(&id).ok_or(Broken)?;
            let got = channel.receive(scratch)?;
            if got == 0 {
                return Ok(());
            }
            let mut bytes = scratch.get(..got).unwrap_or_default();
            while !bytes.is_empty() {
                let channel = self.channels.get_mut(&id).ok_or(Broken)?;
                let frame = channel.decoder.feed(&mut bytes).map_err(broken)?;
                let Some(frame) = frame else { break };
                let asked = ToHolder::decode(&*frame).map_err(broken)?;
                if channel.unsent() > MAX_UNSENT {
                    return Err(broken("it asks and does not read"));
                }
                if let Some(asked) = asked.message {
                    self.answer(id, asked)?;
                }
            }
        }
    }

    /// The worker has closed a channel, or died, or broken the rules.
    pub(super) fn drop_channel(&mut self, id: u64) {
        self.dirty.remove(&id);
        let Some(channel) = self.channels.remove(&id) else {
            return;
        };
        match channel.role {
            Role::Viewer(viewer) => self.lose_viewer(id, &viewer),
            Role::Waiting(process) => {
                if let Some(process) = self.table.get_mut(process) {
                    process.waiters.retain(|waiter| *waiter != id);
                }
            }
            Role::Starting => self.cancel_start(id),
            Role::Idle | Role::Events { .. } => {}
        }
    }

    fn lose_viewer(&mut self, id: u64, viewer: &Viewer) {
        let Some(process) = self.table.get_mut(viewer.process) else {
            return;
        };
        process.viewers.retain(|known| *known != id);
        if process.owner != Owner::Channel(id) {
            return;
        }
        if process.owner_key.is_empty() {
            process.disown();
            if process.is_running() {
                crate::log!("connection lost, killing process {}", process.pid);
                process.kill_tree();
            }
        } else {
            // After its end, too: bytes may be left that only the owner must not miss.
            let now = Instant::now();
            let until = now.checked_add(OWNER_TIME).unwrap_or(now);
            process.owner = Owner::Lost { until };
            self.timers.insert((until, viewer.process));
        }
        self.again.insert(viewer.process);
    }

    /// Carries out one message of a channel.
    fn answer(&mut self, id: u64, asked: Asked) -> Result<(), Broken> {
        let channel = self.channels.get_mut(&id).ok_or(Broken)?;
        let is_idle = matches!(channel.role, Role::Idle);
        match asked {
            // Behind the end of a process these come too late.
            Asked::PassedOn(_)
            | Asked::Input(_)
            | Asked::CloseInput(_)
            | Asked::Signal(_)
            | Asked::Resize(_)
            | Asked::Detach(_)
            | Asked::HangUp(_)
                if is_idle =>
            {
                Ok(())
            }
            Asked::HangUp(_) => {
                self.hang_up(id);
                Ok(())
            }
            Asked::PassedOn(_)
            | Asked::Input(_)
            | Asked::CloseInput(_)
            | Asked::Signal(_)
            | Asked::Resize(_)
            | Asked::Detach(_) => self.use_process(id, asked),
            _ if !is_idle => {
                crate::log!("the worker asks on a channel that is in use");
                Err(Broken)
            }
            Asked::Start(_) if self.frozen => {
                let message =
                    "all programs are frozen, and none can be started until they are thawed";
                self.say(id, Said::Refused(error(Code::Conflict, message)));
                Ok(())
            }
            Asked::Start(start) => {
                self.start(id, start);
                Ok(())
            }
            Asked::Attach(attach) => {
                self.attach(id, &attach);
                Ok(())
            }
            request => {
                let said = self.answer_once(id, request);
                if let Some(said) = said {
                    self.say(id, said);
                }
                Ok(())
            }
        }
    }

    /// Queues a message on a channel.
    pub(super) fn say(&mut self, id: u64, said: Said) {
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.queue(said);
            self.dirty.insert(id);
        }
    }

    pub(super) fn refuse(&mut self, id: u64, code: Code, message: impl Into<String>) {
        self.say(id, Said::Refused(error(code, message)));
    }

    /// Messages about the process that a channel is attached to.
    fn use_process(&mut self, id: u64, asked: Asked) -> Result<(), Broken> {
        let channel = self.channels.get_mut(&id).ok_or(Broken)?;
        let viewer = channel.viewer_mut().ok_or(Broken)?;
        let process_id = viewer.process;
        let may_write = !viewer.read_only;
        match asked {
            Asked::PassedOn(bytes) => {
                viewer.unacknowledged = viewer.unacknowledged.saturating_sub(bytes);
                self.drive(process_id);
            }
            Asked::Input(bytes) => {
                if viewer.input_owed > INPUT_WINDOW {
                    crate::log!("the worker sends more input than it may");
                    return Err(Broken);
                }
                self.take_input(id, &bytes)?;
            }
            Asked::CloseInput(_) if may_write => {
                let (session, offset) = (viewer.input_session, viewer.input_offset);
                if let Some(process) = self.table.get_mut(process_id)
                    && process.input.take_end(session, offset)
                {
                    process.close_input();
                }
                self.drive(process_id);
            }
            Asked::Signal(number) if may_write => {
                if let Some(process) = self.table.get_mut(process_id) {
                    process.signal_foreground(number);
                }
            }
            Asked::Resize(size) => {
                viewer.size = Some(sane_size(&size));
                if may_write {
                    self.resize(process_id, &size);
                }
            }
            Asked::Detach(_) => self.detach(id),
            _ => {}
        }
        Ok(())
    }

    /// A viewer leaves; the process goes on.
    fn detach(&mut self, id: u64) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        let Role::Viewer(viewer) = std::mem::replace(&mut channel.role, Role::Idle) else {
            return;
        };
        channel.queue_output(Told::Detached(v1::Detached {}));
        self.dirty.insert(id);
        if let Some(process) = self.table.get_mut(viewer.process) {
            process.viewers.retain(|known| *known != id);
            if process.owner == Owner::Channel(id) {
                process.disown();
            }
            self.again.insert(viewer.process);
        }
    }

    /// The host has closed a connection.
    fn hang_up(&mut self, id: u64) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        match std::mem::replace(&mut channel.role, Role::Idle) {
            Role::Viewer(viewer) => {
                let Some(process) = self.table.get_mut(viewer.process) else {
                    return;
                };
                process.viewers.retain(|known| *known != id);
                if process.owner == Owner::Channel(id) {
                    process.disown();
                    if process.is_running() {
                        crate::log!("connection closed, killing process {}", process.pid);
                        process.kill_tree();
                    }
                }
                self.again.insert(viewer.process);
            }
            Role::Waiting(process) => {
                if let Some(process) = self.table.get_mut(process) {
                    process.waiters.retain(|waiter| *waiter != id);
                }
            }
            Role::Starting => self.cancel_start(id),
            Role::Idle | Role::Events { .. } => {}
        }
    }

    /// Makes a channel a reader of a process.
    fn attach(&mut self, id: u64, attach: &v1::Attach) {
        let Some(process_id) = self.table.find(attach.process.as_ref()) else {
            return self.refuse(id, Code::NotFound, "no such process");
        };
        let Some(process) = self.table.get_mut(process_id) else {
            return;
        };
        let takes_over = !attach.owner_key.is_empty();
        if takes_over && process.owner_key != attach.owner_key {
            return self.refuse(id, Code::Conflict, "that is not the key of its owner");
        }
        let mut viewer = Viewer::new(process_id);
        let positions = [attach.stdout.as_ref(), attach.stderr.as_ref()];
        for ((cursor, output), position) in viewer
            .cursors
            .iter_mut()
            .zip(&process.outputs)
            .zip(positions)
        {
            *cursor = place(&output.ring, position);
        }
        let froms = viewer.cursors;
        viewer.follow = attach.follow;
        viewer.read_only = attach.read_only;
        viewer.caught_up = false;
        viewer.size = attach.size.as_ref().map(sane_size);
        if !attach.follow || process.is_settled() {
            viewer.bounds = process.ends_now();
        }
        let mut taken = 0;
        if !attach.read_only {
            (viewer.input_session, taken) = process.input.open(attach.input_session);
            viewer.input_offset = attach.input_offset;
            viewer.input_taken = taken;
        }
        let session = viewer.input_session;
        let size = viewer.size.filter(|_| !attach.read_only);
        process.viewers.push(id);
        if takes_over && process.owner != Owner::None {
            process.owner = Owner::Channel(id);
        }
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.role = Role::Viewer(Box::new(viewer));
        }
        let info = self.table.get(process_id).map(super::info::full);
        self.say(
            id,
            Said::Attached(v1::Attached {
                process: info,
                input_session: session,
                input_taken: taken,
                stdout_from: froms[0],
                stderr_from: froms[1],
            }),
        );
        // The last to come is the last to be active.
        if let Some(size) = size {
            self.resize(process_id, &size);
        }
    }

    /// Requests with one answer. `None`: it comes later.
    fn answer_once(&mut self, id: u64, request: Asked) -> Option<Said> {
        let find = |reference: Option<&v1::ProcessRef>| {
            let found = self.table.find(reference);
            found.ok_or_else(|| error(Code::NotFound, "no such process"))
        };
        let said = match request {
            Asked::List(list) => Ok(Said::List(super::info::list(&self.table, list.ended))),
            Asked::Inspect(inspect) => find(inspect.process.as_ref()).map(|found| {
                let info = self.table.get(found).map(super::info::full);
                Said::Info(info.unwrap_or_default())
            }),
            Asked::SendSignal(signal) => find(signal.process.as_ref()).and_then(|found| {
                if !(1..=64).contains(&signal.number) {
                    return Err(error(Code::Invalid, "number: signals are 1 to 64"));
                }
                let process = self.table.get(found);
                let was_ended =
                    process.is_none_or(|process| process.signal(signal.number, signal.scope()));
                Ok(Said::SignalSent(v1::SignalSent { was_ended }))
            }),
            Asked::ResizeProcess(resize) => find(resize.process.as_ref()).and_then(|found| {
                let size = resize.size.unwrap_or_default();
                if self.table.get(found).is_none_or(|it| it.terminal.is_none()) {
                    return Err(error(Code::Invalid, "the process has no terminal"));
                }
                self.resize(found, &size);
                Ok(Said::Resized(v1::Resized {}))
            }),
            Asked::Forget(forget) => find(forget.process.as_ref()).and_then(|found| {
                if self.table.get(found).is_some_and(|it| it.is_running()) {
                    return Err(error(Code::Conflict, "the process has not ended"));
                }
                self.forget(found);
                Ok(Said::Forgotten(v1::Forgotten {}))
            }),
            Asked::WaitEnd(reference) => match find(Some(&reference)) {
                Err(error) => Err(error),
                Ok(found) => {
                    let process = self.table.get_mut(found)?;
                    if process.is_settled() {
                        Ok(Said::Info(super::info::full(process)))
                    } else {
                        process.waiters.push(id);
                        self.channels.get_mut(&id)?.role = Role::Waiting(found);
                        return None;
                    }
                }
            },
            Asked::Shutdown(shutdown) => {
                let ended = match shutdown.mode() {
                    v1::shutdown::Mode::PowerOff => Ended::PowerOff,
                    v1::shutdown::Mode::Reboot => Ended::Reboot,
                };
                let grace = shutdown
                    .grace_ms
                    .unwrap_or(belljar_protocol::DEFAULT_GRACE_MS);
                self.say(id, Said::Shutdown(v1::ShutdownStarted {}));
                self.flush_channels();
                self.stop(ended, Duration::from_millis(grace));
                return None;
            }
            Asked::Events(follow) => {
                let started = v1::EventsStarted {
                    oldest: self.events.oldest(),
                    next: self.events.next(),
                };
                let next = match follow.from {
                    0 => started.oldest,
                    from => from,
                };
                self.channels.get_mut(&id)?.role = Role::Events {
                    next,
                    follow: follow.follow,
                };
                Ok(Said::Events(started))
            }
            Asked::Freeze(frozen) => self
                .freeze(frozen)
                .map(|()| Said::Done(crate::wire::Done {})),
            Asked::PostEvent(event) => {
                let is_small = event.encoded_len() <= MAX_EVENT;
                match event.what {
                    Some(what) if is_small => {
                        self.add_event(what);
                        Ok(Said::Done(crate::wire::Done {}))
                    }
                    _ => Err(error(Code::Invalid, "no event, or too large a one")),
                }
            }
            _ => Err(error(Code::Invalid, "no request")),
        };
        Some(said.unwrap_or_else(Said::Refused))
    }

    /// Stops all programs, or lets them go on.
    pub(super) fn freeze(&mut self, frozen: bool) -> Result<(), v1::Error> {
        let Some(cgroups) = &self.cgroups else {
            return Err(v1::Error {
                errno: libc::EOPNOTSUPP.unsigned_abs(),
                ..error(Code::System, "there are no cgroups in this guest to freeze")
            });
        };
        if frozen && self.stopping.is_some() {
            return Err(error(Code::ShuttingDown, "the guest is shutting down"));
        }
        cgroups.freeze(frozen).map_err(|failed| v1::Error {
            errno: failed.raw_os_error().unwrap_or(0).unsigned_abs(),
            ..error(Code::System, format!("writing cgroup.freeze: {failed}"))
        })?;
        self.frozen = frozen;
        Ok(())
    }
}

fn broken(error: impl std::fmt::Display) -> Broken {
    crate::log!("a channel of the worker: {error}");
    Broken
}

pub(super) fn error(code: Code, message: impl Into<String>) -> v1::Error {
    v1::Error {
        code: code.into(),
        message: message.into(),
        errno: 0,
    }
}

/// Where a reader begins.
fn place(ring: &super::ring::Ring, position: Option<&v1::Position>) -> u64 {
    use v1::position::At;
    match position.and_then(|position| position.at.as_ref()) {
        None | Some(At::Oldest(_)) => ring.oldest(),
        Some(At::Newest(_)) => ring.newest(),
        // Beyond the end there is nothing yet.
        Some(At::Offset(offset)) => (*offset).min(ring.newest()),
        Some(At::SinceUnixNs(time)) => ring.since(*time),
        Some(At::Lines(lines)) => ring.lines(*lines),
    }
}
