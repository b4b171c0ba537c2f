//! The API's thread: sockets, polling, descriptors. Decisions are in `connection` and `routes`.
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketFlags,
    accept_with, recvmsg, send,
};

use super::command::{Answers, CallId, Waker};
use super::connection::{Call, Connection};
use super::http::{self, MAX_FDS};
use super::listener::{BindError, Listener};
use super::{Action, Body, Command, CommandSender, Fault, InstanceState, Published, Request};
use crate::metrics::{Counter, Registry};

/// Connections at one time; the one that was idle longest makes room for the next.
const MAX_CONNECTIONS: usize = 16;
/// A command that the machine has not answered within this gets a fault.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// The same for a snapshot, which writes all of a guest's RAM: 512 GiB at 150 MiB/s.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(3600);
/// How long the listener is left alone when the process has no descriptor for another client,
/// and none of the present ones can go: it stays readable meanwhile.
const LISTENER_REST: Duration = Duration::from_millis(200);
/// Reads and calls of one client before the others have their turn.
const TURNS: u32 = 16;
/// The version of Firecracker's API that ours follows.
pub const FIRECRACKER_API_VERSION: &str = "1.14.0";

/// What the server may be told.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Longest body, bytes (`--http-api-max-payload-size`).
    pub max_body: usize,
    /// How long the machine may take for one command.
    pub answer_within: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_body: http::MAX_BODY,
            answer_within: ANSWER_WITHIN,
        }
    }
}

/// Ends the process even when the machine is stuck: called on the API's thread, after the
/// answer to `Stop` was sent and the socket file is gone. Need not return.
pub type StopHook = Box<dyn Fn() + Send>;

/// A bound socket: clients can connect, and are served from [`ApiServer::start`] on.
#[derive(Debug)]
pub struct ApiServer {
    listener: Listener,
}

/// The running server; dropping it is [`ApiHandle::shutdown`].
#[derive(Debug)]
pub struct ApiHandle {
    thread: Option<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
    waker: Arc<Waker>,
}

impl ApiServer {
    /// Makes the socket. Fails with a remedy if the path is in use or too long.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        Ok(Self {
            listener: Listener::at_path(path)?,
        })
    }

    /// Takes a socket that listens already; `name` is for the error.
    pub fn from_descriptor(name: &str, fd: OwnedFd) -> Result<Self, BindError> {
        Ok(Self {
            listener: Listener::from_descriptor(name, fd)?,
        })
    }

    /// Starts the thread `api`.
    pub fn start(
        self,
        commands: CommandSender,
        published: Arc<Published>,
        metrics: &Registry,
        stop: StopHook,
        options: ServerOptions,
    ) -> std::io::Result<ApiHandle> {
        let stopping = Arc::new(AtomicBool::new(false));
        let answers = Answers::new()?;
        let waker = Arc::clone(&answers.waker);
        let server = Server {
            listener: self.listener,
            clients: Vec::new(),
            answers,
            commands,
            published,
            stop,
            options,
            stopping: Arc::clone(&stopping),
            pending: Vec::new(),
            next_call: 0,
            rest_until: None,
            last_answer: Instant::now(),
            counters: Counters::new(metrics),
        };
        let thread = std::thread::Builder::new()
            .name("api".into())
            .stack_size(256 * 1024)
            .spawn(move || server.run())?;
        Ok(ApiHandle {
            thread: Some(thread),
            stopping,
            waker,
        })
    }
}

impl ApiHandle {
    /// Sends what is answered already, closes everything, removes the socket file, and ends
    /// the thread. Takes no longer than the writes that are possible at once.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for ApiHandle {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Debug)]
struct Counters {
    calls: Counter,
    faults: Counter,
    unanswered: Counter,
    dropped_connections: Counter,
}

impl Counters {
    fn new(metrics: &Registry) -> Self {
        let counter = |name| metrics.counter("api_server", name);
        Self {
            calls: counter("calls"),
            faults: counter("faults"),
            unanswered: counter("unanswered"),
            dropped_connections: counter("dropped_connections"),
        }
    }
}

struct Client {
    socket: OwnedFd,
    connection: Connection,
}

/// A command that the machine has.
struct Pending {
    call: CallId,
    title: String,
    since: Instant,
    /// How long the machine may take.
    within: Duration,
}

/// What `wait` found beside the clients.
struct Ready {
    woken: bool,
    connecting: bool,
}

struct Server {
    listener: Listener,
    clients: Vec<Client>,
    answers: Answers,
    commands: CommandSender,
    published: Arc<Published>,
    stop: StopHook,
    options: ServerOptions,
    stopping: Arc<AtomicBool>,
    pending: Vec<Pending>,
    next_call: CallId,
    /// The listener is not polled until then.
    rest_until: Option<Instant>,
    /// When the machine last answered anything.
    last_answer: Instant,
    counters: Counters,
}

impl Server {
    fn run(mut self) {
        while !self.stopping.load(Ordering::Acquire) {
            let ready = self.wait();
            let now = Instant::now();
            if ready.woken {
                self.answers.waker.clear();
                self.take_answers(now);
            }
            self.give_up_on_commands(now);
            if self.rest_until.is_some_and(|until| now >= until) {
                self.rest_until = None;
            }
            if ready.connecting {
                self.accept(now);
            }
            let mut clients = std::mem::take(&mut self.clients);
            clients.retain_mut(|client| self.serve(client, now));
            self.clients = clients;
        }
        self.take_answers(Instant::now());
        for client in &mut self.clients {
            flush(client, Instant::now());
        }
        self.listener.remove_file();
    }

    /// Sleeps until a socket, an answer or a deadline needs attention.
    fn wait(&self) -> Ready {
        let mut fds = Vec::with_capacity(self.clients.len().saturating_add(2));
        fds.push(PollFd::new(&self.answers.waker, PollFlags::IN));
        let accepting = match self.rest_until {
            None => PollFlags::IN,
            Some(_) => PollFlags::empty(),
        };
        fds.push(PollFd::new(&self.listener.fd, accepting));
        for client in &self.clients {
            let mut interest = PollFlags::empty();
            if client.connection.room() > 0 {
                interest |= PollFlags::IN;
            }
            if !client.connection.unsent().is_empty() {
                interest |= PollFlags::OUT;
            }
            fds.push(PollFd::new(&client.socket, interest));
        }
        let deadline = self
            .clients
            .iter()
            .filter_map(|c| c.connection.deadline())
            .chain(self.pending.iter().map(|p| p.since + p.within))
            .chain(self.rest_until)
            .min();
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        // EINTR and ENOMEM: look at everything and poll again.
        let _ = poll(&mut fds, timeout.as_ref());
        let mut events = fds.iter().map(|fd| !fd.revents().is_empty());
        Ready {
            woken: events.next().unwrap_or(false),
            connecting: events.next().unwrap_or(false),
        }
    }

    fn accept(&mut self, now: Instant) {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.listener.fd, flags) {
                Ok(socket) => self.take_in(socket, now),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                // Out of descriptors: a guest may hold a thousand through its vsock. An idle
                // client's is worth less than the next caller.
                Err(_) if self.make_room() => {}
                Err(_) => {
                    self.rest_until = Some(now + LISTENER_REST);
                    return;
                }
            }
        }
    }

    fn take_in(&mut self, socket: OwnedFd, now: Instant) {
        if self.clients.len() >= MAX_CONNECTIONS && !self.make_room() {
            self.counters.dropped_connections.inc();
            let _ = send(
                &socket,
                b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\
                  Content-Length: 0\r\n\r\n",
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            return;
        }
        self.clients.push(Client {
            socket,
            connection: Connection::new(now, self.options.max_body),
        });
    }

    /// Drops the connection that was idle longest; false if every one waits for an answer.
    fn make_room(&mut self) -> bool {
        let oldest = self
            .clients
            .iter()
            .enumerate()
            .filter_map(|(i, c)| c.connection.idle_since().map(|since| (since, i)))
            .min();
        if let Some((_, index)) = oldest {
            self.counters.dropped_connections.inc();
            self.clients.swap_remove(index);
        }
        oldest.is_some()
    }

    /// Moves one client on; false if its connection is over.
    fn serve(&mut self, client: &mut Client, now: Instant) -> bool {
        for turn in 1.. {
            if turn > TURNS {
                // Others first; the wake-up brings us back at once.
                self.answers.waker.wake();
                break;
            }
            if !flush(client, now) {
                return false;
            }
            let read = receive(client, now);
            if read == Read::Broken {
                return false;
            }
            self.next_call = self.next_call.wrapping_add(1);
            let call = self.next_call;
            match client.connection.next_call(call, now) {
                Ok(Some(request)) => self.dispatch(client, call, request, now),
                Ok(None) if read == Read::Nothing => break,
                Ok(None) => {}
                Err((title, fault)) => self.log_outcome(&title, &Err(fault)),
            }
        }
        client.connection.tick(now);
        flush(client, now) && !client.connection.is_over(now)
    }

    fn dispatch(&mut self, client: &mut Client, call: CallId, request: Call, now: Instant) {
        self.counters.calls.inc();
        let title = request.title;
        if let Some(outcome) = self.answer_here(&request.request) {
            self.log_outcome(&title, &outcome);
            client.connection.answer(call, &outcome, now);
            return;
        }
        if request.request == Request::Action(Action::Stop) {
            crate::log_info!("Stop was requested through the API");
            client.connection.answer(call, &Ok(Body::Empty), now);
            flush(client, now);
            self.listener.remove_file();
            (self.stop)();
            return;
        }
        let within = match request.request {
            Request::CreateSnapshot(_) => self.options.answer_within.max(SNAPSHOT_WITHIN),
            _ => self.options.answer_within,
        };
        self.pending.push(Pending {
            call,
            title,
            since: now,
            within,
        });
        let command = Command {
            request: request.request,
            fds: request.fds,
            reply: self.answers.reply_for(call),
        };
        // If the machine is gone, dropping the command answers it.
        drop(self.commands.send(command));
    }

    /// GETs of what is published.
    fn answer_here(&self, request: &Request) -> Option<Result<Body, Fault>> {
        #[derive(serde::Serialize)]
        struct Info<'a> {
            app_name: &'a str,
            id: &'a str,
            state: InstanceState,
            vmm_version: &'a str,
        }
        #[derive(serde::Serialize)]
        struct Version<'a> {
            firecracker_version: &'a str,
            belljar_version: &'a str,
        }
        let version = env!("CARGO_PKG_VERSION");
        Some(match request {
            Request::GetInstanceInfo => Body::json(&Info {
                app_name: "Bell Jar",
                id: &self.published.id(),
                state: self.published.state(),
                vmm_version: version,
            }),
            Request::GetVersion => Body::json(&Version {
                firecracker_version: FIRECRACKER_API_VERSION,
                belljar_version: version,
            }),
            Request::GetVmConfig => Body::json(&self.published.config()),
            Request::GetMachineConfig => Body::json(&self.published.config().machine_config),
            _ => return None,
        })
    }

    fn take_answers(&mut self, now: Instant) {
        while let Ok((call, outcome)) = self.answers.queue.try_recv() {
            self.last_answer = now;
            self.finish(call, &outcome, now);
        }
    }

    /// Ends a pending command: answers its client, if both still wait.
    fn finish(&mut self, call: CallId, outcome: &Result<Body, Fault>, now: Instant) {
        let Some(at) = self.pending.iter().position(|p| p.call == call) else {
            // Given up before.
            return;
        };
        let title = self.pending.swap_remove(at).title;
        self.log_outcome(&title, outcome);
        for client in &mut self.clients {
            if client.connection.answer(call, outcome, now) {
                break;
            }
        }
    }

    fn give_up_on_commands(&mut self, now: Instant) {
        let late: Vec<(CallId, String, Duration)> = self
            .pending
            .iter()
            .filter(|p| now.duration_since(p.since) >= p.within)
            .map(|p| (p.call, p.title.clone(), p.within))
            .collect();
        for (call, title, limit) in late {
            self.counters.unanswered.inc();
            let fault = Fault::unanswered(format!(
                "{title}: the machine's thread has not answered for {} s (its last answer to \
                 any call was {} s ago); the call may still take effect. GET / and the action \
                 Stop work all the same",
                limit.as_secs(),
                now.duration_since(self.last_answer).as_secs()
            ));
            self.finish(call, &Err(fault), now);
        }
    }

    fn log_outcome(&self, title: &str, outcome: &Result<Body, Fault>) {
        match outcome {
            Ok(_) => crate::log_debug!("{title}: done"),
            Err(fault) => {
                self.counters.faults.inc();
                crate::log_warn!("{title}: refused: {}", fault.message);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    Something,
    Nothing,
    Broken,
}

/// Reads once, as much as the connection has room for.
fn receive(client: &mut Client, now: Instant) -> Read {
    let mut bytes = [0u8; 4096];
    let room = client.connection.room().min(bytes.len());
    if room == 0 {
        // The peer may have gone; sending would tell, but there is nothing to send.
        return hung_up(client);
    }
    let Some(buffer) = bytes.get_mut(..room) else {
        return Read::Nothing;
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        &client.socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    );
    let (count, flags) = match received {
        Ok(message) => (message.bytes, message.flags),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Read::Nothing,
        Err(_) => return Read::Broken,
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if count == 0 {
        client.connection.end_of_input(now);
        return Read::Nothing;
    }
    let truncated = flags.contains(ReturnFlags::CTRUNC);
    client
        .connection
        .received(buffer.get(..count).unwrap_or_default(), fds, truncated, now);
    Read::Something
}

/// While nothing is read, a peer that has closed both directions must still be noticed.
fn hung_up(client: &Client) -> Read {
    let mut fds = [PollFd::from_borrowed_fd(
        client.socket.as_fd(),
        PollFlags::empty(),
    )];
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let gone = poll(&mut fds, Some(&zero)).is_ok_and(|n| n > 0)
        && fds
            .iter()
            .any(|f| f.revents().intersects(PollFlags::HUP | PollFlags::ERR));
    if gone { Read::Broken } else { Read::Nothing }
}

/// Sends what the socket takes; false if the connection is broken.
fn flush(client: &mut Client, now: Instant) -> bool {
    while !client.connection.unsent().is_empty() {
        let sent = send(
            &client.socket,
            client.connection.unsent(),
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        );
        match sent {
            Ok(count) => client.connection.sent(count, now),
            Err(rustix::io::Errno::AGAIN) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}
