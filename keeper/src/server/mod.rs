//! The keeper's process: one for each directory, gone when nobody has needed it for a while.

mod attended;
mod calls;
mod capture;
mod check;
mod digests;
mod first;
mod hot;
mod lazy;
mod log;
mod names;
mod quiet;
mod ready;
mod recordings;
mod regions;
mod rescue;
mod session;
mod surroundings;
mod templates;
mod touched;

pub use surroundings::{Point, Surroundings};

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use belljar_store::{Settings, Store};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;

use crate::{HOT_VARIABLE, IDLE_VARIABLE, READY_VARIABLE, SOCKET, TEMPLATES_VARIABLE};

/// Unless [`IDLE_VARIABLE`] says.
const IDLE: Duration = Duration::from_secs(20);
/// Unless [`TEMPLATES_VARIABLE`] says.
const TEMPLATE_BYTES: u64 = 8 << 30;
/// Between two looks whether anybody needs it.
const LOOK: Duration = Duration::from_millis(250);
/// A keeper that is leaving gives its lock back within this time.
const LEAVING: Duration = Duration::from_secs(10);

/// The keeper cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot {what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
    #[error("the store cannot be opened: {0}")]
    Store(#[from] belljar_store::Error),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ServerError {
    move |source| ServerError::Io { what, source }
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) templates: templates::Templates,
    /// Those that are used again and again.
    pub(crate) hot: hot::Hot,
    pub(crate) captures: capture::Captures,
    pub(crate) digests: digests::Digests,
    pub(crate) recordings: recordings::Recordings,
    /// VMMs that wait for the next restore.
    pub(crate) ready: ready::ReadyVmms,
    /// Memory that is being filled while guests run.
    pub(crate) lazies: lazy::Lazies,
    /// The folder of what guests touched first.
    pub(crate) touched: PathBuf,
    /// Whether a guest stands still.
    pub(crate) quiet: Arc<quiet::Quiet>,
    /// Held while what is said about a snapshot is changed.
    pub(crate) marking: Mutex<()>,
    pub(crate) surroundings: Arc<dyn Surroundings>,
    busy: AtomicUsize,
}

/// While one is kept, the keeper stays.
pub(crate) struct Busy(Arc<Shared>);

impl Busy {
    pub(crate) fn begin(shared: &Arc<Shared>) -> Self {
        shared.busy.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(shared))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a thread that panicked left is whole: no change here is made in two steps.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until nobody has needed it for a while. Leaves at once if another keeper serves this directory.
///
/// # Errors
/// The directory or the store cannot be used.
pub fn run(dir: &Path) -> Result<(), ServerError> {
    run_in(dir, Arc::new(surroundings::Undisturbed))
}

/// [`run`], in any surroundings.
///
/// # Errors
/// As there.
pub fn run_in(dir: &Path, surroundings: Arc<dyn Surroundings>) -> Result<(), ServerError> {
    let _ = rustix::process::setsid();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("make the directory"))?;
    // Relative to it, because a socket's path may have at most 107 bytes.
    std::env::set_current_dir(dir).map_err(failed("enter the directory"))?;
    log::begin();
    crate::sys::share_heaps();
    allow_descriptors();
    let Some(_lock) = take_lock()? else {
        return Ok(());
    };
    let served = serve(surroundings);
    if let Err(error) = &served {
        crate::server::log::line(&error.to_string());
    }
    served
}

/// Each guest and each client that waits has some descriptors here: more of them, if that is allowed.
fn allow_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit
        .maximum
        .or(limit.current)
        .map(|most| most.min(1 << 16));
    // With fewer, those who come later wait.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// `None`: another one serves.
fn take_lock() -> Result<Option<File>, ServerError> {
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open("lock")
        .map_err(failed("open the lock"))?;
    let deadline = Instant::now() + LEAVING;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(failed("lock")(errno.into())),
        }
        // Whoever holds it serves, or is about to, or is leaving.
        let serves = std::os::unix::net::UnixStream::connect(SOCKET).is_ok();
        if serves || Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn serve(surroundings: Arc<dyn Surroundings>) -> Result<(), ServerError> {
    let store = Path::new("store");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(store)
        .map_err(failed("make the store's directory"))?;
    let folder = surroundings
        .store(store)
        .map_err(failed("open the store's directory"))?;
    let store = match Store::open_on(Arc::clone(&folder), false) {
        Err(belljar_store::Error::NoStore) => Store::create_on(folder, Settings::default())?,
        other => other?,
    };
    for problem in store.problems() {
        log::line(&format!("store: {}: {}", problem.path, problem.what));
    }
    let budget = number(TEMPLATES_VARIABLE).unwrap_or(TEMPLATE_BYTES);
    let near = Arc::clone(&surroundings);
    let templates = templates::Templates::open(Path::new("templates"), budget, near)
        .map_err(failed("use the folder of templates"))?;
    std::fs::create_dir_all("touched").map_err(failed("use the folder of hints"))?;
    let ids = store.list()?.iter().map(|snapshot| snapshot.id).collect();
    touched::keep_only(Path::new("touched"), &ids);
    let recordings = recordings::Recordings::open(Path::new("recordings"))
        .map_err(failed("use the folder of recordings"))?;
    let shared = Arc::new(Shared {
        store,
        templates,
        hot: hot::Hot::new(number(HOT_VARIABLE)),
        captures: capture::Captures::default(),
        digests: digests::Digests::load(Path::new("digests")),
        recordings,
        ready: ready::ReadyVmms::new(number(READY_VARIABLE)),
        lazies: lazy::Lazies::default(),
        touched: PathBuf::from("touched"),
        quiet: Arc::default(),
        marking: Mutex::default(),
        surroundings,
        busy: AtomicUsize::new(0),
    });
    let _ = std::fs::remove_file(SOCKET);
    let listener = UnixListener::bind(SOCKET).map_err(failed("listen"))?;
    listener
        .set_nonblocking(true)
        .map_err(failed("listen without waiting"))?;
    // Whoever started it reads its last words only until it serves, and what it starts may not write to nobody.
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stderr(null);
    }
    let (serves, until) = mpsc::channel();
    ready::begin(&shared, until).map_err(failed("start a thread"))?;
    accept_all(&listener, &shared)?;
    drop(serves);
    shared.ready.clear();
    // Who connected in this moment is cut before Hello, and tries again.
    let _ = std::fs::remove_file(SOCKET);
    Ok(())
}

fn accept_all(listener: &UnixListener, shared: &Arc<Shared>) -> Result<(), ServerError> {
    let idle = number(IDLE_VARIABLE).map_or(IDLE, Duration::from_millis);
    let mut last_busy = Instant::now();
    loop {
        let mut set = [PollFd::new(listener, PollFlags::IN)];
        let wait = Timespec::try_from(idle.min(LOOK)).unwrap_or(Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        });
        match poll(&mut set, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed("wait")(errno.into())),
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let _ = stream.set_nonblocking(false);
                session::start(stream, Busy::begin(shared));
                last_busy = Instant::now();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Out of descriptors, for example: those who wait try again.
            Err(error) => {
                log::line(&format!("cannot accept: {error}"));
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        if shared.busy.load(Ordering::SeqCst) > 0 {
            last_busy = Instant::now();
        } else if last_busy.elapsed() >= idle {
            return Ok(());
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.trim().parse().ok()
}
