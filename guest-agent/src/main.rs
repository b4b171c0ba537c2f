//! `belljar-agent`: PID 1 of a guest, and the service that the host talks to over vsock.
//!
//! As PID 1 it never ends: errors are told and worked around, and should it panic, it runs its own
//! program again in the same process.

#![cfg_attr(not(test), no_main)]

mod boot;
mod exec;
mod holder;
mod log;
mod power;
mod screen;
mod sys;
mod wire;
mod worker;

use std::ffi::{CString, OsString};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use belljar_protocol::{AGENT_PORT, GENERATION, v1};

use self::boot::Booted;
use self::exec::cgroup::Cgroups;
use self::holder::{Ended, Holder, Setup};

const CGROUPS: &str = "/sys/fs/cgroup";

/// What holder and worker can do in every guest.
const ABILITIES: [v1::Ability; 9] = [
    v1::Ability::Exec,
    v1::Ability::Shutdown,
    v1::Ability::Processes,
    v1::Ability::Terminals,
    v1::Ability::Files,
    v1::Ability::Watches,
    v1::Ability::Ports,
    v1::Ability::System,
    v1::Ability::Adopt,
];

/// Argument of a run after a panic, followed by the number of panics so far and [`DISK`].
const RECOVERED: &str = "--recovered";

/// The descriptor of the writable drive's mount; -1: none. It outlives a panic: below the root, the mount
/// has no path any more.
static DISK: AtomicI32 = AtomicI32::new(-1);

/// Connections waiting to be accepted.
const BACKLOG: i32 = 128;

/// Tries to listen; a transport that is a module may take its time.
const LISTEN_TRIES: u32 = 40;
const LISTEN_PAUSE: Duration = Duration::from_millis(50);

/// Soft limit of descriptors for programs; what this process may open more is its own.
const DESCRIPTORS: u64 = 1024;

const USAGE: &str = "belljar-agent runs as PID 1 of a Bell Jar guest.\n\
    For tests: belljar-agent --serve-unix PATH [--cgroup DIRECTORY]\n";

/// Where the program starts, on every platform's C runtime.
pub(crate) fn start() -> i32 {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if std::process::id() == 1 {
        run_as_init(&arguments);
    }
    let words: Vec<_> = arguments.iter().map(|word| word.to_str()).collect();
    match words.as_slice() {
        [Some("--serve-unix"), Some(path)] => serve_unix(path, None),
        [
            Some("--serve-unix"),
            Some(path),
            Some("--cgroup"),
            Some(cgroup),
        ] => serve_unix(path, Some(cgroup)),
        [Some("--worker")] => worker::run(),
        [Some(screen::RENDER), wanted @ ..] => screen::run(wanted),
        [Some("--version")] => {
            print_text(&format!(
                "belljar-agent {} (protocol generation {GENERATION})\n",
                env!("CARGO_PKG_VERSION")
            ));
            0
        }
        _ => {
            print_text(USAGE);
            2
        }
    }
}

fn print_text(text: &str) {
    // Nothing better can be done where standard error is closed.
    let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
}

fn run_as_init(arguments: &[OsString]) -> ! {
    let recovered = match arguments {
        [flag, count, disk] if flag == RECOVERED => number(count).zip(number(disk)),
        _ => None,
    };
    run_again_on_panic(recovered.map_or(0, |(panics, _)| panics));
    if let Err(error) = sys::block_signals() {
        log!("cannot block signals: {error}");
    }
    let booted = match recovered {
        None => boot::boot(),
        Some((panics, disk)) => recover(panics, disk),
    };
    let disk = booted.disk.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    DISK.store(disk, Ordering::Relaxed);
    if let Ok(null) = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    ) {
        let _ = log::detach_stdio(&null);
    }
    let ended = match serve_vsock(&booted) {
        Ok(ended) => ended,
        Err(error) => {
            log!("cannot serve on vsock port {AGENT_PORT}: {error}; powering off");
            Ended::PowerOff
        }
    };
    power::end_guest(ended, booted.disk.as_ref())
}

fn number<T: std::str::FromStr>(argument: &OsString) -> Option<T> {
    argument.to_str()?.parse().ok()
}

/// After a panic: the guest is up, but whose programs run is forgotten. They end, and their
/// connections with them, which the host sees as "lost".
fn recover(panics: u32, disk: RawFd) -> Booted {
    log::open_console();
    log!("running again after panic {panics}; all programs are killed");
    sys::kill_everything(libc::SIGKILL);
    // Nobody remembers that they were frozen; what is started would never run.
    let _ = std::fs::write(format!("{CGROUPS}/user/cgroup.freeze"), "0");
    let mut degraded = format!("the agent has panicked {panics} times; see the console");
    let disk = match (disk >= 0).then(|| sys::inherited(disk)) {
        Some(Ok(disk)) => {
            power::thaw(&disk);
            Some(disk)
        }
        Some(Err(error)) => {
            degraded +=
                &format!("; its drive can neither be frozen nor be made clean at the end: {error}");
            None
        }
        None => None,
    };
    if panics > 3 {
        std::thread::sleep(Duration::from_secs(1));
    }
    Booted {
        degraded,
        disk,
        ..Booted::default()
    }
}

fn run_again_on_panic(panics: u32) {
    std::panic::set_hook(Box::new(move |panic| {
        log!("PANIC: {panic}");
        let count = CString::new(panics.saturating_add(1).to_string()).unwrap_or_default();
        let disk = DISK.load(Ordering::Relaxed);
        let _ = sys::keep_for_next(disk);
        let disk = CString::new(disk.to_string()).unwrap_or_default();
        let error = sys::run_again(&[c"belljar-agent", c"--recovered", &count, &disk]);
        // A last resort: PID 1 must not end, and the host can still see this on the console.
        log!("cannot run again: {error}");
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }));
}

fn serve_vsock(booted: &Booted) -> std::io::Result<Ended> {
    let mut holder = Holder::new(Setup {
        listener: listen()?,
        cgroups: open_cgroups(CGROUPS),
        degraded: booted.degraded.clone(),
        descriptors: raise_descriptors(),
        disk: booted.disk.as_ref().map(AsRawFd::as_raw_fd),
    })?;
    let mut times = booted.times;
    times.ready_ns = boot::now_ns();
    let kernel = rustix::system::uname();
    let ready = v1::Ready {
        generation: GENERATION,
        abilities: holder.abilities().to_vec(),
        boot_id: boot::read_file("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default(),
        kernel_release: kernel.release().to_string_lossy().into_owned(),
        times: Some(times),
        degraded: booted.degraded.clone(),
    };
    holder.announce(&ready);
    log!(
        "ready after {} µs (started {}, mounted {}), generation {GENERATION}",
        times.ready_ns / 1000,
        times.init_ns / 1000,
        times.mounted_ns / 1000
    );
    Ok(holder.run())
}

/// Allows this process as many descriptors as there may be; returns how many programs get.
fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit};
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        log!("cannot raise the limit of descriptors: {error}");
    }
    limit.current.unwrap_or(DESCRIPTORS)
}

fn listen() -> std::io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        match sys::vsock_listen(AGENT_PORT, BACKLOG) {
            Ok(listener) => return Ok(listener),
            Err(error) if tries >= LISTEN_TRIES => return Err(error),
            Err(_) => tries += 1,
        }
        std::thread::sleep(LISTEN_PAUSE);
    }
}

fn open_cgroups(root: &str) -> Option<Cgroups> {
    let opened = Cgroups::open(root);
    opened
        .inspect_err(|error| log!("no cgroups for programs at {root}: {error}"))
        .ok()
}

/// The service without a guest, on a Unix socket: how tests run it on the build machine.
fn serve_unix(path: &str, cgroup: Option<&str>) -> i32 {
    let served = || -> std::io::Result<Ended> {
        sys::block_signals()?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        let mut holder = Holder::new(Setup {
            listener: listener.into(),
            cgroups: cgroup.and_then(open_cgroups),
            degraded: String::new(),
            descriptors: raise_descriptors(),
            disk: None,
        })?;
        Ok(holder.run())
    };
    match served() {
        Ok(_) => 0,
        Err(error) => {
            log!("cannot serve on {path}: {error}");
            1
        }
    }
}

#[cfg(test)]
fn main() {
    start();
}
