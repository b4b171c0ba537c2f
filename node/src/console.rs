//! The guest's console: served by the VMM, so it works whatever has become of the agent.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use crate::pipe::{self, PipeEnd, Watcher};
use crate::process::DetachKeys;
use crate::process::terminal::RawTerminal;
use crate::registry::Found;
use crate::state::CONSOLE_SOCKET;
use crate::sys::{SIGCONT, SIGTSTP, SIGWINCH, SignalFd};

/// How a console is shown.
#[derive(Debug)]
pub struct View<'a> {
    /// What is typed; `None`: nothing reaches the guest.
    pub input: Option<BorrowedFd<'a>>,
    pub output: BorrowedFd<'a>,
    /// The input is this process's terminal: it becomes raw, and these keys leave.
    pub keys: Option<DetachKeys>,
    /// End it; the terminal is restored.
    pub signals: &'a SignalFd,
}

/// Connects to the console. What the guest wrote last comes first, as far as the VMM keeps it (64 KiB).
///
/// # Errors
/// No VMM serves it.
pub fn dial(found: &Found) -> io::Result<UnixStream> {
    UnixStream::connect(found.socket(CONSOLE_SOCKET).path())
}

/// Shows a console until the guest ends or the user leaves.
///
/// # Errors
/// The terminal cannot be made raw, or the connection broke.
pub fn show(stream: &UnixStream, view: View<'_>) -> io::Result<PipeEnd> {
    let terminal = match view.keys {
        Some(_) => Some(RawTerminal::enter(view.output)?),
        None => None,
    };
    let mut screen = Screen {
        terminal,
        keys: view.keys,
    };
    pipe::connect(
        stream,
        view.input,
        view.output,
        Some(view.signals),
        &mut screen,
    )
}

struct Screen<'a> {
    /// Dropping it restores the user's terminal.
    terminal: Option<RawTerminal<'a>>,
    keys: Option<DetachKeys>,
}

impl Watcher for Screen<'_> {
    fn typed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        match &mut self.keys {
            Some(keys) => !keys.filter(bytes, out),
            None => {
                out.extend_from_slice(bytes);
                true
            }
        }
    }

    fn shown(&mut self, bytes: &[u8]) {
        if let Some(terminal) = &mut self.terminal {
            terminal.follow(bytes);
        }
    }

    fn signalled(&mut self, signal: i32) -> io::Result<bool> {
        let Some(terminal) = &mut self.terminal else {
            return Ok(matches!(signal, SIGWINCH | SIGCONT));
        };
        match signal {
            SIGTSTP => terminal.suspend()?,
            SIGCONT => terminal.resume()?,
            // A console has no size.
            SIGWINCH => {}
            _ => return Ok(false),
        }
        Ok(true)
    }
}
