//! The user's own terminal: raw while a guest's terminal is shown on it, and restored whatever happens.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, Once, PoisonError};
use std::{io, panic};

use belljar_protocol::v1;
use rustix::process::{Pid, Signal};
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use super::modes::Modes;

/// What the terminal was set to, for a panic, after which nothing is dropped.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// The terminal on standard input in raw mode: every key goes to the guest, which echoes. Dropping it
/// restores what was set before, and switches off the modes that the guest's program has left on.
#[derive(Debug)]
pub struct RawTerminal<'a> {
    /// Where the guest's output goes.
    output: BorrowedFd<'a>,
    saved: Termios,
    modes: Modes,
}

/// Whether standard input is a terminal.
#[must_use]
pub fn is_input_terminal() -> bool {
    isatty(stdin())
}

/// The size of the terminal on standard input, or of the one that `output` is.
#[must_use]
pub fn size_of(output: BorrowedFd<'_>) -> Option<v1::Terminal> {
    let size = tcgetwinsize(stdin())
        .or_else(|_| tcgetwinsize(output))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| v1::Terminal {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    })
}

fn restore(saved: &Termios) {
    // At once: waiting for output to drain could wait for ever.
    let _ = tcsetattr(stdin(), OptionalActions::Now, saved);
}

fn saved() -> std::sync::MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> RawTerminal<'a> {
    /// Makes the terminal on standard input raw.
    ///
    /// # Errors
    /// Standard input is no terminal.
    pub fn enter(output: BorrowedFd<'a>) -> io::Result<Self> {
        let settings = tcgetattr(stdin())?;
        HOOK.call_once(|| {
            let earlier = panic::take_hook();
            panic::set_hook(Box::new(move |panicked| {
                if let Some(settings) = saved().take() {
                    restore(&settings);
                }
                earlier(panicked);
            }));
        });
        *saved() = Some(settings.clone());
        let terminal = Self {
            output,
            saved: settings,
            modes: Modes::default(),
        };
        terminal.make_raw()?;
        Ok(terminal)
    }

    fn make_raw(&self) -> io::Result<()> {
        let mut raw = self.saved.clone();
        raw.make_raw();
        Ok(tcsetattr(stdin(), OptionalActions::Now, &raw)?)
    }

    /// Its size now.
    #[must_use]
    pub fn size(&self) -> Option<v1::Terminal> {
        size_of(self.output)
    }

    /// Notes what is about to be written to it.
    pub fn follow(&mut self, output: &[u8]) {
        self.modes.follow(output);
    }

    /// Somebody wants this process stopped: gives the terminal back, stops, and takes it again.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn suspend(&mut self) -> io::Result<()> {
        restore(&self.saved);
        if let Some(own) = Pid::from_raw(i32::try_from(std::process::id()).unwrap_or(0)) {
            rustix::process::kill_process(own, Signal::STOP)?;
        }
        self.make_raw()
    }

    /// After this process was stopped and goes on: a shell has set the terminal for itself meanwhile.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resume(&self) -> io::Result<()> {
        self.make_raw()
    }
}

impl Drop for RawTerminal<'_> {
    fn drop(&mut self) {
        let sequence = self.modes.restore();
        if !sequence.is_empty() {
            let _ = rustix::io::write(self.output.as_fd(), &sequence);
        }
        restore(&self.saved);
        saved().take();
    }
}
