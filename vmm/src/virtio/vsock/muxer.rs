//! All connections of a device: who gets a packet of the guest, what the guest gets next. No
//! I/O; every table and queue is bounded.
use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Event, Key, Millis, Outgoing, Reply, State};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::metrics::{Counter, Registry};

/// Most connections at once.
pub const MAX_CONNECTIONS: usize = 1023;
/// Most resets kept for a guest that offers no receive buffers. Further ones are dropped: the
/// guest learns with its next packet, or by its own time-out.
pub const MAX_RESETS: usize = 256;
/// Most bytes that all hosts' sockets together may be behind. A connection that would exceed
/// it is reset: credit bounds each connection, this the VMM's memory.
pub const MAX_BACKLOG: usize = 64 << 20;

/// First port of the host's side, out of the way of well-known ones (Firecracker's choice).
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// A slot in the table. The generation tells a connection from an earlier one in its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id {
    pub index: u32,
    pub generation: u32,
}

/// What the device does with a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing, or only what [`Muxer::next_packet`] says.
    Done,
    /// The guest asks for a port of the host: connect, then [`Muxer::accept`] or
    /// [`Muxer::refuse`].
    Dial,
    /// The guest accepted: greet the host.
    Opened(Id),
    /// The payload is for the host; [`Muxer::forwarded`] or [`Muxer::hold`] every byte.
    Deliver(Id),
    /// Something ended: settle the host's socket.
    Changed(Id),
}

/// The next packet for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Control(Header),
    /// Up to `limit` bytes of the host's socket, in packets whose headers
    /// [`Muxer::data_header`] makes.
    Data {
        id: Id,
        limit: u32,
    },
}

/// The table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_CONNECTIONS} connections are open")]
pub struct Full;

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Connections made, by who asked.
    pub from_host: Counter,
    pub from_guest: Counter,
    /// Connections refused because a table was full.
    pub refused: Counter,
    /// Guest requests that found no listener.
    pub no_listener: Counter,
    /// Packets that were not for the host, or not from the guest.
    pub misaddressed: Counter,
    /// Resets sent, and those dropped because the guest took none.
    pub resets: Counter,
    pub resets_dropped: Counter,
    /// Connections ended because one side did not answer in time.
    pub timed_out: Counter,
    /// Payload bytes, from and to the guest.
    pub tx_bytes: Counter,
    pub rx_bytes: Counter,
}

impl Counters {
    /// Counters that stand in the metrics under `vsock`.
    pub fn new(registry: &Registry) -> Self {
        let counter = |name| registry.counter("vsock", name);
        Self {
            from_host: counter("connections_from_host"),
            from_guest: counter("connections_from_guest"),
            refused: counter("connections_refused"),
            no_listener: counter("no_listener"),
            misaddressed: counter("misaddressed_packets"),
            resets: counter("resets"),
            resets_dropped: counter("resets_dropped"),
            timed_out: counter("timed_out"),
            tx_bytes: counter("tx_bytes"),
            rx_bytes: counter("rx_bytes"),
        }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    connection: Option<Connection>,
}

#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Connections the guest can name.
    table: HashMap<Key, Id>,
    /// Connections that may have something for the guest, each once.
    round: VecDeque<Id>,
    resets: VecDeque<Header>,
    next_port: u32,
    /// Sum of all backlogs.
    backlog: usize,
    /// No deadline is before this one.
    soonest: Option<Millis>,
    pub(super) counters: Counters,
}

impl Muxer {
    pub fn new(guest_cid: u64, counters: Counters) -> Self {
        Self {
            guest_cid,
            slots: Vec::new(),
            free: Vec::new(),
            table: HashMap::new(),
            round: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
            backlog: 0,
            soonest: None,
            counters,
        }
    }

    /// Forgets every connection.
    pub fn reset(&mut self) {
        for id in self.ids() {
            self.remove(id);
        }
        self.round.clear();
        self.resets.clear();
        self.soonest = None;
    }

    pub fn get(&self, id: Id) -> Option<&Connection> {
        let slot = self.slots.get(usize::try_from(id.index).ok()?)?;
        slot.connection
            .as_ref()
            .filter(|_| slot.generation == id.generation)
    }

    fn get_mut(&mut self, id: Id) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(usize::try_from(id.index).ok()?)?;
        slot.connection
            .as_mut()
            .filter(|_| slot.generation == id.generation)
    }

    /// Whether another connection fits.
    pub fn has_room(&self) -> bool {
        self.slots.len() - self.free.len() < MAX_CONNECTIONS
    }

    /// Whether no connection is left.
    pub fn is_empty(&self) -> bool {
        self.slots.len() == self.free.len()
    }

    /// The port of the host's next connection, unless it is taken.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with the ports where another device left off.
    pub fn set_next_port(&mut self, port: u32) {
        self.next_port = port.clamp(FIRST_HOST_PORT, LAST_HOST_PORT);
    }

    /// The host asks for `guest_port`.
    ///
    /// # Errors
    /// The table is full.
    pub fn connect(&mut self, guest_port: u32, now: Millis) -> Result<Id, Full> {
        if !self.has_room() {
            self.counters.refused.inc();
            return Err(Full);
        }
        let mut key = Key {
            host_port: self.next_port,
            guest_port,
        };
        // Ends: the table holds fewer keys than there are ports.
        while self.table.contains_key(&key) {
            key.host_port = port_after(key.host_port);
        }
        self.next_port = port_after(key.host_port);
        self.counters.from_host.inc();
        Ok(self.insert(Connection::from_host(key, now)))
    }

    /// The host's listener took the guest's `request`.
    ///
    /// # Errors
    /// The table is full; the guest gets a reset.
    pub fn accept(&mut self, request: &Header) -> Result<Id, Full> {
        let key = key_of(request);
        if !self.has_room() || self.table.contains_key(&key) {
            self.counters.refused.inc();
            self.owe_reset(request.reset_for());
            return Err(Full);
        }
        self.counters.from_guest.inc();
        Ok(self.insert(Connection::from_guest(key, request)))
    }

    /// Nobody listens on the host for the guest's `request`.
    pub fn refuse(&mut self, request: &Header) {
        self.counters.no_listener.inc();
        self.owe_reset(request.reset_for());
    }

    /// Judges a packet of the guest whose payload is known to be there.
    pub fn guest_packet(&mut self, header: &Header, now: Millis) -> Verdict {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            self.counters.misaddressed.inc();
            return Verdict::Done;
        }
        let op = Op::from_u16(header.op);
        let known = if header.kind == TYPE_STREAM {
            self.table.get(&key_of(header)).copied()
        } else {
            None
        };
        let Some(id) = known else {
            return match op {
                Some(Op::Rst) => Verdict::Done,
                Some(Op::Request) if header.kind == TYPE_STREAM && self.has_room() => Verdict::Dial,
                _ => {
                    if op == Some(Op::Request) {
                        self.counters.refused.inc();
                    }
                    self.owe_reset(header.reset_for());
                    Verdict::Done
                }
            };
        };
        let Some(connection) = self.get_mut(id) else {
            return Verdict::Done;
        };
        connection.peer_report(header);
        if op == Some(Op::Rw) && connection.received(header.len).is_err() {
            // As hostile as an operation that does not exist.
            return self.apply(id, Event::Packet(None, 0), now);
        }
        let was_requested = matches!(connection.state(), State::Requested { .. });
        let delivers = connection.takes_from_guest();
        let verdict = self.apply(id, Event::Packet(op, header.flags), now);
        let Some(connection) = self.get_mut(id) else {
            return verdict;
        };
        match op {
            Some(Op::Response) if was_requested && connection.is_attached() => Verdict::Opened(id),
            Some(Op::Rw) if delivers && connection.takes_from_guest() => {
                self.counters.tx_bytes.add(u64::from(header.len));
                Verdict::Deliver(id)
            }
            Some(Op::Rw) => {
                // The host's end is gone: the bytes are taken and dropped.
                connection.forwarded(header.len);
                verdict
            }
            _ => verdict,
        }
    }

    /// The host's side of `id` changed, or time passed.
    pub fn apply(&mut self, id: Id, event: Event, now: Millis) -> Verdict {
        let Some(connection) = self.get_mut(id) else {
            return Verdict::Done;
        };
        let before = connection.backlog().len();
        let reply = connection.apply(event, now);
        let after = connection.backlog().len();
        let key = connection.key();
        let attached = connection.is_attached();
        self.backlog = self.backlog.saturating_sub(before - after);
        if reply == Reply::Reset {
            self.owe_reset(self.header(key, Op::Rst));
        }
        if !attached && self.table.get(&key) == Some(&id) {
            self.table.remove(&key);
        }
        self.note_deadline(id);
        self.schedule(id);
        Verdict::Changed(id)
    }

    /// Connections whose deadline has come; each has its verdict's work to be done.
    pub fn expire(&mut self, now: Millis) -> Vec<Id> {
        let mut due = self.ids();
        due.retain(|&id| {
            let deadline = self.get(id).and_then(Connection::deadline);
            deadline.is_some_and(|deadline| deadline <= now)
        });
        for &id in &due {
            self.counters.timed_out.inc();
            self.apply(id, Event::Tick, now);
        }
        let connections = self
            .slots
            .iter()
            .filter_map(|slot| slot.connection.as_ref());
        self.soonest = connections.filter_map(Connection::deadline).min();
        due
    }

    /// A time before which no deadline comes; `None` if there is none at all.
    pub fn soonest(&self) -> Option<Millis> {
        self.soonest
    }

    fn note_deadline(&mut self, id: Id) {
        if let Some(deadline) = self.get(id).and_then(Connection::deadline) {
            let soonest = self.soonest.map_or(deadline, |other| other.min(deadline));
            self.soonest = Some(soonest);
        }
    }

    /// `len` payload bytes reached the host's socket directly.
    pub fn forwarded(&mut self, id: Id, len: u32) {
        if let Some(connection) = self.get_mut(id) {
            connection.forwarded(len);
            self.schedule(id);
        }
    }

    /// Keeps payload for a host that does not read.
    ///
    /// # Errors
    /// [`MAX_BACKLOG`] is reached; nothing was kept.
    pub fn hold(&mut self, id: Id, bytes: &[u8]) -> Result<(), Full> {
        if bytes.len() > MAX_BACKLOG.saturating_sub(self.backlog) {
            return Err(Full);
        }
        if let Some(connection) = self.get_mut(id) {
            connection.hold(bytes);
            self.backlog += bytes.len();
        }
        Ok(())
    }

    /// `len` bytes of the backlog reached the host's socket.
    pub fn backlog_forwarded(&mut self, id: Id, len: usize) {
        if let Some(connection) = self.get_mut(id) {
            connection.backlog_forwarded(len);
            self.backlog = self.backlog.saturating_sub(len);
            self.schedule(id);
        }
    }

    /// The host's socket may, or cannot now, be read.
    pub fn set_readable(&mut self, id: Id, readable: bool) {
        if let Some(connection) = self.get_mut(id) {
            connection.set_readable(readable);
            self.schedule(id);
        }
    }

    /// Whether [`Muxer::next_packet`] may have something.
    pub fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.round.is_empty()
    }

    /// The next packet for the guest. Connections take turns.
    pub fn next_packet(&mut self) -> Option<Next> {
        if let Some(reset) = self.resets.pop_front() {
            self.counters.resets.inc();
            return Some(Next::Control(reset));
        }
        while let Some(id) = self.round.pop_front() {
            let Some(connection) = self.get_mut(id) else {
                continue;
            };
            connection.queued = false;
            let Some(outgoing) = connection.next_outgoing() else {
                continue;
            };
            return Some(match outgoing {
                Outgoing::Data { limit } => Next::Data { id, limit },
                Outgoing::Control { op, flags } => {
                    let key = connection.key();
                    let (buf_alloc, fwd_cnt) = connection.tell_credit();
                    self.schedule(id);
                    Next::Control(Header {
                        flags,
                        buf_alloc,
                        fwd_cnt,
                        ..self.header(key, op)
                    })
                }
            });
        }
        None
    }

    /// The header of a packet with `len` bytes of data for the guest, and accounts for it.
    pub fn data_header(&mut self, id: Id, len: u32) -> Option<Header> {
        let connection = self.get_mut(id)?;
        connection.sent(len);
        let key = connection.key();
        let (buf_alloc, fwd_cnt) = connection.tell_credit();
        self.counters.rx_bytes.add(u64::from(len));
        Some(Header {
            len,
            buf_alloc,
            fwd_cnt,
            ..self.header(key, Op::Rw)
        })
    }

    /// Puts `id` at the end of the round, if it has something for the guest.
    pub fn schedule(&mut self, id: Id) {
        if let Some(connection) = self.get_mut(id)
            && connection.has_work()
            && !connection.queued
        {
            connection.queued = true;
            self.round.push_back(id);
        }
    }

    /// Forgets a connection.
    pub fn remove(&mut self, id: Id) {
        let Some(connection) = self.get(id) else {
            return;
        };
        let key = connection.key();
        let backlog = connection.backlog().len();
        if self.table.get(&key) == Some(&id) {
            self.table.remove(&key);
        }
        self.backlog = self.backlog.saturating_sub(backlog);
        if let Ok(index) = usize::try_from(id.index)
            && let Some(slot) = self.slots.get_mut(index)
        {
            slot.connection = None;
            // 30 bits: see `token` in the device.
            slot.generation = slot.generation.wrapping_add(1) & ((1 << 30) - 1);
            self.free.push(id.index);
        }
    }

    fn insert(&mut self, connection: Connection) -> Id {
        let key = connection.key();
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let mut id = Id {
            index,
            generation: 0,
        };
        if let Ok(index) = usize::try_from(index)
            && let Some(slot) = self.slots.get_mut(index)
        {
            slot.connection = Some(connection);
            id.generation = slot.generation;
        }
        self.table.insert(key, id);
        self.note_deadline(id);
        self.schedule(id);
        id
    }

    fn ids(&self) -> Vec<Id> {
        let occupied = |(index, slot): (usize, &Slot)| {
            slot.connection.as_ref()?;
            let index = u32::try_from(index).ok()?;
            let generation = slot.generation;
            Some(Id { index, generation })
        };
        self.slots.iter().enumerate().filter_map(occupied).collect()
    }

    fn owe_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        } else {
            self.counters.resets_dropped.inc();
        }
    }

    fn header(&self, key: Key, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op: op.to_u16(),
            ..Header::default()
        }
    }
}

fn key_of(packet: &Header) -> Key {
    Key {
        host_port: packet.dst_port,
        guest_port: packet.src_port,
    }
}

fn port_after(port: u32) -> u32 {
    if (FIRST_HOST_PORT..LAST_HOST_PORT).contains(&port) {
        port + 1
    } else {
        FIRST_HOST_PORT
    }
}
