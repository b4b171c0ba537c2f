//! How calls travel from the API thread to the machine and answers back. Neither side ever
//! waits for the other.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use rustix::event::{EventfdFlags, eventfd};

use super::{Body, Fault, Request};

/// One call for the machine.
#[derive(Debug)]
pub struct Command {
    pub request: Request,
    /// Descriptors that came with the call, by name: into
    /// [`Configurator::add_descriptors`](super::Configurator::add_descriptors).
    pub fds: Vec<(String, OwnedFd)>,
    /// Must be sent; dropping it answers with a fault.
    pub reply: Reply,
}

/// A counter another thread can poll for.
#[derive(Debug)]
pub(super) struct Waker(OwnedFd);

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    pub(super) fn wake(&self) {
        // Fails only when 2^64-2 wake-ups wait already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn clear(&self) {
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The API thread's end.
#[derive(Clone, Debug)]
pub struct CommandSender {
    queue: Sender<Command>,
    waker: Arc<Waker>,
}

/// The machine's end: its descriptor is readable (level-triggered) while commands may wait.
#[derive(Debug)]
pub struct CommandReceiver {
    queue: Receiver<Command>,
    waker: Arc<Waker>,
}

/// Makes both ends.
pub fn channel() -> io::Result<(CommandSender, CommandReceiver)> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let waker = Arc::new(Waker::new()?);
    Ok((
        CommandSender {
            queue: sender,
            waker: Arc::clone(&waker),
        },
        CommandReceiver {
            queue: receiver,
            waker,
        },
    ))
}

impl CommandSender {
    /// Posts a command; gives it back if the machine is gone. The API posts at most one per
    /// connection, so the queue is bounded.
    pub fn send(&self, command: Command) -> Result<(), Box<Command>> {
        self.queue.send(command).map_err(|e| Box::new(e.0))?;
        self.waker.wake();
        Ok(())
    }
}

impl CommandReceiver {
    /// The next command. Call it until it gives `None`.
    pub fn next_command(&self) -> Option<Command> {
        self.waker.clear();
        match self.queue.try_recv() {
            Ok(command) => {
                // Others may wait behind it.
                self.waker.wake();
                Some(command)
            }
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => None,
        }
    }
}

impl AsFd for CommandReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}

impl AsRawFd for CommandReceiver {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// Which call an answer belongs to; never used again within one process.
pub(super) type CallId = u64;

/// An answer on its way back.
type Answer = (CallId, Result<Body, Fault>);

/// Where the API thread finds answers.
#[derive(Debug)]
pub(super) struct Answers {
    pub(super) queue: Receiver<Answer>,
    pub(super) waker: Arc<Waker>,
    sender: Sender<Answer>,
}

impl Answers {
    pub(super) fn new() -> io::Result<Self> {
        let (sender, queue) = std::sync::mpsc::channel();
        Ok(Self {
            queue,
            waker: Arc::new(Waker::new()?),
            sender,
        })
    }

    pub(super) fn reply_for(&self, call: CallId) -> Reply {
        Reply {
            to: Some((call, self.sender.clone(), Arc::clone(&self.waker))),
        }
    }
}

/// The right and duty to answer one call, once, from any thread.
pub struct Reply {
    to: Option<(CallId, Sender<Answer>, Arc<Waker>)>,
}

impl Reply {
    /// Answers. Never blocks; if the client is gone the answer is dropped.
    pub fn send(mut self, outcome: Result<Body, Fault>) {
        self.finish(outcome);
    }

    /// For calls that have no client (the configuration file), and for tests of the machine.
    pub fn nobody() -> Self {
        Self { to: None }
    }

    fn finish(&mut self, outcome: Result<Body, Fault>) {
        if let Some((call, queue, waker)) = self.to.take() {
            let _ = queue.send((call, outcome));
            waker.wake();
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.finish(Err(Fault::unanswered(
            "The microVM ended before it could answer this call.",
        )));
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reply({:?})", self.to.as_ref().map(|(call, ..)| call))
    }
}
