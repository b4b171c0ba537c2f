//! The worker: speaks the protocol with the host. Blocking code, one thread for each call.
//!
//! Threads take turns in `accept`: whoever gets a connection makes sure that another thread waits for
//! the next one, and serves its call to the end. Nothing in here must be kept: the worker may be killed
//! and replaced at any moment.

mod calls;
mod conn;
mod files;
mod holder;
mod ports;
mod process;
mod procfs;
mod relay;
mod silent;
mod system;
mod terminal;
mod wait;
mod watch;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, error::Code, reply::Result as Answer};
use belljar_protocol::{GENERATION, HOST_CID};
use prost::Message;

use self::conn::{Conn, ConnError};
use self::holder::Holder;
use crate::log;
use crate::sys;
use crate::wire::{CONTROL_FD, LISTENER_FD, MAX_CONTROL, WorkerConfig};

/// How long a connection may take to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// How long the host may take to hang up after the end, so that no last byte is cut off.
const LINGER_TIME: Duration = Duration::from_secs(2);

/// Threads that wait for connections although enough others do: so that a call need not wait for a
/// thread to be made.
const IDLE_THREADS: usize = 2;

/// Connections at a time, and so threads.
const MAX_THREADS: usize = 1200;

/// With fewer threads left than these, connections that are silent make room.
const SCARCE_THREADS: usize = 64;

/// How long a connection may take to send its request, or to hang up, where nobody else accepts any.
const BUSY_TIME: Duration = Duration::from_millis(100);

/// How exactly the last activity is known after a worker was replaced.
const NOTE_NS: u64 = 50_000_000;

/// A call's frames and a few buffers live on the heap.
const STACK: usize = 192 << 10;

/// What all calls share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: WorkerConfig,
    pub(crate) holder: Holder,
    /// `CLOCK_BOOTTIME` in nanoseconds of the last call that counts as activity.
    pub(crate) activity: AtomicU64,
    /// What of that is known to the worker after this one, and how it is told.
    noted: AtomicU64,
    note: Option<OwnedFd>,
    pub(crate) watches: watch::Watches,
    listener: OwnedFd,
    silent: silent::Silent,
    threads: AtomicUsize,
    waiting: AtomicUsize,
}

/// Why a call did not come to its end.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The reply is this error.
    Refused(v1::Error),
    /// There is nobody to reply to.
    Gone(ConnError),
}

impl From<v1::Error> for Failure {
    fn from(error: v1::Error) -> Self {
        Self::Refused(error)
    }
}

impl From<ConnError> for Failure {
    fn from(error: ConnError) -> Self {
        Self::Gone(error)
    }
}

/// What is left to do for a call that was carried out.
#[expect(
    clippy::large_enum_variant,
    reason = "one a call, on the stack, and sent at once"
)]
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Send this head; that is all.
    Reply(Answer),
    /// The call has sent its head and its stream itself.
    Streamed,
}

/// The end of every call's function.
pub(crate) type Answered = Result<Outcome, Failure>;

/// An [`v1::Error`] with a code and a text.
pub(crate) fn refusal(code: Code, message: impl Into<String>) -> v1::Error {
    v1::Error {
        code: code.into(),
        message: message.into(),
        errno: 0,
    }
}

/// A failed system call as an [`v1::Error`]; `what` was attempted.
pub(crate) fn system_error(what: impl std::fmt::Display, errno: rustix::io::Errno) -> v1::Error {
    v1::Error {
        code: Code::System.into(),
        message: format!("{what}: {}", io::Error::from(errno)),
        errno: errno.raw_os_error().unsigned_abs(),
    }
}

/// The worker's whole life: what the holder starts in a process of its own.
pub(crate) fn run() -> i32 {
    sys::share_one_heap();
    if rustix::process::getppid().is_some_and(|parent| parent.is_init()) {
        log::open_console();
    }
    match start() {
        Ok(context) => {
            let context = Arc::new(context);
            context.serve();
            context.holder.wait_for_its_end();
            // Whoever starts in the holder's place starts a worker of its own.
            0
        }
        Err(error) => {
            log!("a worker cannot start: {error}");
            1
        }
    }
}

fn start() -> io::Result<Context> {
    // A shutdown asks all processes to end, but not this one.
    sys::block_signals()?;
    let listener = sys::inherited(LISTENER_FD)?;
    let control = sys::inherited(CONTROL_FD)?;
    let mut bytes = vec![0; MAX_CONTROL];
    let (_, got) = rustix::net::recv(
        &control,
        bytes.as_mut_slice(),
        rustix::net::RecvFlags::empty(),
    )?;
    let config = WorkerConfig::decode(bytes.get(..got).unwrap_or_default())?;
    system::assume(&config.user_cgroup);
    Ok(Context::new(listener, Holder::new(control), config))
}

impl Context {
    /// On a blocking, listening socket.
    fn new(listener: OwnedFd, holder: Holder, config: WorkerConfig) -> Self {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let note = rustix::fs::open(&*config.activity, flags, rustix::fs::Mode::empty()).ok();
        let mut activity = [0; 8];
        if let Some(note) = &note {
            let _ = rustix::io::pread(note, &mut activity, 0);
        }
        let activity = u64::from_ne_bytes(activity);
        Self {
            config,
            holder,
            activity: AtomicU64::new(activity),
            noted: AtomicU64::new(activity),
            note,
            watches: watch::Watches::default(),
            listener,
            silent: silent::Silent::default(),
            threads: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Notes that the guest is in use: at once for this worker, now and then for the next one.
    pub(crate) fn touch(&self) {
        let now = crate::boot::now_ns();
        self.activity.store(now, Ordering::Relaxed);
        let noted = self.noted.load(Ordering::Relaxed);
        if now.saturating_sub(noted) >= NOTE_NS
            && let Some(note) = &self.note
        {
            self.noted.store(now, Ordering::Relaxed);
            let _ = rustix::io::pwrite(note, &now.to_ne_bytes(), 0);
        }
    }

    /// The first frame that every call is answered with.
    pub(crate) fn head(&self, result: Answer) -> v1::Reply {
        v1::Reply {
            generation: GENERATION,
            abilities: self.config.abilities.clone(),
            degraded: self.config.degraded.clone(),
            result: Some(result),
        }
    }

    /// Begins to serve, in threads of its own.
    fn serve(self: &Arc<Self>) {
        // Calls say the mode of what they make.
        rustix::process::umask(rustix::fs::Mode::empty());
        self.add_thread();
    }

    fn take_turns(self: &Arc<Self>) {
        loop {
            self.waiting.fetch_add(1, Ordering::AcqRel);
            let accepted = sys::accept(self.listener.as_fd());
            let others = self.waiting.fetch_sub(1, Ordering::AcqRel) - 1;
            match accepted {
                Ok((fd, peer)) => {
                    let threads = self.threads.load(Ordering::Relaxed);
                    if threads.saturating_add(SCARCE_THREADS) > MAX_THREADS {
                        self.silent.make_room();
                    }
                    let is_last = others == 0 && !self.add_thread();
                    if peer.is_none_or(|cid| cid == HOST_CID) {
                        self.serve_call(fd, is_last);
                    } else {
                        log!("refused a connection from CID {peer:?}: not the host");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of descriptors or memory: the connection waits in the queue. Do not spin.
                    log!("cannot accept a connection: {error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            if self.waiting.load(Ordering::Acquire) >= IDLE_THREADS {
                self.threads.fetch_sub(1, Ordering::Relaxed);
                // There were more calls at a time than there are now.
                sys::give_memory_back();
                return;
            }
        }
    }

    /// False: there can be no more.
    fn add_thread(self: &Arc<Self>) -> bool {
        if self.threads.fetch_add(1, Ordering::Relaxed) >= MAX_THREADS {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        let context = Arc::clone(self);
        let made = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || context.take_turns());
        if let Err(error) = &made {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            log!("cannot make a thread: {error}");
        }
        made.is_ok()
    }

    /// `is_last`: no other thread accepts connections meanwhile, so this must not take long.
    fn serve_call(&self, fd: OwnedFd, is_last: bool) {
        let mut conn = Conn::new(fd);
        let (request_time, linger_time) = if is_last {
            (BUSY_TIME, BUSY_TIME)
        } else {
            (REQUEST_TIME, LINGER_TIME)
        };
        let entry = self.silent.enter(conn.socket());
        let request = conn.receive::<v1::Request>(Instant::now().checked_add(request_time));
        drop(entry);
        let is_too_much = is_last
            && match &request {
                Ok(Some(request)) => !calls::is_quick(request),
                Ok(None) => false,
                Err(error) => matches!(error, ConnError::Late),
            };
        let served = match request {
            _ if is_too_much => {
                let error = refusal(Code::Busy, "the agent serves as many calls as it can");
                conn.send(&self.head(Answer::Error(error)))
            }
            Ok(Some(request)) => match calls::answer(self, &mut conn, request) {
                Ok(Outcome::Reply(result)) => conn.send(&self.head(result)),
                Ok(Outcome::Streamed) => Ok(()),
                Err(Failure::Refused(error)) => conn.send(&self.head(Answer::Error(error))),
                Err(Failure::Gone(error)) => Err(error),
            },
            Ok(None) => return,
            Err(ConnError::Decode(error)) => {
                let error = refusal(Code::Invalid, format!("no request: {error}"));
                conn.send(&self.head(Answer::Error(error)))
            }
            Err(error) => Err(error),
        };
        match served {
            Ok(()) => linger(&conn, linger_time),
            Err(ConnError::HungUp) => {}
            Err(error) => log!("connection dropped: {error}"),
        }
    }
}

/// Lets the host hang up first: closing with unread input would cut off what was sent last.
fn linger(conn: &Conn, time: Duration) {
    let fd = conn.as_fd();
    let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Write);
    let Some(deadline) = Instant::now().checked_add(time) else {
        return;
    };
    let mut scratch = [0; 4096];
    while let Ok(true) = conn::wait_readable(fd, deadline) {
        match rustix::net::recv(fd, &mut scratch[..], rustix::net::RecvFlags::empty()) {
            Ok((_, got)) if got != 0 => {}
            _ => return,
        }
    }
}
