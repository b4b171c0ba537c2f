//! Pages of guest RAM that cannot be had: whoever touches one gets SIGBUS.
//!
//! The thread that touched it (KVM sends the signal to the thread of a vCPU) goes no further, whatever it was
//! about to do; somebody else is told the address, and ends the process with a message.
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::signal::register_signal_handler;

struct Watched {
    ranges: Vec<Range<u64>>,
    waker: OwnedFd,
}

static WATCHED: OnceLock<Watched> = OnceLock::new();
static ADDRESS: AtomicU64 = AtomicU64::new(0);

/// Watches these addresses of this process for as long as it lives; works once. Returns what becomes readable
/// when one of them could not be had: [`address`] tells which.
pub fn watch(ranges: Vec<Range<u64>>) -> io::Result<BorrowedFd<'static>> {
    let waker = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    if WATCHED.set(Watched { ranges, waker }).is_err() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let kept = WATCHED.get().ok_or(io::ErrorKind::NotFound)?;
    register_signal_handler(libc::SIGBUS, on_bus_error)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    Ok(kept.waker.as_fd())
}

/// The address that could not be had last.
pub fn address() -> u64 {
    ADDRESS.load(Ordering::Acquire)
}

/// Does only what is async-signal-safe.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, and for SIGBUS with an address in it.
    let address = unsafe { (*info).si_addr() } as u64;
    let watched = WATCHED.get();
    if let Some(watched) = watched.filter(|w| w.ranges.iter().any(|r| r.contains(&address))) {
        ADDRESS.store(address, Ordering::Release);
        let _ = rustix::io::write(&watched.waker, &1u64.to_ne_bytes());
        loop {
            // SAFETY: takes nothing; all signals are blocked in here, so that it never returns.
            unsafe { libc::pause() };
        }
    }
    // Somebody else's: as if there were no handler, as soon as this one returns.
    // SAFETY: both take numbers only.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
