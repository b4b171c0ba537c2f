//! The host's sockets: listener, greetings, streams, and the epoll instance they stand in.
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::Dial;
use super::connection::{Event, Millis};
use super::greeting::{self, Greeting, MAX_LINE};
use super::muxer::{Id, Muxer};
use super::packet::Header;
use crate::backend::unix::{IoVecs, Listener, Stream};

/// Most connections that have not sent their `CONNECT` line; further ones are closed.
pub(super) const MAX_GREETINGS: usize = 64;
/// How long they may take for it.
pub(super) const GREETING_TIMEOUT: Millis = 5_000;
/// How long the listener rests when the process is out of descriptors.
const LISTENER_REST: Millis = 1_000;
/// Events taken by one call.
pub(super) const EVENTS: usize = 64;

/// What stands in the epoll instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Again,
    Timer,
    Listener,
    Greeting(u32),
    Stream(Id),
}

const KIND: u64 = 62;

impl Token {
    fn pack(self) -> EventData {
        EventData::new_u64(match self {
            Self::Again => 0,
            Self::Timer => 1,
            Self::Listener => 2,
            Self::Greeting(index) => 1 << KIND | u64::from(index),
            // The generation has 30 bits.
            Self::Stream(id) => 2 << KIND | u64::from(id.generation) << 32 | u64::from(id.index),
        })
    }

    pub(super) fn of(event: &epoll::Event) -> Self {
        Self::unpack(event.data.u64())
    }

    fn unpack(data: u64) -> Self {
        let index = (data & u64::from(u32::MAX)) as u32;
        match (data >> KIND, index) {
            (0, 0) => Self::Again,
            (0, 1) => Self::Timer,
            (0, _) => Self::Listener,
            (1, _) => Self::Greeting(index),
            _ => Self::Stream(Id {
                index,
                generation: (data >> 32) as u32 & ((1 << 30) - 1),
            }),
        }
    }
}

/// The host's end of a connection.
#[derive(Debug)]
struct Endpoint {
    generation: u32,
    stream: Stream,
    /// In the epoll instance, and with which interest in room to write.
    polled: Option<bool>,
    /// The peer announced the end of its stream; it closed altogether.
    ending: bool,
    gone: bool,
    told_end: bool,
    told_stop: bool,
    /// What came behind the `CONNECT` line.
    early: Vec<u8>,
    /// How many receive buffers the next read is worth.
    batch: usize,
}

/// An accepted socket whose `CONNECT` line is not complete.
#[derive(Debug)]
struct Greeter {
    stream: Stream,
    line: [u8; MAX_LINE],
    len: usize,
    deadline: Millis,
}

pub(super) struct Host {
    listener: Listener,
    dial: Dial,
    epoll: OwnedFd,
    timer: OwnedFd,
    /// Brings the device back after a call's share of work.
    again: OwnedFd,
    /// When the timer is due, as it was set.
    armed: Option<Millis>,
    /// The listener is out of the epoll instance until then.
    rest_until: Option<Millis>,
    listening: bool,
    greeters: Vec<Option<Greeter>>,
    /// By the index of the connection.
    endpoints: Vec<Option<Endpoint>>,
    clock: Box<dyn Fn() -> Millis + Send>,
}

impl Host {
    pub(super) fn new(listener: Listener, dial: Dial) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let again = rustix::event::eventfd(0, flags)?;
        let start = Instant::now();
        let host = Self {
            listener,
            dial,
            epoll,
            timer,
            again,
            armed: None,
            rest_until: None,
            listening: false,
            greeters: Vec::new(),
            endpoints: Vec::new(),
            clock: Box::new(move || {
                u64::try_from(start.elapsed().as_millis()).unwrap_or(Millis::MAX)
            }),
        };
        host.add(&host.timer, Token::Timer, EventFlags::IN)?;
        host.add(&host.again, Token::Again, EventFlags::IN)?;
        Ok(host)
    }

    #[cfg(test)]
    pub(super) fn set_clock(&mut self, clock: Box<dyn Fn() -> Millis + Send>) {
        self.clock = clock;
    }

    pub(super) fn now(&self) -> Millis {
        (self.clock)()
    }

    pub(super) fn epoll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn add(&self, fd: &impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, token.pack(), flags)?)
    }

    /// Starts to take connections: the driver is up.
    pub(super) fn listen(&mut self) -> io::Result<()> {
        if !self.listening {
            self.add(&self.listener, Token::Listener, EventFlags::IN)?;
            self.listening = true;
        }
        Ok(())
    }

    fn stop_listening(&mut self) {
        if self.listening {
            // Fails only if it is not there.
            let _ = epoll::delete(&self.epoll, &self.listener);
            self.listening = false;
        }
    }

    /// Closes every socket but the listener's, which rests until the next [`Host::listen`].
    pub(super) fn reset(&mut self, muxer: &mut Muxer) {
        self.stop_listening();
        self.rest_until = None;
        muxer.reset();
        self.greeters.clear();
        self.endpoints.clear();
        self.clear_again();
    }

    /// What is ready, as many as `events` has room for; the rest keeps the epoll instance
    /// readable.
    pub(super) fn wait<'e>(
        &self,
        events: &'e mut [MaybeUninit<epoll::Event>; EVENTS],
    ) -> &'e [epoll::Event] {
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match epoll::wait(&self.epoll, events.as_mut_slice(), Some(&at_once)) {
            Ok((ready, _)) => ready,
            // EINTR: they are as ready next time.
            Err(_) => &[],
        }
    }

    /// Asks for another call, after other devices had their turn.
    pub(super) fn ask_again(&self) {
        // Fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.again, &1u64.to_ne_bytes());
    }

    pub(super) fn clear_again(&self) {
        let _ = rustix::io::read(&self.again, &mut [0; 8]);
    }

    // --- time ---

    /// Sets the timer to the earliest deadline, unless it is due before that anyway.
    pub(super) fn arm_timer(&mut self, muxer: &Muxer) {
        if self.armed.is_some() {
            return;
        }
        let greeting = self
            .greeters
            .iter()
            .flatten()
            .map(|greeter| greeter.deadline);
        let deadline = greeting
            .chain(muxer.deadline())
            .chain(self.rest_until)
            .min();
        let Some(deadline) = deadline else { return };
        let left = Duration::from_millis(deadline.saturating_sub(self.now()).max(1));
        let value = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: value,
        };
        // Fails only for values out of range.
        if rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok() {
            self.armed = Some(deadline);
        }
    }

    /// The timer is due: ends what took too long.
    pub(super) fn expire(&mut self, muxer: &mut Muxer) {
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        self.armed = None;
        let now = self.now();
        for greeter in &mut self.greeters {
            if greeter.as_ref().is_some_and(|g| g.deadline <= now) {
                *greeter = None;
                muxer.counters.timed_out += 1;
            }
        }
        for id in muxer.expire(now) {
            self.settle(id, muxer);
        }
        if self.rest_until.is_some_and(|until| until <= now) {
            self.rest_until = None;
            if self.listen().is_err() {
                self.rest_until = Some(now + LISTENER_REST);
            }
        }
    }

    // --- connections from the host ---

    /// Takes one waiting connection. Others keep the listener readable: between two the
    /// event loop serves other devices.
    pub(super) fn accept(&mut self, muxer: &mut Muxer) {
        match self.listener.accept() {
            Ok(stream) => self.greet(stream, muxer),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => {
                // Out of descriptors or memory: a readable listener would spin.
                self.stop_listening();
                self.rest_until = Some(self.now() + LISTENER_REST);
                // The timer may be set to something later.
                self.armed = None;
            }
        }
    }

    /// Reads the `CONNECT` line, which usually is there already.
    fn greet(&mut self, stream: Stream, muxer: &mut Muxer) {
        let mut greeter = Greeter {
            stream,
            line: [0; MAX_LINE],
            len: 0,
            deadline: 0,
        };
        match greeter.advance() {
            Some(Greeting::Connect { port, end }) => self.connect(greeter, port, end, muxer),
            Some(Greeting::Incomplete) => self.wait_for_greeting(greeter, muxer),
            Some(Greeting::Bad) | None => {}
        }
    }

    fn wait_for_greeting(&mut self, mut greeter: Greeter, muxer: &mut Muxer) {
        let free = self.greeters.iter().position(Option::is_none);
        let index = free.unwrap_or(self.greeters.len());
        if index >= MAX_GREETINGS {
            muxer.counters.refused += 1;
            return;
        }
        greeter.deadline = self.now() + GREETING_TIMEOUT;
        let token = Token::Greeting(u32::try_from(index).unwrap_or(u32::MAX));
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if self.add(&greeter.stream, token, flags).is_err() {
            return;
        }
        if index == self.greeters.len() {
            self.greeters.push(None);
        }
        if let Some(slot) = self.greeters.get_mut(index) {
            *slot = Some(greeter);
        }
    }

    /// A greeting goes on.
    pub(super) fn greeting_ready(&mut self, index: u32, muxer: &mut Muxer) {
        let slot = self.greeters.get_mut(index as usize);
        let Some(slot) = slot else { return };
        let Some(mut greeter) = slot.take() else {
            return;
        };
        match greeter.advance() {
            Some(Greeting::Incomplete) => *slot = Some(greeter),
            Some(Greeting::Connect { port, end }) => {
                // It comes back under its connection's token.
                let _ = epoll::delete(&self.epoll, &greeter.stream);
                self.connect(greeter, port, end, muxer);
            }
            Some(Greeting::Bad) | None => {}
        }
    }

    fn connect(&mut self, greeter: Greeter, port: u32, end: usize, muxer: &mut Muxer) {
        let Ok(id) = muxer.connect(port, self.now()) else {
            return;
        };
        let early = greeter.line.get(end..greeter.len).unwrap_or_default();
        let endpoint = Endpoint::new(id, greeter.stream, early.to_vec());
        self.place(id, endpoint);
    }

    /// The guest accepted: tells the host, and listens to it from now on.
    pub(super) fn opened(&mut self, id: Id, muxer: &mut Muxer) {
        let Some(connection) = muxer.get(id) else {
            return;
        };
        let mut line = [0; MAX_LINE];
        let mut rest = line.as_mut_slice();
        let _ = writeln!(rest, "OK {}", connection.key().host_port);
        let left = rest.len();
        let line = line.get(..MAX_LINE - left).unwrap_or_default();
        let Some(endpoint) = self.endpoint(id) else {
            return;
        };
        let early = !endpoint.early.is_empty();
        // A new socket has room for a line.
        let told = matches!(endpoint.stream.send(line), Ok(sent) if sent == line.len());
        if !told || self.poll(id, false).is_err() {
            muxer.apply(id, Event::HostGone, self.now());
        } else if early {
            muxer.set_readable(id, true);
        }
        self.settle(id, muxer);
    }

    // --- connections from the guest ---

    /// Connects the guest to the host's listener for the port it asks for.
    pub(super) fn dial(&mut self, request: &Header, muxer: &mut Muxer) {
        let path = self.dial.path(request.dst_port);
        let stream = path.and_then(|path| Stream::connect(&path).ok());
        let Some(stream) = stream else {
            muxer.refuse(request);
            return;
        };
        let Ok(id) = muxer.accept(request) else {
            return;
        };
        self.place(id, Endpoint::new(id, stream, Vec::new()));
        if self.poll(id, false).is_err() {
            muxer.apply(id, Event::HostGone, self.now());
            self.settle(id, muxer);
        }
    }

    // --- streams ---

    /// Something happened on the socket of `id`.
    pub(super) fn stream_ready(&mut self, id: Id, flags: EventFlags, muxer: &mut Muxer) {
        let Some(endpoint) = self.endpoint(id) else {
            return;
        };
        let closed = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        endpoint.gone |= closed;
        endpoint.ending |= closed || flags.contains(EventFlags::RDHUP);
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            self.flush(id, muxer);
        }
        let wanted = muxer
            .get(id)
            .is_some_and(super::connection::Connection::takes_from_host);
        if wanted {
            muxer.set_readable(id, true);
        } else if closed {
            // Nobody will read it to its end.
            muxer.apply(id, Event::HostGone, self.now());
        }
        self.settle(id, muxer);
    }

    /// Writes the backlog as far as it goes.
    fn flush(&mut self, id: Id, muxer: &mut Muxer) {
        while let Some(connection) = muxer.get(id) {
            let (front, _) = connection.backlog().as_slices();
            if front.is_empty() {
                return;
            }
            let Some(endpoint) = self.endpoint(id) else {
                return;
            };
            match endpoint.stream.send(front) {
                Ok(sent) => muxer.backlog_forwarded(id, sent),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    muxer.apply(id, Event::HostRefused, self.now());
                    return;
                }
            }
        }
    }

    /// Writes payload to the socket of `id`.
    pub(super) fn send(&mut self, id: Id, data: &IoVecs<'_>) -> io::Result<usize> {
        match self.endpoint(id) {
            Some(endpoint) => endpoint.stream.send_vectored(data),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Reads the socket of `id`.
    pub(super) fn recv(&mut self, id: Id, data: &IoVecs<'_>) -> io::Result<usize> {
        match self.endpoint(id) {
            Some(endpoint) => endpoint.stream.recv_vectored(data),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// What came behind the `CONNECT` line, once.
    pub(super) fn take_early(&mut self, id: Id) -> Vec<u8> {
        self.endpoint(id)
            .map(|endpoint| std::mem::take(&mut endpoint.early))
            .unwrap_or_default()
    }

    /// Keeps what did not fit the guest's buffer.
    pub(super) fn keep_early(&mut self, id: Id, rest: Vec<u8>) {
        if let Some(endpoint) = self.endpoint(id) {
            endpoint.early = rest;
        }
    }

    /// Whether the end of the stream was announced.
    pub(super) fn is_ending(&mut self, id: Id) -> bool {
        self.endpoint(id).is_some_and(|endpoint| endpoint.ending)
    }

    /// What reading the end of the stream means.
    pub(super) fn end_of_stream(&mut self, id: Id) -> Event {
        match self.endpoint(id) {
            Some(endpoint) if endpoint.gone => Event::HostGone,
            _ => Event::HostEnded,
        }
    }

    pub(super) fn batch(&mut self, id: Id) -> usize {
        self.endpoint(id).map_or(1, |endpoint| endpoint.batch)
    }

    pub(super) fn set_batch(&mut self, id: Id, batch: usize) {
        if let Some(endpoint) = self.endpoint(id) {
            endpoint.batch = batch;
        }
    }

    /// Brings the socket in line with the connection: ends passed on, interest in room to write
    /// only while something waits for it, closed when all is over.
    pub(super) fn settle(&mut self, id: Id, muxer: &mut Muxer) {
        let Some(connection) = muxer.get(id) else {
            return;
        };
        if connection.is_over() {
            self.take_endpoint(id);
            muxer.remove(id);
            return;
        }
        let end = connection.host_should_see_end();
        let stop = connection.host_should_stop();
        let waiting = !connection.backlog().is_empty();
        let Some(endpoint) = self.endpoint(id) else {
            return;
        };
        if end && !endpoint.told_end {
            endpoint.told_end = true;
            endpoint.stream.finish_sending();
        }
        if stop && !endpoint.told_stop {
            endpoint.told_stop = true;
            endpoint.stream.stop_receiving();
        }
        let polled = endpoint.polled;
        if polled.is_some_and(|writing| writing != waiting) && self.poll(id, waiting).is_err() {
            muxer.apply(id, Event::HostGone, self.now());
            // Over now, or soon: nothing is left to poll for.
            if muxer.get(id).is_some_and(|c| c.is_over()) {
                self.take_endpoint(id);
                muxer.remove(id);
            }
        }
    }

    /// Puts the socket of `id` into the epoll instance, or changes its interest in room to write.
    fn poll(&mut self, id: Id, writing: bool) -> io::Result<()> {
        let mut flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        flags.set(EventFlags::OUT, writing);
        let data = Token::Stream(id).pack();
        let slot = self.endpoints.get_mut(id.index as usize);
        let Some(endpoint) = slot.and_then(Option::as_mut) else {
            return Ok(());
        };
        if endpoint.polled.is_some() {
            epoll::modify(&self.epoll, &endpoint.stream, data, flags)?;
        } else {
            epoll::add(&self.epoll, &endpoint.stream, data, flags)?;
        }
        endpoint.polled = Some(writing);
        Ok(())
    }

    fn endpoint(&mut self, id: Id) -> Option<&mut Endpoint> {
        self.endpoints
            .get_mut(id.index as usize)?
            .as_mut()
            .filter(|endpoint| endpoint.generation == id.generation)
    }

    fn take_endpoint(&mut self, id: Id) {
        if self.endpoint(id).is_some()
            && let Some(slot) = self.endpoints.get_mut(id.index as usize)
        {
            // Closing takes it out of the epoll instance.
            *slot = None;
        }
    }

    fn place(&mut self, id: Id, endpoint: Endpoint) {
        let index = id.index as usize;
        if index >= self.endpoints.len() {
            self.endpoints.resize_with(index + 1, || None);
        }
        if let Some(slot) = self.endpoints.get_mut(index) {
            *slot = Some(endpoint);
        }
    }
}

impl Endpoint {
    fn new(id: Id, stream: Stream, early: Vec<u8>) -> Self {
        Self {
            generation: id.generation,
            stream,
            polled: None,
            ending: false,
            gone: false,
            told_end: false,
            told_stop: false,
            early,
            batch: 1,
        }
    }
}

impl Greeter {
    /// Reads on; `None`: the peer is gone.
    fn advance(&mut self) -> Option<Greeting> {
        loop {
            let room = self.line.get_mut(self.len..)?;
            match self.stream.recv(room) {
                Ok(0) => return None,
                Ok(got) => self.len += got,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Some(Greeting::Incomplete);
                }
                Err(_) => return None,
            }
            match greeting::parse(self.line.get(..self.len)?) {
                Greeting::Incomplete => {}
                done => return Some(done),
            }
        }
    }
}
