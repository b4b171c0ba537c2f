//! One connection: a state machine without I/O. [`step`] holds every transition.
//!
//! ```text
//!  host asks            guest asks
//!      │                    │
//!  Requested ──response──► Open ──both directions over──► Closing
//!      │ reset, time-out    │ reset, full shutdown          │ reset, time-out
//!      ▼                    ▼                               ▼
//!     Dead ◄──delivered── Detached ◄────────────────────────┘
//! ```
//!
//! *Detached*: the guest has forgotten the connection, its last bytes still go to the host.
use std::collections::VecDeque;

use super::credit::{BUF_ALLOC, Credit, Overrun};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND};

/// Milliseconds of some monotonic clock.
pub type Millis = u64;

/// How long the guest may take to answer a connection request.
pub const REQUEST_TIMEOUT: Millis = 5_000;
/// How long the guest may take to confirm that a connection is over (as Linux waits).
pub const CLOSE_TIMEOUT: Millis = 8_000;

/// Names a connection. Our CID and the guest's are the same in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// Who will not send, or not take, any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    pub guest_sending: bool,
    pub guest_taking: bool,
    pub host_sending: bool,
    pub host_taking: bool,
}

impl Ended {
    fn to_guest(self) -> bool {
        self.host_sending || self.guest_taking
    }

    fn to_host(self) -> bool {
        self.guest_sending || self.host_taking
    }

    /// No byte can move any more.
    fn all(self) -> bool {
        self.to_guest() && self.to_host()
    }

    /// What a shutdown packet tells the guest.
    fn flags(self) -> u32 {
        if self.all() {
            return SHUTDOWN_BOTH;
        }
        let mut flags = 0;
        if self.host_taking {
            flags |= SHUTDOWN_RCV;
        }
        if self.host_sending {
            flags |= SHUTDOWN_SEND;
        }
        flags
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest was, or will be, asked and has not answered.
    Requested { deadline: Millis },
    /// Bytes move in the directions that have not ended.
    Open(Ended),
    /// The guest was, or will be, told that both directions ended, and has not confirmed.
    Closing { deadline: Millis },
    /// The guest knows nothing of it any more; what it sent still goes to the host.
    Detached,
    /// Nothing is left to do.
    Dead,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A packet of the guest: the operation, `None` if there is no such, and its flags.
    Packet(Option<Op>, u32),
    /// The host will send no more.
    HostEnded,
    /// The host will take no more.
    HostRefused,
    /// The host's end is closed.
    HostGone,
    /// Time passed.
    Tick,
}

/// What the guest is owed for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Nothing,
    Shutdown,
    Credit,
    Reset,
}

/// The transition function.
#[expect(clippy::match_same_arms, reason = "one arm for each transition")]
pub fn step(state: State, event: Event, now: Millis) -> (State, Reply) {
    use State::{Closing, Dead, Detached, Open, Requested};
    match (state, event) {
        (Requested { .. }, Event::Packet(Some(Op::Response), _)) => {
            (Open(Ended::default()), Reply::Nothing)
        }
        (Requested { .. }, Event::Packet(Some(Op::Rst), _)) => (Dead, Reply::Nothing),
        (Requested { deadline }, Event::Tick) if now < deadline => (state, Reply::Nothing),
        (Requested { .. }, _) => (Dead, Reply::Reset),

        (Open(ended), Event::Packet(op, flags)) => match op {
            Some(Op::Rw) if ended.guest_sending => (Dead, Reply::Reset),
            Some(Op::Rw | Op::CreditUpdate) => (state, Reply::Nothing),
            Some(Op::CreditRequest) => (state, Reply::Credit),
            Some(Op::Shutdown) => guest_shutdown(ended, flags, now),
            Some(Op::Rst) => (Detached, Reply::Nothing),
            Some(Op::Request | Op::Response) | None => (Dead, Reply::Reset),
        },
        (Open(mut ended), Event::HostEnded | Event::HostRefused | Event::HostGone) => {
            ended.host_sending |= event != Event::HostRefused;
            ended.host_taking |= event != Event::HostEnded;
            (open_or_closing(ended, now), Reply::Shutdown)
        }
        (Open(_), Event::Tick) => (state, Reply::Nothing),

        (Closing { .. }, Event::Packet(op, flags)) => match op {
            Some(Op::Rst) => (Detached, Reply::Nothing),
            Some(Op::Shutdown) if flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH => {
                (Detached, Reply::Reset)
            }
            // On their way when both directions ended.
            Some(Op::Rw | Op::CreditUpdate | Op::CreditRequest | Op::Shutdown) => {
                (state, Reply::Nothing)
            }
            Some(Op::Request | Op::Response) | None => (Dead, Reply::Reset),
        },
        (Closing { deadline }, Event::Tick) if now >= deadline => (Detached, Reply::Reset),
        (Closing { .. }, _) => (state, Reply::Nothing),

        (Detached, Event::HostRefused | Event::HostGone) => (Dead, Reply::Nothing),
        (Detached | Dead, _) => (state, Reply::Nothing),
    }
}

fn guest_shutdown(mut ended: Ended, flags: u32, now: Millis) -> (State, Reply) {
    ended.guest_taking |= flags & SHUTDOWN_RCV != 0;
    ended.guest_sending |= flags & SHUTDOWN_SEND != 0;
    if ended.guest_taking && ended.guest_sending {
        // The guest waits for nothing but this.
        return (State::Detached, Reply::Reset);
    }
    let reply = if ended.all() {
        Reply::Shutdown
    } else {
        Reply::Nothing
    };
    (open_or_closing(ended, now), reply)
}

fn open_or_closing(ended: Ended, now: Millis) -> State {
    if ended.all() {
        State::Closing {
            deadline: now.saturating_add(CLOSE_TIMEOUT),
        }
    } else {
        State::Open(ended)
    }
}

/// Control packets the guest is owed. Each kind is owed once or not at all, so nothing queues up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

impl Owed {
    const NONE: Self = Self {
        request: false,
        response: false,
        credit_update: false,
        credit_request: false,
        shutdown: false,
    };
}

/// A connection: its state, credit, and the guest's bytes that the host has not taken.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    state: State,
    credit: Credit,
    owed: Owed,
    backlog: VecDeque<u8>,
    /// The guest sent its last byte (kept when the state no longer tells).
    guest_finished: bool,
    /// The host's socket may have bytes, or its end, to read.
    readable: bool,
    /// The guest was asked for credit since it last had any.
    asked_credit: bool,
    /// In the muxer's round.
    pub(super) queued: bool,
}

/// What to send to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    Control {
        op: Op,
        flags: u32,
    },
    /// Up to this many bytes from the host's socket.
    Data {
        limit: u32,
    },
}

impl Connection {
    /// The host asks the guest.
    pub fn from_host(key: Key, now: Millis) -> Self {
        let state = State::Requested {
            deadline: now.saturating_add(REQUEST_TIMEOUT),
        };
        let owed = Owed {
            request: true,
            ..Owed::NONE
        };
        Self::new(key, state, owed)
    }

    /// The guest asked with `request`, and the host's socket is there.
    pub fn from_guest(key: Key, request: &Header) -> Self {
        let owed = Owed {
            response: true,
            ..Owed::NONE
        };
        let mut connection = Self::new(key, State::Open(Ended::default()), owed);
        connection
            .credit
            .peer_report(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(key: Key, state: State, owed: Owed) -> Self {
        Self {
            key,
            state,
            credit: Credit::default(),
            owed,
            backlog: VecDeque::new(),
            guest_finished: false,
            readable: false,
            asked_credit: false,
            queued: false,
        }
    }

    pub fn key(&self) -> Key {
        self.key
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// Whether the guest may still name it in a packet.
    pub fn is_attached(&self) -> bool {
        !matches!(self.state, State::Detached | State::Dead)
    }

    /// Whether it can be dropped.
    pub fn is_over(&self) -> bool {
        match self.state {
            State::Dead => true,
            State::Detached => self.backlog.is_empty(),
            _ => false,
        }
    }

    /// Whether bytes of the host can ever reach the guest again.
    pub fn takes_from_host(&self) -> bool {
        match self.state {
            State::Requested { .. } => true,
            State::Open(ended) => !ended.to_guest(),
            _ => false,
        }
    }

    /// Whether bytes of the guest can ever reach the host again, apart from the backlog.
    pub fn takes_from_guest(&self) -> bool {
        matches!(self.state, State::Open(ended) if !ended.to_host())
    }

    /// Everything the guest sent was passed on and no more will come: the host's socket gets
    /// its end of stream.
    pub fn host_should_see_end(&self) -> bool {
        self.guest_finished && self.backlog.is_empty()
    }

    /// The guest takes no more: the host's writes should fail.
    pub fn host_should_stop(&self) -> bool {
        match self.state {
            State::Open(ended) => ended.guest_taking,
            State::Detached => true,
            _ => false,
        }
    }

    /// When [`Event::Tick`] will matter.
    pub fn deadline(&self) -> Option<Millis> {
        match self.state {
            State::Requested { deadline } | State::Closing { deadline } => Some(deadline),
            _ => None,
        }
    }

    /// Applies an event. The reply is owed by the connection itself, but for a reset, which
    /// must be sent even if the connection goes.
    pub fn apply(&mut self, event: Event, now: Millis) -> Reply {
        let (next, reply) = step(self.state, event, now);
        if matches!(self.state, State::Open(_)) {
            let said_so = matches!(event, Event::Packet(Some(Op::Shutdown), flags)
                if flags & SHUTDOWN_SEND != 0);
            self.guest_finished |= said_so || next == State::Detached;
        }
        self.state = next;
        match reply {
            Reply::Nothing | Reply::Reset => {}
            Reply::Shutdown => self.owed.shutdown = true,
            Reply::Credit => self.owed.credit_update = true,
        }
        if next == State::Dead || matches!(event, Event::HostRefused | Event::HostGone) {
            self.discard_backlog();
        }
        if !self.is_attached() {
            self.owed = Owed::NONE;
        }
        reply
    }

    /// Takes the credit fields every packet carries.
    pub fn peer_report(&mut self, header: &Header) {
        self.credit.peer_report(header.buf_alloc, header.fwd_cnt);
        if self.credit.peer_free() > 0 {
            self.asked_credit = false;
        }
    }

    /// Accounts for `len` bytes of payload from the guest.
    pub fn received(&mut self, len: u32) -> Result<(), Overrun> {
        self.credit.received(len)
    }

    /// `len` received bytes are with the host, or dropped on its behalf.
    pub fn forwarded(&mut self, len: u32) {
        self.credit.forwarded(len);
        if self.credit.should_tell() && self.takes_from_guest() {
            self.owed.credit_update = true;
        }
    }

    /// Bytes the host's socket did not take yet, at most [`BUF_ALLOC`].
    pub fn backlog(&self) -> &VecDeque<u8> {
        &self.backlog
    }

    /// Keeps received bytes for the host.
    pub fn hold(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
    }

    /// `len` bytes of the backlog went to the host.
    pub fn backlog_forwarded(&mut self, len: usize) {
        let len = len.min(self.backlog.len());
        self.backlog.drain(..len);
        if self.backlog.is_empty() {
            // A stall is rare: its memory is not kept.
            self.backlog = VecDeque::new();
        }
        self.forwarded(u32::try_from(len).unwrap_or(BUF_ALLOC));
    }

    fn discard_backlog(&mut self) {
        let len = self.backlog.len();
        self.backlog_forwarded(len);
    }

    pub fn set_readable(&mut self, readable: bool) {
        self.readable = readable;
    }

    /// Settles what to ask of the guest, and says whether something is to be sent.
    pub fn has_work(&mut self) -> bool {
        if self.readable
            && self.takes_from_host()
            && matches!(self.state, State::Open(_))
            && self.credit.peer_free() == 0
            && !self.asked_credit
        {
            self.asked_credit = true;
            self.owed.credit_request = true;
        }
        self.owed != Owed::NONE || self.data_limit().is_some()
    }

    fn data_limit(&self) -> Option<u32> {
        let open = matches!(self.state, State::Open(ended) if !ended.to_guest());
        let free = self.credit.peer_free();
        (open && self.readable && free > 0).then_some(free)
    }

    /// The next packet for the guest: control before data, a shutdown last.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        let control = |op| Some(Outgoing::Control { op, flags: 0 });
        let owed = &mut self.owed;
        if std::mem::take(&mut owed.request) {
            return control(Op::Request);
        }
        if std::mem::take(&mut owed.response) {
            return control(Op::Response);
        }
        if std::mem::take(&mut owed.credit_request) {
            return control(Op::CreditRequest);
        }
        if let Some(limit) = self.data_limit() {
            return Some(Outgoing::Data { limit });
        }
        if std::mem::take(&mut self.owed.credit_update) {
            return control(Op::CreditUpdate);
        }
        if std::mem::take(&mut self.owed.shutdown) {
            let flags = match self.state {
                State::Open(ended) => ended.flags(),
                _ => SHUTDOWN_BOTH,
            };
            let op = Op::Shutdown;
            return Some(Outgoing::Control { op, flags });
        }
        None
    }

    /// `len` bytes went to the guest; their packets told our credit.
    pub fn sent(&mut self, len: u32) {
        self.credit.sent(len);
    }

    /// Our credit fields for a packet: `(buf_alloc, fwd_cnt)`.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.owed.credit_update = false;
        (BUF_ALLOC, self.credit.tell())
    }
}
