//! The only unsafe code of this crate: calls that neither the standard library nor rustix offers.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

pub use libc::{SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH};

/// Makes the child die with this process: with the thread that calls `spawn`, to be exact, so spawn from a
/// thread that lives as long as the process.
pub fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let arm = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
        if now.and_then(|pid| u32::try_from(pid).ok()) == Some(parent) {
            Ok(())
        } else {
            // The parent died before the signal was armed.
            Err(io::ErrorKind::NotConnected.into())
        }
    };
    // SAFETY: `arm` runs between fork and exec and makes only two system calls: no allocation, no locks.
    unsafe { command.pre_exec(arm) };
}

/// Resources a process used, its threads and guest time included.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    pub user_us: u64,
    pub system_us: u64,
    pub max_rss_kib: u64,
}

/// Reaps the child and tells what it used.
///
/// # Errors
/// `pid` is not a child of this process.
pub fn wait_with_usage(pid: u32) -> io::Result<(ExitStatus, Usage)> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut status = 0;
    // SAFETY: rusage is plain integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live variables of the right types.
        let result = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        if result == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let micros = |time: libc::timeval| {
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000)
            .saturating_add(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    let usage = Usage {
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    };
    Ok((ExitStatus::from_raw(status), usage))
}

/// Signals as a readable descriptor, so that one poll waits for them and for everything else. The signals
/// stay blocked in this process; children started by `Command` get an empty mask.
#[derive(Debug)]
pub struct SignalFd {
    fd: File,
}

impl SignalFd {
    /// Blocks `signals` in the calling thread (call it before there are others) and collects them.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        // SAFETY: sigset_t is plain integers; sigemptyset makes it a value before anything reads it.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is live; sigaddset refuses numbers that are no signals.
        unsafe {
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                libc::sigaddset(&raw mut set, *signal);
            }
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let blocked =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd: File::from(fd) })
    }

    /// The next signal that has arrived, if any.
    pub fn take(&self) -> Option<i32> {
        let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
        (&self.fd).read_exact(&mut record).ok()?;
        // ssi_signo is the first field, 32 bits.
        let number = u32::from_ne_bytes(*record.first_chunk()?);
        i32::try_from(number).ok()
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether the host's kernel has `userfaultfd(2)`. Asks with flags that do not exist, so that nothing is made.
#[must_use]
pub fn has_userfaultfd() -> bool {
    // SAFETY: the call takes one integer and touches no memory of this process.
    let answer = unsafe { libc::syscall(libc::SYS_userfaultfd, -1_i32) };
    answer < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

/// `KVM_GET_API_VERSION` (KVM api.rst 4.1).
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
/// `KVM_CREATE_VM` (4.2).
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
/// `KVM_CHECK_EXTENSION` (4.4).
const KVM_CHECK_EXTENSION: libc::c_ulong = 0xAE03;

/// An open `/dev/kvm`, for questions only.
#[derive(Debug)]
pub struct Kvm {
    device: File,
}

impl Kvm {
    /// # Errors
    /// As `open(2)` of `/dev/kvm` for reading and writing.
    pub fn open() -> io::Result<Self> {
        let device = File::options().read(true).write(true).open("/dev/kvm")?;
        Ok(Self { device })
    }

    /// # Errors
    /// It is not KVM.
    pub fn api_version(&self) -> io::Result<i32> {
        self.ask(KVM_GET_API_VERSION, 0)
    }

    /// Positive if the extension is there (`KVM_CAP_…`).
    ///
    /// # Errors
    /// It is not KVM.
    pub fn extension(&self, capability: libc::c_ulong) -> io::Result<i32> {
        self.ask(KVM_CHECK_EXTENSION, capability)
    }

    /// Makes a virtual machine and drops it.
    ///
    /// # Errors
    /// The processor's virtualisation is disabled or in use, or there is no memory.
    pub fn create_vm(&self) -> io::Result<()> {
        let vm = self.ask(KVM_CREATE_VM, 0)?;
        // SAFETY: the descriptor is new and nobody else owns it; dropping closes it.
        drop(unsafe { OwnedFd::from_raw_fd(vm) });
        Ok(())
    }

    fn ask(&self, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
        // SAFETY: these three requests take an integer and touch no memory of this process.
        let answer = unsafe { libc::ioctl(self.device.as_raw_fd(), request, argument) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(answer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::zombie_processes)] // It is reaped by the function under test.
    fn the_end_of_a_child_is_told_with_what_it_used() {
        let child = Command::new("/bin/sh")
            .args(["-c", "exit 7"])
            .spawn()
            .unwrap();
        let (status, usage) = wait_with_usage(child.id()).unwrap();
        assert_eq!(status.code(), Some(7));
        assert!(usage.max_rss_kib > 0);
        assert!(wait_with_usage(child.id()).is_err());
    }

    #[test]
    fn a_blocked_signal_arrives_as_a_number() {
        let signals = SignalFd::new(&[libc::SIGUSR2]).unwrap();
        assert_eq!(signals.take(), None);
        // To this thread: others of the test process do not block it.
        // SAFETY: raising a signal that is blocked here only marks it pending.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
        assert_eq!(signals.take(), Some(libc::SIGUSR2));
        assert_eq!(signals.take(), None);
    }

    #[test]
    fn a_child_with_a_living_parent_starts() {
        let mut command = Command::new("/bin/true");
        die_with_parent(&mut command);
        assert!(command.status().unwrap().success());
    }
}
