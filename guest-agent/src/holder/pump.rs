//! Moving bytes: from programs into rings, from rings to readers, from writers to programs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use belljar_protocol::v1::{self, exec_output::Output as Told};

use super::channel::{Broken, Channel, Role};
use super::events::Events;
use super::process::{Owner, Process, Pumped};
use super::{Holder, unix_ns};
use crate::wire::from_holder::Message as Said;

/// Turns of one process before others get theirs.
const TURNS: usize = 8;

/// Granted input is told in pieces of at least so many bytes.
const MIN_ROOM: u64 = 64 << 10;

/// Taken input is told after so many bytes, or beside output.
const MIN_TAKEN: u64 = 16 << 10;

/// A process that does not read its input is sent no more when so many bytes wait for it.
pub(super) const MAX_UNWRITTEN: usize = 1 << 20;

/// Events wait in the log, not in memory, beyond so many bytes.
const MAX_UNSENT_EVENTS: usize = 32 << 10;

/// Fields of `ExecOutput` for the two streams.
const STREAM_FIELDS: [u64; 2] = [1, 2];

const STREAMS: [v1::Stream; 2] = [v1::Stream::Stdout, v1::Stream::Stderr];

impl Holder {
    /// Gives a process its turns: reads what it wrote, shows it to its readers, writes its input.
    pub(super) fn drive(&mut self, id: u64) {
        if self.table.get(id).is_none() {
            return self.drain_abandoned(id);
        }
        for _ in 0..TURNS {
            let moved = self.pump(id);
            let fed = self.feed_viewers(id);
            if !moved && !fed {
                return;
            }
        }
        self.again.insert(id);
    }

    /// Reads each stream once and writes input. True if something moved.
    fn pump(&mut self, id: u64) -> bool {
        let Some(process) = self.table.get_mut(id) else {
            return false;
        };
        let mut moved = false;
        note_holds(process, &self.channels);
        let holds = process.holds;
        let is_short = self.table.is_short();
        let Some(process) = self.table.get_mut(id) else {
            return false;
        };
        let (mut before, mut after) = (0_usize, 0_usize);
        for (output, hold) in process.outputs.iter_mut().zip(holds) {
            before = before.saturating_add(output.ring.held());
            let pumped = output.pump(&mut self.scratch, hold, is_short, unix_ns);
            moved |= pumped == Pumped::Moved;
            after = after.saturating_add(output.ring.held());
        }
        let was_settled = process.is_settled();
        process.check_drained();
        moved |= process.is_settled() && !was_settled;
        let gone = process.flush_input();
        if gone > 0 {
            moved = true;
            settle_senders(process, &mut self.channels, gone, &mut self.dirty);
        }
        let has_settled = process.is_settled() && !was_settled;
        self.table.note_held(before, after);
        if has_settled {
            self.tell_waiters(id);
        }
        moved
    }

    /// Shows each reader what it has not seen yet, as far as there is room. True if some was shown.
    fn feed_viewers(&mut self, id: u64) -> bool {
        let Some(process) = self.table.get_mut(id) else {
            return false;
        };
        let mut fed = false;
        let mut is_done = false;
        for viewer in &process.viewers {
            if let Some(channel) = self.channels.get_mut(viewer) {
                let (now_fed, now_done) = feed(process, channel);
                if now_fed {
                    self.dirty.insert(*viewer);
                }
                fed |= now_fed;
                is_done |= now_done;
            }
        }
        if is_done {
            let channels = &self.channels;
            process.viewers.retain(|viewer| {
                let role = channels.get(viewer).map(|channel| &channel.role);
                matches!(role, Some(Role::Viewer(_)))
            });
            if let Owner::Channel(owner) = process.owner
                && !process.viewers.contains(&owner)
            {
                process.disown();
            }
        }
        fed
    }

    /// Sends to all who watch a terminal how large it is.
    pub(super) fn tell_size(&mut self, id: u64) {
        let Some(process) = self.table.get(id) else {
            return;
        };
        let Some(size) = process.terminal else { return };
        for viewer in &process.viewers {
            if let Some(channel) = self.channels.get_mut(viewer)
                && channel.viewer().is_some_and(|viewer| viewer.is_told_all)
            {
                channel.queue_output(Told::Resized(size));
                self.dirty.insert(*viewer);
            }
        }
    }

    /// Takes bytes that a channel sends for its process. Every channel has a window, but those who
    /// leave leave their bytes behind: when too many wait, the channel is broken and nothing taken.
    pub(super) fn take_input(&mut self, channel_id: u64, bytes: &[u8]) -> Result<(), Broken> {
        let channel = self.channels.get_mut(&channel_id).ok_or(Broken)?;
        let viewer = channel.viewer_mut().ok_or(Broken)?;
        let id = viewer.process;
        let length = bytes.len() as u64;
        viewer.input_owed = viewer.input_owed.saturating_add(length);
        let Some(process) = self.table.get_mut(id) else {
            return Ok(());
        };
        let before = process.input.unwritten().len();
        // The only owner there will be has one window only, and the process ends with it.
        let is_bounded =
            process.owner == Owner::Channel(channel_id) && process.owner_key.is_empty();
        if before >= MAX_UNWRITTEN && !is_bounded && !viewer.read_only {
            crate::log!("process {} does not read its input", process.pid);
            return Err(Broken);
        }
        let taken = if viewer.read_only || process.stdin.is_none() {
            viewer.input_offset.saturating_add(length)
        } else {
            process
                .input
                .take(viewer.input_session, viewer.input_offset, bytes)
        };
        viewer.input_offset = viewer.input_offset.saturating_add(length);
        let queued = process.input.unwritten().len().saturating_sub(before) as u64;
        if queued > 0 {
            let known = process.senders.iter_mut().find(|it| it.0 == channel_id);
            match known {
                Some((_, bytes)) => *bytes = bytes.saturating_add(queued),
                None => process.senders.push_back((channel_id, queued)),
            }
        }
        if viewer.is_told_all && taken.saturating_sub(viewer.input_taken) >= MIN_TAKEN {
            viewer.input_taken = taken;
            channel.queue_output(Told::InputTaken(taken));
            self.dirty.insert(channel_id);
        }
        // What was dropped is out of the way at once.
        if grant(channel, length.saturating_sub(queued)) {
            self.dirty.insert(channel_id);
        }
        let size = self
            .channels
            .get(&channel_id)
            .and_then(Channel::viewer)
            .filter(|viewer| !viewer.read_only)
            .and_then(|viewer| viewer.size);
        // Who types last has the right size.
        if let Some(size) = size {
            self.resize(id, &size);
        }
        self.drive(id);
        Ok(())
    }

    pub(super) fn resize(&mut self, id: u64, size: &v1::Terminal) {
        if let Some(process) = self.table.get_mut(id)
            && process.resize(size)
        {
            self.tell_size(id);
        }
    }

    /// Sends what is queued. A channel that fails is forgotten.
    pub(super) fn flush_channels(&mut self) {
        // Forgetting a channel may give others something to send.
        while let Some(id) = self.dirty.pop_first() {
            if let Some(channel) = self.channels.get_mut(&id)
                && channel.flush().is_err()
            {
                self.drop_channel(id);
            }
        }
    }

    /// Shows followers of events what has happened.
    pub(super) fn feed_events(&mut self) {
        for (id, channel) in &mut self.channels {
            if matches!(channel.role, Role::Events { .. }) && feed_events(&self.events, channel) {
                self.dirty.insert(*id);
            }
        }
    }

    /// Starts to show events on a channel.
    pub(super) fn begin_events(&mut self, id: u64) {
        if let Some(channel) = self.channels.get_mut(&id)
            && feed_events(&self.events, channel)
        {
            self.dirty.insert(id);
        }
    }

    /// Looks at a process whose time has come.
    pub(super) fn tick_process(&mut self, id: u64, now: Instant) {
        let Some(process) = self.table.get_mut(id) else {
            return;
        };
        if let Some(action) = process.life.tick(now) {
            process.act(action);
        }
        if let Some(at) = process.life.wakes_at() {
            self.timers.insert((at, id));
        }
        if let Owner::Lost { until, .. } = process.owner {
            if until <= now {
                process.disown();
                if process.is_running() {
                    crate::log!("nobody came back for process {}: killing it", process.pid);
                    process.kill_tree();
                }
                self.again.insert(id);
            } else {
                self.timers.insert((until, id));
            }
        }
        let expires = process.ended.as_ref().and_then(|ended| ended.expires);
        match expires {
            Some(at) if at <= now => self.expire(id, now),
            Some(at) => drop(self.timers.insert((at, id))),
            None => {}
        }
    }
}

/// From where on each stream is held for the owner of a process. What it was sent and has not
/// passed on may be lost with its worker.
fn note_holds(process: &mut Process, channels: &BTreeMap<u64, Channel>) {
    let Owner::Channel(owner) = process.owner else {
        return;
    };
    let viewer = channels.get(&owner).and_then(Channel::viewer);
    if let Some(viewer) = viewer.filter(|viewer| viewer.process == process.id) {
        process.holds = viewer
            .cursors
            .map(|cursor| Some(cursor.saturating_sub(viewer.unacknowledged)));
    }
}

/// So much input is read by the process or thrown away: those who sent it may send as much again.
fn settle_senders(
    process: &mut Process,
    channels: &mut BTreeMap<u64, Channel>,
    mut gone: u64,
    dirty: &mut BTreeSet<u64>,
) {
    while gone > 0 {
        let Some((sender, bytes)) = process.senders.front_mut() else {
            return;
        };
        let part = gone.min(*bytes);
        gone = gone.saturating_sub(part);
        *bytes = bytes.saturating_sub(part);
        if let Some(channel) = channels.get_mut(sender)
            && channel
                .viewer()
                .is_some_and(|viewer| viewer.process == process.id)
            && grant(channel, part)
        {
            dirty.insert(*sender);
        }
        if *bytes == 0 {
            process.senders.pop_front();
        }
    }
}

/// True if that is told to the worker now: not every keystroke is worth a message.
fn grant(channel: &mut Channel, bytes: u64) -> bool {
    let Some(viewer) = channel.viewer_mut() else {
        return false;
    };
    viewer.input_read = viewer.input_read.saturating_add(bytes);
    if viewer.input_read < MIN_ROOM {
        return false;
    }
    let room = std::mem::take(&mut viewer.input_read);
    viewer.input_owed = viewer.input_owed.saturating_sub(room);
    channel.queue(Said::InputRoom(room));
    true
}

/// What is told once or beside output. True if something was.
fn tell_progress(channel: &mut Channel, process: &Process, has_fed: bool, is_behind: bool) -> bool {
    let Some(viewer) = channel.viewer_mut().filter(|viewer| viewer.is_told_all) else {
        return false;
    };
    let (session, told) = (viewer.input_session, viewer.input_taken);
    let taken = process.input.taken(session);
    let tells_taken = has_fed && taken > told;
    let catches_up = !viewer.caught_up && !is_behind;
    if tells_taken {
        viewer.input_taken = taken;
    }
    viewer.caught_up |= catches_up;
    if tells_taken {
        channel.queue_output(Told::InputTaken(taken));
    }
    if catches_up {
        channel.queue_output(Told::CaughtUp(v1::CaughtUp {}));
    }
    tells_taken || catches_up
}

/// All is read: tells the end, or that the reader is done. False: more may come.
fn finish(process: &Process, channel: &mut Channel) -> bool {
    let follows = channel.viewer().is_some_and(|viewer| viewer.follow);
    let ended = process.ended.as_ref().filter(|_| process.is_settled());
    match ended {
        Some(ended) => channel.queue_output(Told::End(ended.end.clone())),
        None if follows => return false,
        None => channel.queue_output(Told::Detached(v1::Detached {})),
    }
    channel.role = Role::Idle;
    true
}

/// Queues events up to the newest, or as many as the worker takes. True if there were any.
fn feed_events(events: &Events, channel: &mut Channel) -> bool {
    let mut fed = false;
    while let Role::Events { next, follow } = channel.role {
        if channel.unsent() > MAX_UNSENT_EVENTS {
            break;
        }
        match events.get(next) {
            Some(event) => {
                channel.role = Role::Events {
                    next: event.sequence.saturating_add(1),
                    follow,
                };
                channel.queue(Said::Event(event));
            }
            None if follow => break,
            None => {
                channel.queue(Said::Done(crate::wire::Done {}));
                channel.role = Role::Idle;
            }
        }
        fed = true;
    }
    fed
}

/// Returns (something was queued, the channel is free again).
fn feed(process: &Process, channel: &mut Channel) -> (bool, bool) {
    if channel.viewer().is_none() {
        return (false, true);
    }
    let mut fed = false;
    let mut is_behind = false;
    let mut is_done = true;
    let ends = process.is_settled().then_some(process.finals);
    for (at, output) in process.outputs.iter().enumerate() {
        let ring = &output.ring;
        loop {
            let Some(viewer) = channel.viewer_mut() else {
                return (fed, true);
            };
            let (Some(cursor), Some(bound)) = (viewer.cursors.get_mut(at), viewer.bounds.get(at))
            else {
                break;
            };
            let bound = bound.or(ends.and_then(|ends| ends.get(at).copied().flatten()));
            let end = bound.unwrap_or(u64::MAX).min(ring.newest());
            if *cursor < ring.oldest() {
                let (from, to) = (*cursor, ring.oldest());
                *cursor = to;
                if viewer.is_told_all {
                    let stream = STREAMS.get(at).copied().unwrap_or_default().into();
                    channel.queue_output(Told::Gap(v1::Gap { stream, from, to }));
                    fed = true;
                }
                continue;
            }
            let available = end.saturating_sub(*cursor);
            if available == 0 {
                let is_over = bound.is_some_and(|bound| *cursor >= bound) || output.is_closed();
                is_done &= is_over;
                break;
            }
            let from = *cursor;
            let length = viewer.room(available);
            if length == 0 {
                is_behind = true;
                is_done = false;
                break;
            }
            if let Some(cursor) = viewer.cursors.get_mut(at) {
                *cursor = from.saturating_add(length);
            }
            let field = STREAM_FIELDS.get(at).copied().unwrap_or(1);
            channel.queue_bytes(field, length, pieces(process, at, from, length));
            fed = true;
        }
    }
    fed |= tell_progress(channel, process, fed, is_behind);
    if is_done && finish(process, channel) {
        return (true, true);
    }
    (fed, false)
}

/// Bytes of a stream as they lie in its ring.
fn pieces(process: &Process, at: usize, from: u64, length: u64) -> impl Iterator<Item = &[u8]> {
    let ring = process.outputs.get(at).map(|output| &output.ring);
    let mut next = from;
    let end = from.saturating_add(length);
    std::iter::from_fn(move || {
        let left = usize::try_from(end.saturating_sub(next)).unwrap_or(usize::MAX);
        let piece = ring?.piece(next);
        let piece = piece.get(..left).unwrap_or(piece);
        next = next.saturating_add(piece.len() as u64);
        Some(piece).filter(|piece| !piece.is_empty())
    })
}
