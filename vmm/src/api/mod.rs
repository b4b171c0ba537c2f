//! The control API: HTTP/1.1 with JSON on a Unix socket, Firecracker's where the concept is
//! the same (design, contract 1; `docs/api.md` is the reference).
//!
//! ```text
//!   client ──► server (own thread) ──► http + routes: bytes → Request   (pure)
//!                 ▲        │ CommandSender: queue + eventfd
//!   Reply::send ──┘        ▼
//!                       machine's event loop ──► Configurator: Request → Effect   (pure)
//! ```
//!
//! The thread of the API never touches guest RAM and never waits for the machine: what it can
//! answer from [`Published`] it answers itself, `Stop` goes through a hook that works while the
//! machine is stuck, and a command that the machine does not answer in time gets a fault that
//! says so.

mod command;
mod configurator;
mod fault;
mod published;
mod request;

pub use command::{Command, CommandReceiver, CommandSender, Reply, channel};
pub use configurator::{Configurator, Effect, Phase};
pub use fault::{Body, Fault, Status};
pub use published::{InstanceState, Published};
pub use request::{Action, Request};
