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

/// What is said where a page is needed for something else than the guest.
pub const NOT_THERE: &str = "a page of guest RAM cannot be had: its page-fault handler could not give it, or the memory file was cut";

/// Regions of guest RAM, at most: below and above the hole for devices.
const MOST: usize = 2;

/// Addresses that are watched; none where the end is zero.
static WATCHED: [(AtomicU64, AtomicU64); MOST] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; MOST];
static WAKER: OnceLock<OwnedFd> = OnceLock::new();
static ADDRESS: AtomicU64 = AtomicU64::new(0);

/// Watches these addresses of this process, and no others any more. Returns what becomes readable when one of
/// them could not be had: [`address`] tells which.
pub fn watch(ranges: &[Range<u64>]) -> io::Result<BorrowedFd<'static>> {
    if ranges.len() > MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if WAKER.get().is_none() {
        // Lost if another thread was faster.
        let _ = WAKER.set(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    }
    let waker = WAKER.get().ok_or(io::ErrorKind::NotFound)?;
    forget();
    let _ = rustix::io::read(waker, &mut [0; 8]);
    for ((start, end), range) in WATCHED.iter().zip(ranges) {
        start.store(range.start, Ordering::Release);
        end.store(range.end, Ordering::Release);
    }
    register_signal_handler(libc::SIGBUS, on_bus_error)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    Ok(waker.as_fd())
}

/// Watches nothing any more.
pub fn forget() {
    for (_, end) in &WATCHED {
        end.store(0, Ordering::Release);
    }
}

/// In a child, where nobody watches: whoever touches such a page is killed.
pub fn die_of_it() {
    // SAFETY: takes numbers only.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// The address that could not be had last.
pub fn address() -> u64 {
    ADDRESS.load(Ordering::Acquire)
}

/// Does only what is async-signal-safe.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, and for SIGBUS with an address in it.
    let address = unsafe { (*info).si_addr() } as u64;
    let is_watched = WATCHED.iter().any(|(start, end)| {
        let (start, end) = (start.load(Ordering::Acquire), end.load(Ordering::Acquire));
        (start..end).contains(&address)
    });
    if let Some(waker) = WAKER.get().filter(|_| is_watched) {
        ADDRESS.store(address, Ordering::Release);
        let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
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
