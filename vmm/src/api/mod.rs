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

pub mod args;
mod command;
mod configurator;
mod connection;
mod fault;
pub mod http;
mod listener;
mod published;
mod request;
mod routes;
mod server;
#[cfg(test)]
mod tests;

pub use command::{Command, CommandReceiver, CommandSender, Reply, channel};
pub use configurator::{Configurator, Effect, Phase};
pub use fault::{Body, Fault, Status};
pub use listener::BindError;
pub use published::{InstanceState, Published};
pub use request::{Action, Request};
pub use routes::route;
pub use server::{ApiHandle, ApiServer, FIRECRACKER_API_VERSION, ServerOptions, StopHook};
