//! The host's side: listener, greetings, timer, and the epoll instance everything stands in.
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
use super::streams::Endpoint;
use crate::backend::unix::{Listener, Stream};

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
    pub(super) fn pack(self) -> EventData {
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
    pub(super) epoll: OwnedFd,
    timer: OwnedFd,
    /// Brings the device back after a call's share of work.
    again: OwnedFd,
    /// The earliest deadline of the greetings and the listener's rest.
    wake_at: Option<Millis>,
    /// When the timer is due, as it was set.
    armed: Option<Millis>,
    /// The listener is out of the epoll instance until then.
    rest_until: Option<Millis>,
    listening: bool,
    greeters: Vec<Option<Greeter>>,
    /// By the index of the connection.
    pub(super) endpoints: Vec<Option<Endpoint>>,
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
            wake_at: None,
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
        self.wake_at = None;
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

    /// Sees to it that the timer is due by `deadline`.
    fn wake_by(&mut self, deadline: Millis) {
        self.wake_at = earlier(self.wake_at, Some(deadline));
    }

    /// Sets the timer, if something is due before it. A timer whose reason went away is left: a
    /// wake-up in vain costs less than a system call for each connection.
    pub(super) fn arm_timer(&mut self, muxer: &Muxer) {
        let Some(deadline) = earlier(self.wake_at, muxer.soonest()) else {
            return;
        };
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
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
        self.wake_at = None;
        for slot in &mut self.greeters {
            match slot {
                Some(greeter) if greeter.deadline <= now => {
                    *slot = None;
                    muxer.counters.timed_out.inc();
                }
                Some(greeter) => self.wake_at = earlier(self.wake_at, Some(greeter.deadline)),
                None => {}
            }
        }
        for id in muxer.expire(now) {
            self.settle(id, muxer);
        }
        if self.rest_until.is_some_and(|until| until <= now) {
            self.rest_until = None;
            if self.listen().is_err() {
                self.rest();
            }
        } else if let Some(until) = self.rest_until {
            self.wake_by(until);
        }
    }

    /// Takes the listener out of the epoll instance for a while.
    fn rest(&mut self) {
        self.stop_listening();
        let until = self.now() + LISTENER_REST;
        self.rest_until = Some(until);
        self.wake_by(until);
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
                self.rest();
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
            muxer.counters.refused.inc();
            return;
        }
        greeter.deadline = self.now() + GREETING_TIMEOUT;
        self.wake_by(greeter.deadline);
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

fn earlier(a: Option<Millis>, b: Option<Millis>) -> Option<Millis> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}
