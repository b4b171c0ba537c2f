//! What PID 1 does before it serves: file systems, modules, the root made of image and writable
//! drive. A failure is told on the console and in every reply (`degraded`); the agent then serves
//! from where it is, so that the guest can be looked at.

pub(crate) mod cmdline;
mod modules;
mod mounts;
mod root;

use std::fmt;
use std::os::fd::OwnedFd;

use belljar_protocol::v1::BootTimes;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use rustix::time::ClockId;

use crate::log;
use crate::sys;

const DEFAULT_HOSTNAME: &str = "belljar";

/// Descriptors a program in the guest may raise its limit to; the kernel's own default for PID 1
/// is 4096, too few for a server.
const MAX_DESCRIPTORS: u64 = 524_288;

/// Longest boot file read (`/proc/cmdline`, `/etc/hostname`), bytes.
const MAX_FILE: u64 = 16 << 10;

/// A step of the boot that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) struct BootError {
    pub(crate) stage: &'static str,
    pub(crate) attempted: String,
    pub(crate) errno: Errno,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stage,
            attempted,
            errno,
        } = self;
        write!(
            f,
            "{stage}: {attempted}: {errno} (errno {})",
            errno.raw_os_error()
        )
    }
}

/// Gives an errno its place in the boot.
pub(crate) trait Attempt<T> {
    fn attempt(self, stage: &'static str, what: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T> Attempt<T> for rustix::io::Result<T> {
    fn attempt(self, stage: &'static str, what: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|errno| BootError {
            stage,
            attempted: what(),
            errno,
        })
    }
}

/// What the boot has come to.
#[derive(Debug, Default)]
pub(crate) struct Booted {
    /// Empty: all is as asked.
    pub(crate) degraded: String,
    pub(crate) times: BootTimes,
    /// The writable drive, hidden below the root; kept to be made clean at the end.
    pub(crate) disk: Option<OwnedFd>,
}

/// CLOCK_BOOTTIME, nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

/// Brings the guest up as far as it goes.
pub(crate) fn boot() -> Booted {
    let mut booted = Booted::default();
    booted.times.init_ns = now_ns();
    match bring_up(&mut booted.disk) {
        Ok(()) => {}
        Err(error) => {
            log!("BOOT FAILED: {error}");
            booted.degraded = error.to_string();
        }
    }
    mounts::user_file_systems();
    set_hostname();
    if let Err(error) = sys::loopback_up() {
        log!("cannot bring up the loopback interface: {error}");
    }
    let limit = Rlimit {
        current: Some(1024),
        maximum: Some(MAX_DESCRIPTORS),
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        log!("cannot raise the limit of descriptors: {error}");
    }
    collect_dirty_pages();
    booted.times.mounted_ns = now_ns();
    booted
}

/// What programs write goes to the drive later than Linux would have it (10 % of the memory, 20 % at most):
/// with one processor, writing out takes its time from whoever writes. What is older than 30 s goes out
/// all the same, and what is synced at once.
fn collect_dirty_pages() {
    for (name, percent) in [("dirty_background_ratio", "25"), ("dirty_ratio", "40")] {
        let path = format!("/proc/sys/vm/{name}");
        if let Err(error) = std::fs::write(&path, percent) {
            log!("cannot set {path}: {error}");
        }
    }
}

fn bring_up(disk: &mut Option<OwnedFd>) -> Result<(), BootError> {
    mounts::first_file_systems()?;
    let line = read_file("/proc/cmdline")
        .attempt("command line", || "reading /proc/cmdline".to_owned())?;
    let parameters = cmdline::parse(&line);
    if let Some(name) = &parameters.hostname {
        let _ = rustix::system::sethostname(name.as_bytes());
    }
    modules::load();
    if let Some(image) = &parameters.image {
        *disk = root::switch_to(image, parameters.disk.as_deref())?;
    }
    Ok(())
}

/// The image's name for itself, unless the command line gave one.
fn set_hostname() {
    let is_unset = rustix::system::uname().nodename().to_bytes() == b"(none)";
    if !is_unset {
        return;
    }
    let file = read_file("/etc/hostname").unwrap_or_default();
    let name = Some(file.trim()).filter(|name| !name.is_empty() && name.len() <= 64);
    let name = name.unwrap_or(DEFAULT_HOSTNAME);
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        log!("cannot set the host name {name:?}: {error}");
    }
}

pub(crate) fn read_file(path: &str) -> rustix::io::Result<String> {
    use std::io::Read;

    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty())?;
    let mut content = Vec::new();
    std::fs::File::from(fd)
        .take(MAX_FILE)
        .read_to_end(&mut content)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(String::from_utf8_lossy(&content).into_owned())
}
