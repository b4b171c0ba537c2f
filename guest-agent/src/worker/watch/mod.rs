//! Watches of files: each has a thread that follows its tree, and a queue that any number of connections
//! read. A watch outlives its connections for a while, so that a client can go on where it was.

mod inotify;
mod queue;
mod tree;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{
    self, error::Code, event::What as Happened, reply::Result as Answer, watch_event::What as Wire,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use self::inotify::{Spec, TOO_MANY, Watched};
use self::queue::{LIMITS, Queue};
use self::tree::{Told, What};
use super::conn::{Conn, timespec};
use super::files::Rights;
use super::{Answered, Context, Outcome, refusal, system, system_error};
use crate::log;

/// Watches at a time.
const MAX_WATCHES: usize = 64;

/// How long a watch without a connection is kept, unless the call says.
const KEEP: Duration = Duration::from_secs(60);

/// Longest path.
const MAX_PATH: usize = 4095;

/// Events sent at a time.
const PIECE: usize = 256;

const STACK: usize = 128 << 10;

/// All watches of the worker.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watches(Arc<Mutex<HashMap<u64, Arc<Watch>>>>);

/// One watch, as its connections see it.
#[derive(Debug)]
struct Watch {
    id: u64,
    keep: Duration,
    state: Mutex<State>,
    directories: AtomicUsize,
    /// Tells the thread to look at `state`.
    wake: OwnedFd,
}

#[derive(Debug)]
struct State {
    queue: Queue,
    /// Each reader is told of news by its own descriptor.
    readers: Vec<Arc<OwnedFd>>,
    /// Since when there is no reader.
    alone: Option<Instant>,
    cancelled: bool,
}

/// A thread that panicked with the lock has left nothing half done: every change is one call.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal(fd: &OwnedFd) {
    // It is counted already if the counter is full.
    let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

fn new_eventfd() -> Result<OwnedFd, v1::Error> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| system_error("making a watch", errno))
}

/// Begins a watch or goes on with one, and sends its events.
pub(super) fn watch(context: &Context, conn: &mut Conn, call: &v1::Watch) -> Answered {
    let (watch, from) = if call.id == 0 {
        (start(&context.watches, call)?, 1)
    } else {
        let known = locked(&context.watches.0).get(&call.id).cloned();
        let watch = known.ok_or_else(|| unknown(call.id))?;
        (watch, call.from)
    };
    let reader = Reader::attach(watch)?;
    let (oldest, newest) = reader.kept();
    let mut next = if from == 0 { oldest } else { from };
    let begins = (oldest..=newest).contains(&next);
    conn.send(&context.head(Answer::Watch(v1::WatchStarted {
        id: reader.watch.id,
        next: if begins { next } else { oldest },
        directories: reader.watch.directories.load(Ordering::Relaxed) as u64,
    })))?;
    loop {
        let (events, after, ended) = reader.read(next);
        next = after;
        if !events.is_empty() {
            let lost = |event: &v1::WatchEvent| matches!(event.what, Some(Wire::Overflow(_)));
            if events.iter().any(lost) {
                let watch = reader.watch.id;
                system::post(
                    context,
                    Happened::WatchOverflow(v1::WatchOverflowed { watch }),
                );
            }
            conn.send_each(&events)?;
        } else if ended || call.no_follow || !reader.wait(conn)? {
            return Ok(Outcome::Streamed);
        }
    }
}

/// Ends a watch.
pub(super) fn unwatch(context: &Context, call: v1::Unwatch) -> Answered {
    let removed = locked(&context.watches.0).remove(&call.id);
    let watch = removed.ok_or_else(|| unknown(call.id))?;
    locked(&watch.state).cancelled = true;
    watch.tell_readers();
    signal(&watch.wake);
    Ok(Outcome::Reply(Answer::Unwatch(v1::Unwatched {})))
}

fn unknown(id: u64) -> v1::Error {
    let why = "it was ended, or not kept any longer, or the agent's worker was replaced";
    refusal(Code::NotFound, format!("there is no watch {id}: {why}"))
}

/// One connection that reads a watch.
struct Reader {
    watch: Arc<Watch>,
    news: Arc<OwnedFd>,
}

impl Reader {
    fn attach(watch: Arc<Watch>) -> Result<Self, v1::Error> {
        let news = Arc::new(new_eventfd()?);
        let mut state = locked(&watch.state);
        if state.cancelled {
            return Err(unknown(watch.id));
        }
        state.readers.push(Arc::clone(&news));
        state.alone = None;
        drop(state);
        Ok(Self { watch, news })
    }

    /// Numbers of the oldest event kept and of the one that comes next.
    fn kept(&self) -> (u64, u64) {
        let state = locked(&self.watch.state);
        (state.queue.oldest(), state.queue.next())
    }

    /// Events from number `from` on, the number after them, and whether more can come.
    fn read(&self, from: u64) -> (Vec<v1::WatchEvent>, u64, bool) {
        let mut state = locked(&self.watch.state);
        let (events, next) = state.queue.read(from, PIECE);
        let ended = state.cancelled || (state.queue.has_ended() && next == state.queue.next());
        (events, next, ended)
    }

    /// Waits for news. False: the host has closed its side.
    fn wait(&self, conn: &Conn) -> Result<bool, v1::Error> {
        let mut set = [
            PollFd::new(conn, PollFlags::IN),
            PollFd::new(&*self.news, PollFlags::IN),
        ];
        match poll(&mut set, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(system_error("waiting for events of a watch", errno)),
        }
        let [conn, _] = set;
        if !conn.revents().is_empty() {
            let mut scratch = [0; 512];
            let got = rustix::net::recv(conn.as_fd(), &mut scratch[..], RecvFlags::DONTWAIT);
            if !matches!(got, Ok((_, 1..)) | Err(Errno::AGAIN | Errno::INTR)) {
                return Ok(false);
            }
        }
        let _ = rustix::io::read(&*self.news, &mut [0; 8]);
        Ok(true)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = locked(&self.watch.state);
        state
            .readers
            .retain(|reader| !Arc::ptr_eq(reader, &self.news));
        if state.readers.is_empty() {
            state.alone = Some(Instant::now());
        }
        drop(state);
        signal(&self.watch.wake);
    }
}

/// Makes a watch with its thread.
fn start(watches: &Watches, call: &v1::Watch) -> Result<Arc<Watch>, v1::Error> {
    let spec = Spec {
        path: checked_path(&call.path)?,
        recursive: call.recursive,
    };
    inotify::raise_limits();
    let mut id = [0; 8];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| system_error("making a watch", errno))?;
    let watch = Arc::new(Watch {
        // Of no other watch, of no other worker either.
        id: u64::from_ne_bytes(id).max(1),
        keep: match call.keep_ms {
            0 => KEEP,
            keep => Duration::from_millis(keep),
        },
        state: Mutex::new(State {
            queue: Queue::new(LIMITS),
            readers: Vec::new(),
            alone: Some(Instant::now()),
            cancelled: false,
        }),
        directories: AtomicUsize::new(0),
        wake: new_eventfd()?,
    });
    {
        let mut all = locked(&watches.0);
        if all.len() >= MAX_WATCHES {
            let message = format!("there are {MAX_WATCHES} watches already");
            return Err(refusal(Code::Busy, message));
        }
        all.insert(watch.id, Arc::clone(&watch));
    }
    let (started, start) = mpsc::channel();
    let (thread_watch, thread_watches) = (Arc::clone(&watch), watches.clone());
    let user = call.user.clone();
    let thread = std::thread::Builder::new()
        .stack_size(STACK)
        .spawn(move || {
            // For as long as the thread lives: directories to come are looked at with them, too.
            match Rights::of(&user) {
                Ok(_rights) => follow(&thread_watch, &spec, &started),
                Err(error) => drop(started.send(Err(error))),
            }
            locked(&thread_watches.0).remove(&thread_watch.id);
        });
    if let Err(error) = thread {
        locked(&watches.0).remove(&watch.id);
        return Err(refusal(
            Code::Busy,
            format!("no thread for a watch: {error}"),
        ));
    }
    match start.recv() {
        Ok(Ok(())) => Ok(watch),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(refusal(
            Code::Internal,
            "the watch ended while it was begun",
        )),
    }
}

fn checked_path(path: &[u8]) -> Result<Vec<u8>, v1::Error> {
    if path.is_empty() || path.len() > MAX_PATH || path.contains(&0) {
        return Err(refusal(
            Code::Invalid,
            "path: empty, too long, or with a zero byte",
        ));
    }
    Ok(if path.starts_with(b"/") {
        path.to_vec()
    } else {
        [b"/", path].concat()
    })
}

/// The thread of a watch.
fn follow(watch: &Watch, spec: &Spec, started: &mpsc::Sender<Result<(), v1::Error>>) {
    let mut watched = match Watched::start(spec) {
        Ok(watched) => Some(watched),
        Err(errno) => {
            let path = String::from_utf8_lossy(&spec.path);
            let what = match errno {
                Errno::NOSPC => format!("watching {path}: {TOO_MANY}"),
                _ => format!("watching {path}"),
            };
            let _ = started.send(Err(system_error(what, errno)));
            return;
        }
    };
    watch.count(watched.as_ref());
    let _ = started.send(Ok(()));
    while let Some(deadline) = watch.deadline() {
        let due = watched.as_ref().and_then(Watched::next_due);
        let deadline = match (deadline, due) {
            (Some(deadline), Some(due)) => Some(deadline.min(due)),
            (deadline, due) => deadline.or(due),
        };
        watch.wait(watched.as_ref(), deadline);
        let Some(tree) = &mut watched else { continue };
        let stale = tree.take(|told| locked(&watch.state).queue.push(told));
        if let Some(reason) = stale {
            watched = watch.start_anew(spec, reason);
        } else if locked(&watch.state).queue.has_ended() {
            watched = None;
        }
        watch.count(watched.as_ref());
        watch.tell_readers();
    }
}

impl Watch {
    fn count(&self, watched: Option<&Watched>) {
        let count = watched.map_or(0, Watched::directories);
        self.directories.store(count, Ordering::Relaxed);
    }

    /// `None`: it is over. Otherwise when it will be, if nobody comes.
    #[allow(clippy::option_option)] // Over, for ever, until then.
    fn deadline(&self) -> Option<Option<Instant>> {
        let state = locked(&self.state);
        let until = state.alone.map(|since| since.checked_add(self.keep));
        let over = matches!(until, Some(Some(until)) if until <= Instant::now());
        (!state.cancelled && !over).then(|| until.flatten())
    }

    fn wait(&self, watched: Option<&Watched>, deadline: Option<Instant>) {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut set = vec![PollFd::new(&self.wake, PollFlags::IN)];
        set.extend(watched.map(|watched| PollFd::from_borrowed_fd(watched.fd(), PollFlags::IN)));
        let _ = poll(&mut set, left.map(timespec).as_ref());
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Events were lost: tells so, and watches what is there now.
    fn start_anew(&self, spec: &Spec, reason: &'static str) -> Option<Watched> {
        let started = Watched::start(spec);
        let mut state = locked(&self.state);
        state.queue.overflow(reason);
        match started {
            Ok(watched) => Some(watched),
            Err(errno) => {
                log!("a watch ends: {reason}, then {errno}");
                state.queue.push(Told {
                    what: What::Gone(if errno == Errno::NOSPC {
                        TOO_MANY
                    } else {
                        "it cannot be watched any more"
                    }),
                    is_directory: false,
                });
                None
            }
        }
    }

    fn tell_readers(&self) {
        locked(&self.state)
            .readers
            .iter()
            .for_each(|reader| signal(reader));
    }
}
