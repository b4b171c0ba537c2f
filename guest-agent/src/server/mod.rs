//! The service: one thread, one epoll set, every descriptor non-blocking and edge-triggered.
//!
//! A connection carries one call. It is a [`Session`] until the last byte is sent; a program that
//! outlives its connection is killed and remembered until it is reaped. One place waits for
//! children, [`Server::reap`], so nobody else can take an exit status away.

mod announce;
mod calls;
mod running;
mod socket;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::frame::Decoder;
use belljar_protocol::{GENERATION, HOST_CID, v1};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fs::{Mode, OFlags, Timespec};
use rustix::io::Errno;
use rustix::process::WaitOptions;

use self::announce::Announcement;
use self::running::{Running, Turn};
use self::socket::{Gone, Socket};
use crate::exec::cgroup::{Cgroups, Leaf};
use crate::exec::lifecycle::{Action, Status};
use crate::sys::{self, spawn::Spawner};

/// Open connections. The oldest one that has sent no request makes room for a new one.
const MAX_SESSIONS: usize = 128;

/// Programs at a time; the rest of the connections stays for calls that must always get through.
const MAX_PROGRAMS: usize = 96;

/// How long a connection may take to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// How long the host may take to hang up after the end, so that no last byte is cut off.
const LINGER_TIME: Duration = Duration::from_secs(2);

/// After SIGKILL to everything, processes that do not go (stuck in the kernel) hold nothing up.
const KILLED_TIME: Duration = Duration::from_millis(500);

/// Turns of one session before others get theirs.
const TURNS: usize = 16;

/// Connections taken in one go.
const ACCEPTS: usize = 16;

/// Size of the one read buffer: what a pipe holds.
const SCRATCH: usize = 64 << 10;

/// Tokens of the epoll set: a session's number times `KINDS` plus the kind of descriptor.
const KINDS: u64 = 4;
const KIND_SOCKET: u64 = 0;
const KIND_STDIN: u64 = 1;
const KIND_STDOUT: u64 = 2;
const KIND_STDERR: u64 = 3;
/// Session 0 does not exist: its tokens are the server's own descriptors.
const TOKEN_LISTENER: u64 = 0;
const TOKEN_SIGNALS: u64 = 1;
const TOKEN_ANNOUNCE: u64 = 2;

/// How the service ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    PowerOff,
    Reboot,
}

/// What the agent says about itself in each reply.
#[derive(Debug, Clone, Default)]
pub(crate) struct About {
    pub(crate) abilities: Vec<i32>,
    pub(crate) degraded: String,
}

#[derive(Debug)]
enum Phase {
    /// Waits for the request.
    Request,
    /// A program runs or its output is on its way.
    Exec(Box<Running>),
    /// All is queued. `linger`: then wait for the host to hang up first.
    Closing { linger: bool, told: bool },
}

struct Session {
    socket: Socket,
    decoder: Decoder,
    phase: Phase,
    /// When it is closed whatever happens; not while a program runs.
    expires: Option<Instant>,
}

/// What becomes of a session after it was given a turn.
enum Next {
    Keep,
    Again,
    Close,
}

struct Stopping {
    ended: Ended,
    at: Instant,
    killed: bool,
}

/// The service with all its state.
pub(crate) struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    signals: OwnedFd,
    null: OwnedFd,
    spawner: Spawner,
    cgroups: Option<Cgroups>,
    /// Cgroups have changed: tidy them up when there is nothing else to do.
    untidy: bool,
    about: About,
    sessions: BTreeMap<u64, Session>,
    last_session: u64,
    /// Which session a program belongs to.
    programs: BTreeMap<i32, u64>,
    /// Killed with their connection, not yet reaped.
    orphans: BTreeMap<i32, Option<Leaf>>,
    /// Sessions that have used up their turns.
    again: Vec<u64>,
    scratch: Vec<u8>,
    announcement: Option<Announcement>,
    stopping: Option<Stopping>,
    has_children: bool,
}

impl Server {
    /// A service on a listening, non-blocking socket.
    pub(crate) fn new(
        listener: OwnedFd,
        cgroups: Option<Cgroups>,
        mut about: About,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let signals = sys::child_signals()?;
        about
            .abilities
            .extend([v1::Ability::Exec as i32, v1::Ability::Shutdown as i32]);
        if cgroups.is_some() {
            about.abilities.push(v1::Ability::Cgroups as i32);
        }
        let add =
            |fd: &OwnedFd, token| epoll::add(&epoll, fd, EventData::new_u64(token), EventFlags::IN);
        add(&listener, TOKEN_LISTENER)?;
        add(&signals, TOKEN_SIGNALS)?;
        Ok(Self {
            epoll,
            listener,
            signals,
            null: open_null()?,
            spawner: Spawner::new(),
            cgroups,
            untidy: true,
            about,
            sessions: BTreeMap::new(),
            last_session: 0,
            programs: BTreeMap::new(),
            orphans: BTreeMap::new(),
            again: Vec::new(),
            scratch: vec![0; SCRATCH],
            announcement: None,
            stopping: None,
            has_children: true,
        })
    }

    /// What replies say.
    pub(crate) const fn about(&self) -> &About {
        &self.about
    }

    /// Tells the host once that the guest is ready. Nothing waits for it.
    pub(crate) fn announce(&mut self, ready: &v1::Ready) {
        match Announcement::begin(ready) {
            Ok(announcement) => {
                let data = EventData::new_u64(TOKEN_ANNOUNCE);
                let flags = EventFlags::OUT | EventFlags::ET;
                if epoll::add(&self.epoll, &announcement, data, flags).is_ok() {
                    self.announcement = Some(announcement);
                }
            }
            // A host that waits for no announcement, or an early transport: it can still call.
            Err(error) => crate::log!("cannot announce readiness to the host: {error}"),
        }
    }

    /// Serves until the guest is to end; returns when its processes have.
    pub(crate) fn run(&mut self) -> Ended {
        let mut events = Vec::with_capacity(32);
        loop {
            if let Some(ended) = self.check_stopped() {
                return ended;
            }
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(0) if self.untidy => self.tidy(),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    crate::log!("epoll_wait failed: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            for event in &events {
                self.dispatch(*event);
            }
            self.tick();
            for id in std::mem::take(&mut self.again) {
                self.drive(id);
            }
        }
    }

    fn dispatch(&mut self, event: Event) {
        let flags = event.flags;
        match event.data.u64() {
            TOKEN_LISTENER => self.accept(),
            TOKEN_SIGNALS => self.reap(),
            TOKEN_ANNOUNCE => {
                let done = self.announcement.as_mut().is_none_or(Announcement::advance);
                if done {
                    self.announcement = None;
                }
            }
            token => {
                let id = token / KINDS;
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.mark(token % KINDS, flags);
                    self.drive(id);
                }
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let (fd, peer) = match sys::accept(self.listener.as_fd()) {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Out of descriptors or memory: the connection waits in the queue. Do not spin.
                    crate::log!("cannot accept a connection: {error}");
                    std::thread::sleep(Duration::from_millis(20));
                    return;
                }
            };
            if let Some(cid) = peer.filter(|cid| *cid != HOST_CID) {
                crate::log!("refused a connection from CID {cid}: not the host");
                continue;
            }
            if self.sessions.len() >= MAX_SESSIONS && !self.drop_idle_session() {
                let mut socket = Socket::new(fd);
                socket.queue(&self.refusal(v1::error::Code::Busy, "too many connections"));
                let _ = socket.flush();
                continue;
            }
            self.add_session(fd);
        }
    }

    fn add_session(&mut self, fd: OwnedFd) {
        self.last_session = self.last_session.wrapping_add(1);
        let id = self.last_session;
        let mut socket = Socket::new(fd);
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if let Err(error) = self.watch(&socket, id, KIND_SOCKET, flags) {
            crate::log!("cannot watch a connection: {error}");
            return;
        }
        // The request is often here already; adding would report it, one wait later.
        socket.readable = true;
        let session = Session {
            socket,
            decoder: Decoder::new(),
            phase: Phase::Request,
            expires: Instant::now().checked_add(REQUEST_TIME),
        };
        self.sessions.insert(id, session);
        self.drive(id);
    }

    fn watch(
        &self,
        fd: &impl AsFd,
        id: u64,
        kind: u64,
        flags: EventFlags,
    ) -> rustix::io::Result<()> {
        let token = id.wrapping_mul(KINDS).wrapping_add(kind);
        epoll::add(&self.epoll, fd, EventData::new_u64(token), flags)
    }

    /// Makes room: closes the oldest session that has not sent a request yet.
    fn drop_idle_session(&mut self) -> bool {
        let idle = self
            .sessions
            .iter()
            .find(|(_, session)| matches!(session.phase, Phase::Request))
            .map(|(id, _)| *id);
        idle.and_then(|id| self.sessions.remove(&id)).is_some()
    }

    /// Gives a session its turns.
    fn drive(&mut self, id: u64) {
        let Some(mut session) = self.sessions.remove(&id) else {
            return;
        };
        match self.advance(id, &mut session) {
            Ok(Next::Keep) => {
                self.sessions.insert(id, session);
            }
            Ok(Next::Again) => {
                self.sessions.insert(id, session);
                self.again.push(id);
            }
            Ok(Next::Close) | Err(Gone) => self.close(session),
        }
    }

    fn advance(&mut self, id: u64, session: &mut Session) -> Result<Next, Gone> {
        for _ in 0..TURNS {
            match &mut session.phase {
                Phase::Request => {
                    if !self.take_request(id, session)? {
                        return Ok(Next::Keep);
                    }
                }
                Phase::Exec(running) => {
                    let Session {
                        socket, decoder, ..
                    } = session;
                    let turn = running.turn(socket, decoder, &mut self.scratch)?;
                    if turn == Turn::Done {
                        self.finish_program(session);
                    } else if session.socket.hung_up {
                        return Err(Gone);
                    } else if turn == Turn::Idle {
                        return Ok(Next::Keep);
                    }
                }
                Phase::Closing { linger, told } => {
                    session.socket.flush()?;
                    if !session.socket.is_drained() {
                        return Ok(Next::Keep);
                    }
                    if !*linger || session.socket.hung_up {
                        return Ok(Next::Close);
                    }
                    if !*told {
                        *told = true;
                        session.socket.finish();
                    }
                    // What the host still sends was meant for a program that has ended.
                    if session.socket.receive(&mut self.scratch)? == 0 {
                        return Ok(Next::Keep);
                    }
                }
            }
        }
        Ok(Next::Again)
    }

    /// The end of a program is queued: its session only has to send it.
    fn finish_program(&mut self, session: &mut Session) {
        let closing = Phase::Closing {
            linger: true,
            told: false,
        };
        session.expires = Instant::now().checked_add(LINGER_TIME);
        if let Phase::Exec(mut running) = std::mem::replace(&mut session.phase, closing) {
            self.give_back(running.leaf.take());
        }
    }

    fn give_back(&mut self, leaf: Option<Leaf>) {
        if let (Some(cgroups), Some(leaf)) = (&mut self.cgroups, leaf) {
            cgroups.give_back(leaf);
            self.untidy = true;
        }
    }

    /// Forgets a session. A program that still runs for it is killed with all that it started.
    fn close(&mut self, session: Session) {
        let Phase::Exec(mut running) = session.phase else {
            return;
        };
        if running.life.end().is_some() {
            self.give_back(running.leaf.take());
            return;
        }
        crate::log!("connection lost, killing process {}", running.pid);
        running.act(Action::KillTree);
        self.programs.remove(&running.pid);
        self.orphans.insert(running.pid, running.leaf.take());
    }

    /// Waits for every child that has ended: programs of sessions, those that lost theirs, and
    /// whatever else was left to PID 1.
    fn reap(&mut self) {
        let mut buffer = [0_u8; 1024];
        while rustix::io::read(&self.signals, &mut buffer[..]).is_ok_and(|got| got == buffer.len())
        {
        }
        loop {
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid.as_raw_pid(), status),
                Ok(None) => return,
                Err(Errno::INTR) => continue,
                Err(_) => {
                    self.has_children = false;
                    return;
                }
            };
            if let Some(leaf) = self.orphans.remove(&pid) {
                self.give_back(leaf);
            } else if let Some(id) = self.programs.remove(&pid) {
                self.program_ended(id, to_status(status));
            }
        }
    }

    fn program_ended(&mut self, id: u64, status: Status) {
        if let Some(session) = self.sessions.get_mut(&id)
            && let Phase::Exec(running) = &mut session.phase
        {
            let is_killed = matches!(status, Status::Signalled { number: 9, .. });
            let leaf = running.leaf.as_ref().filter(|_| is_killed);
            let out_of_memory = leaf.is_some_and(Leaf::ran_out_of_memory);
            if let Some(action) = running.life.ended(status, out_of_memory) {
                running.act(action);
            }
            running.program_ended();
            self.drive(id);
        }
    }

    /// Does what is due by now.
    fn tick(&mut self) {
        let now = Instant::now();
        let mut expired = Vec::new();
        for (id, session) in &mut self.sessions {
            match &mut session.phase {
                Phase::Exec(running) => running.tick(now),
                _ if session.expires.is_some_and(|at| at <= now) => expired.push(*id),
                _ => {}
            }
        }
        for id in expired {
            self.sessions.remove(&id);
        }
        if self
            .announcement
            .as_ref()
            .is_some_and(|it| it.expires() <= now)
        {
            self.announcement = None;
        }
        if let Some(stopping) = self
            .stopping
            .as_mut()
            .filter(|it| it.at <= now && !it.killed)
        {
            stopping.killed = true;
            stopping.at = now.checked_add(KILLED_TIME).unwrap_or(now);
            self.kill_all(libc::SIGKILL);
        }
    }

    /// How long nothing is due. Zero while sessions wait for a turn or there is tidying to do.
    fn timeout(&self) -> Option<Timespec> {
        if !self.again.is_empty() || self.untidy {
            return Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            });
        }
        let sessions = self
            .sessions
            .values()
            .filter_map(|session| match &session.phase {
                Phase::Exec(running) => running.life.wakes_at(),
                _ => session.expires,
            });
        let next = sessions
            .chain(self.announcement.as_ref().map(Announcement::expires))
            .chain(self.stopping.as_ref().map(|stopping| stopping.at))
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        // Rounded up by a millisecond: the system's resolution here, and waking early would spin.
        let left = left.saturating_add(Duration::from_millis(1));
        Timespec::try_from(left).ok()
    }

    fn tidy(&mut self) {
        self.untidy = false;
        if let Some(cgroups) = &mut self.cgroups {
            cgroups.tidy();
        }
    }

    /// Begins to end the guest: SIGTERM now, SIGKILL after `grace`.
    fn stop(&mut self, ended: Ended, grace: Duration) {
        if self.stopping.is_some() {
            return;
        }
        crate::log!("{ended:?} asked for by the host");
        let now = Instant::now();
        self.stopping = Some(Stopping {
            ended,
            at: now.checked_add(grace).unwrap_or(now),
            killed: false,
        });
        self.kill_all(libc::SIGTERM);
        // No child may ever end if there is none.
        self.reap();
    }

    fn kill_all(&self, signal: i32) {
        sys::kill_everything(signal);
        for session in self.sessions.values() {
            if let Phase::Exec(running) = &session.phase
                && running.life.end().is_none()
            {
                running.act(match signal {
                    libc::SIGKILL => Action::KillTree,
                    _ => Action::Terminate,
                });
            }
        }
    }

    fn check_stopped(&self) -> Option<Ended> {
        let stopping = self.stopping.as_ref()?;
        let is_sent = self.sessions.values().all(|session| match session.phase {
            Phase::Closing { .. } => session.socket.is_drained(),
            Phase::Exec(_) => false,
            Phase::Request => true,
        });
        let is_over = stopping.killed && stopping.at <= Instant::now();
        ((!self.has_children && is_sent) || is_over).then_some(stopping.ended)
    }

    fn refusal(&self, code: v1::error::Code, message: &str) -> v1::Reply {
        self.reply(v1::reply::Result::Error(v1::Error {
            code: code.into(),
            message: message.to_owned(),
            errno: 0,
        }))
    }

    fn reply(&self, result: v1::reply::Result) -> v1::Reply {
        v1::Reply {
            generation: GENERATION,
            abilities: self.about.abilities.clone(),
            degraded: self.about.degraded.clone(),
            result: Some(result),
        }
    }
}

impl Session {
    /// Notes what the system reported about one of its descriptors.
    fn mark(&mut self, kind: u64, flags: EventFlags) {
        let ended = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let readable = ended || flags.contains(EventFlags::IN);
        let writable = ended || flags.contains(EventFlags::OUT);
        if kind == KIND_SOCKET {
            self.socket.readable |= readable;
            self.socket.writable |= writable;
            self.socket.hung_up |= ended || flags.contains(EventFlags::RDHUP);
            return;
        }
        let Phase::Exec(running) = &mut self.phase else {
            return;
        };
        match kind {
            KIND_STDIN => {
                if let Some(stdin) = &mut running.stdin {
                    stdin.writable |= writable;
                }
            }
            KIND_STDOUT | KIND_STDERR => {
                let output = match kind {
                    KIND_STDOUT => &mut running.stdout,
                    _ => &mut running.stderr,
                };
                if let Some(output) = output {
                    output.readable |= readable;
                }
            }
            _ => {}
        }
    }
}

fn to_status(status: rustix::process::WaitStatus) -> Status {
    match status.terminating_signal() {
        Some(number) => Status::Signalled {
            number: number.unsigned_abs(),
            core_dumped: status.as_raw() & 0x80 != 0,
        },
        None => Status::Exited(status.exit_status().unwrap_or(0) as u8),
    }
}

/// `/dev/null`, or in a guest that came up without it, a pipe that is at its end.
fn open_null() -> io::Result<OwnedFd> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let fd = null.or_else(|_| {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map(|(read, _)| read)
    })?;
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    // Programs get their descriptors 0 to 2 by copying, which must not overwrite this one.
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}
