//! What lies between the guest's port and the host: the scroll-back, its readers and the
//! input. Nothing in it waits, and nothing in it grows.
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use super::ConsoleConfig;
use crate::backend::output::{Progress, Scrollback, Sink, printable};

/// Least scroll-back: readers need a few chunks of the device's room to keep up.
const MIN_SCROLLBACK: usize = 8 << 10;
/// Clients of the socket at a time.
const MAX_CLIENTS: usize = 8;
/// Typed bytes that wait for the guest; clients wait beyond it.
pub(super) const INPUT: usize = 4096;

// What an epoll event is about; clients are FIRST_CLIENT plus their slot.
const LISTENER: u64 = 0;
const OUTPUT: u64 = 1;
const FIRST_CLIENT: u64 = 2;

const FULL: &[u8] = b"belljar: this console has its most clients already\r\n";

/// The machine's side of a console, for any thread. No call waits for the guest or a client.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Mutex<Hub>>);

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleStats {
    /// Bytes the guest wrote.
    pub output_bytes: u64,
    /// Bytes dropped from single writes that were too long.
    pub truncated_bytes: u64,
    /// Bytes that some reader (output or client) was too slow for.
    pub lost_bytes: u64,
    /// Bytes typed into the guest.
    pub input_bytes: u64,
    /// Clients connected now.
    pub clients: u64,
    /// Clients turned away.
    pub refused_clients: u64,
}

impl ConsoleHandle {
    pub(super) fn new(config: ConsoleConfig) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Hub::new(config)?))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Hub> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last `lines` lines the guest wrote, at most `max` bytes.
    pub fn tail(&self, lines: usize, max: usize) -> Vec<u8> {
        self.lock().scrollback.tail(lines, max)
    }

    /// The same for logs and error messages, without anything that controls a terminal. Each
    /// line begins with `| `, so that none looks like the VMM's own.
    pub fn tail_text(&self, lines: usize, max: usize) -> String {
        let tail = printable(&self.tail(lines, max));
        let lines: Vec<String> = tail.lines().map(|line| format!("| {line}")).collect();
        lines.join("\n")
    }

    /// Adds the VMM's own words to the output, as if the guest had written them.
    pub fn write(&self, data: &[u8]) {
        let mut hub = self.lock();
        hub.push(data);
        hub.pump();
    }

    pub fn stats(&self) -> ConsoleStats {
        let hub = self.lock();
        let clients = hub.clients.iter().flatten();
        let lost_now = clients
            .clone()
            .map(|client| client.sink.lost())
            .sum::<u64>();
        let output = hub.output.as_ref().map_or(0, |output| output.sink.lost());
        ConsoleStats {
            lost_bytes: hub.stats.lost_bytes + lost_now + output,
            clients: clients.count() as u64,
            ..hub.stats
        }
    }
}

pub(super) struct Hub {
    scrollback: Scrollback,
    /// Position up to which readers were given the output.
    pumped: u64,
    output: Option<Reader>,
    listener: Option<UnixListener>,
    /// Whether the listener is polled.
    listening: bool,
    clients: [Option<Reader>; MAX_CLIENTS],
    pub(super) input: VecDeque<u8>,
    pub(super) stats: ConsoleStats,
    epoll: OwnedFd,
}

/// The output, or a client.
struct Reader {
    sink: Sink,
    behind: bool,
    /// It types no more.
    eof: bool,
    /// What epoll knows of it; none if it is not registered.
    interest: Option<epoll::EventFlags>,
}

impl Hub {
    fn new(config: ConsoleConfig) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        if let Some(listener) = &config.listener {
            listener.set_nonblocking(true)?;
        }
        let output = config
            .output
            .map(|fd| Sink::new(fd, 0, config.file_limit))
            .transpose()?
            .map(|sink| Reader {
                sink,
                behind: false,
                eof: true,
                interest: None,
            });
        let mut hub = Self {
            scrollback: Scrollback::new(config.scrollback.max(MIN_SCROLLBACK)),
            pumped: 0,
            output,
            listener: config.listener,
            listening: false,
            clients: Default::default(),
            input: VecDeque::with_capacity(INPUT),
            stats: ConsoleStats::default(),
            epoll,
        };
        hub.listen()?;
        Ok(hub)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes output of the guest. [`Self::pump`] follows once per batch; a batch that would
    /// overwrite what nobody was given yet is cut.
    pub(super) fn push(&mut self, data: &[u8]) {
        for part in data.chunks(MIN_SCROLLBACK / 2) {
            let waiting = self.scrollback.end() - self.pumped + part.len() as u64;
            if waiting > self.scrollback.capacity() as u64 {
                self.pump();
            }
            self.scrollback.push(part);
        }
        self.stats.output_bytes += data.len() as u64;
    }

    /// Gives new output to every reader that keeps up; the others are called when writable.
    pub(super) fn pump(&mut self) {
        self.pumped = self.scrollback.end();
        // Descriptors may have become free since accepting failed.
        let _ = self.listen();
        if self.output.as_ref().is_some_and(Reader::keeps_up) {
            self.pump_output();
        }
        for slot in 0..MAX_CLIENTS {
            if self.client(slot).is_some_and(|client| client.keeps_up()) {
                self.pump_client(slot);
            }
        }
    }

    /// Serves every ready descriptor once. Afterwards none is readable for a reason that only
    /// the guest can remove.
    pub(super) fn serve(&mut self) {
        const NONE: epoll::Event = epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        };
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = [NONE; MAX_CLIENTS + 2];
        let Ok(count) = epoll::wait(&self.epoll, &mut events, Some(&now)) else {
            return;
        };
        for event in events.into_iter().take(count) {
            match event.data.u64() {
                LISTENER => self.accept(),
                OUTPUT => self.pump_output(),
                client => {
                    let slot = client.saturating_sub(FIRST_CLIENT);
                    if let Ok(slot) = usize::try_from(slot) {
                        self.serve_client(slot, event.flags);
                    }
                }
            }
        }
        self.update_clients();
    }

    /// Lets clients type on after the guest took input.
    pub(super) fn update_clients(&mut self) {
        for slot in 0..MAX_CLIENTS {
            self.update_client(slot);
        }
    }

    fn client(&mut self, slot: usize) -> Option<&mut Reader> {
        self.clients.get_mut(slot)?.as_mut()
    }

    fn room(&self) -> usize {
        INPUT.saturating_sub(self.input.len())
    }

    fn listen(&mut self) -> io::Result<()> {
        if let (Some(listener), false) = (&self.listener, self.listening) {
            let token = epoll::EventData::new_u64(LISTENER);
            epoll::add(&self.epoll, listener, token, epoll::EventFlags::IN)?;
            self.listening = true;
        }
        Ok(())
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(listener, flags) {
            Ok(socket) => self.add_client(socket),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => {
                // Out of descriptors or memory: the connection stays pending and would wake
                // us for ever. Tried again with the next output or when a client leaves.
                let _ = epoll::delete(&self.epoll, listener);
                self.listening = false;
            }
        }
    }

    fn add_client(&mut self, socket: OwnedFd) {
        let Some(slot) = self.clients.iter().position(Option::is_none) else {
            self.stats.refused_clients += 1;
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = rustix::net::send(&socket, FULL, flags);
            return;
        };
        let Ok(sink) = Sink::new(socket, self.scrollback.start(), u64::MAX) else {
            return;
        };
        if let Some(place) = self.clients.get_mut(slot) {
            *place = Some(Reader {
                sink,
                behind: false,
                eof: false,
                interest: None,
            });
        }
        self.pump_client(slot);
    }

    fn serve_client(&mut self, slot: usize, ready: epoll::EventFlags) {
        let gone = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        // A client that left is dropped once it has nothing more to say, or nobody listens.
        let full = self.room() == 0;
        if ready.intersects(epoll::EventFlags::IN | gone) && !full {
            self.read(slot);
        }
        let Some(client) = self.client(slot) else {
            return;
        };
        if ready.intersects(gone) && (client.eof || full) {
            self.drop_client(slot);
        } else if ready.contains(epoll::EventFlags::OUT) {
            self.pump_client(slot);
        }
    }

    fn read(&mut self, slot: usize) {
        let mut typed = [0; 1024];
        let room = self.room().min(typed.len());
        let Some(client) = self.clients.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        if client.eof {
            return;
        }
        let buffer = typed.get_mut(..room).unwrap_or_default();
        match rustix::net::recv(client.sink.fd(), buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => client.eof = true,
            Ok((len, _)) => {
                self.input.extend(typed.iter().take(len));
                self.stats.input_bytes += len as u64;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => client.eof = true,
        }
    }

    fn pump_client(&mut self, slot: usize) {
        let Some(client) = self.clients.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        match client.sink.pump(&self.scrollback) {
            Progress::Broken => self.drop_client(slot),
            progress => {
                client.behind = progress == Progress::Behind;
                self.update_client(slot);
            }
        }
    }

    fn pump_output(&mut self) {
        let Some(output) = &mut self.output else {
            return;
        };
        match output.sink.pump(&self.scrollback) {
            Progress::Broken => {
                let lost = output.sink.lost();
                output.leave(&self.epoll);
                self.output = None;
                self.stats.lost_bytes += lost;
            }
            progress => {
                output.behind = progress == Progress::Behind;
                output.register(&self.epoll, OUTPUT, 0);
            }
        }
    }

    fn update_client(&mut self, slot: usize) {
        let room = self.room();
        if let Some(client) = self.clients.get_mut(slot).and_then(Option::as_mut) {
            let token = FIRST_CLIENT.saturating_add(slot as u64);
            if !client.register(&self.epoll, token, room) {
                self.drop_client(slot);
            }
        }
    }

    fn drop_client(&mut self, slot: usize) {
        if let Some(mut client) = self.clients.get_mut(slot).and_then(Option::take) {
            client.leave(&self.epoll);
            self.stats.lost_bytes += client.sink.lost();
            let _ = self.listen();
        }
    }
}

impl Reader {
    fn keeps_up(&self) -> bool {
        // A reader that epoll does not take (a terminal of some kinds) is tried each time.
        !self.behind || self.interest.is_none()
    }

    /// Tells epoll what this reader waits for. A reader that waits for nothing is still
    /// registered if it is a client, to notice that it leaves. `false` if epoll refuses.
    fn register(&mut self, epoll: &OwnedFd, token: u64, room: usize) -> bool {
        let mut wanted = epoll::EventFlags::empty();
        if self.behind {
            wanted |= epoll::EventFlags::OUT;
        }
        if !self.eof && room > 0 {
            wanted |= epoll::EventFlags::IN;
        }
        let data = epoll::EventData::new_u64(token);
        let result = match self.interest {
            Some(now) if now == wanted => return true,
            Some(_) if token == OUTPUT && wanted.is_empty() => {
                self.leave(epoll);
                return true;
            }
            Some(_) => epoll::modify(epoll, self.sink.fd(), data, wanted),
            None if token == OUTPUT && wanted.is_empty() => return true,
            None => epoll::add(epoll, self.sink.fd(), data, wanted),
        };
        if result.is_ok() {
            self.interest = Some(wanted);
        }
        result.is_ok()
    }

    fn leave(&mut self, epoll: &OwnedFd) {
        if self.interest.take().is_some() {
            let _ = epoll::delete(epoll, self.sink.fd().as_fd());
        }
    }
}
