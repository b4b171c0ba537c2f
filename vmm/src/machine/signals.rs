//! SIGTERM, SIGINT and SIGHUP end the VMM in order: sockets removed, metrics written. SIGXFSZ
//! must not end it: beyond a file size limit a guest's write is an I/O error.
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

/// The handler may only do what is async-signal-safe: one write.
static ASKED_TO_END: OnceLock<EventFd> = OnceLock::new();

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(waker) = ASKED_TO_END.get() {
        let _ = waker.write(1);
    }
}

extern "C" fn on_ignored(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A descriptor that becomes readable when a signal asks the process to end.
pub(super) fn watch() -> io::Result<RawFd> {
    let waker = match ASKED_TO_END.get() {
        Some(waker) => waker,
        None => {
            let made = EventFd::new(EFD_NONBLOCK)?;
            ASKED_TO_END.get_or_init(|| made)
        }
    };
    let to_io = |e: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(e.errno());
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        register_signal_handler(signal, on_signal).map_err(to_io)?;
    }
    register_signal_handler(libc::SIGXFSZ, on_ignored).map_err(to_io)?;
    Ok(waker.as_raw_fd())
}
