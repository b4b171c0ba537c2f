//! Console (virtio 1.2 §5.3): one port, always on. It collects the kernel's messages and the
//! agent's log in a scroll-back ring, copies them to an output if one is given, and serves
//! the *detached console socket*: whoever connects gets the scroll-back, then live output, and
//! types into the guest.
mod device;
mod hub;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

pub use device::Console;
pub use hub::{ConsoleHandle, ConsoleStats};

/// What a console is made of.
pub struct ConsoleConfig {
    /// Bytes of scroll-back (at least 8 KiB). All that is kept for anyone.
    pub scrollback: usize,
    /// A file, pipe, terminal or socket that gets a copy. It is never waited for.
    pub output: Option<OwnedFd>,
    /// Most bytes written to an output that is a regular file.
    pub file_limit: u64,
    /// The detached console socket.
    pub listener: Option<UnixListener>,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            scrollback: 256 << 10,
            output: None,
            file_limit: 64 << 20,
            listener: None,
        }
    }
}

#[cfg(test)]
mod tests;
