//! Ports of a guest on this machine: which there are, and connections to them passed on.

mod forward;
mod spec;

use belljar_protocol::client::ports;
use belljar_protocol::v1;

use crate::guest::{self, GuestError};
use crate::registry::Found;

pub use forward::{ForwardError, Forwarding, MAX_CONNECTIONS, Note};
pub use spec::{Forward, ForwardSyntax, Listen, Target};

/// TCP ports of the guest on which something listens.
///
/// # Errors
/// The sandbox does not run, or its agent does not answer.
pub fn list(found: &Found) -> Result<Vec<v1::Port>, GuestError> {
    guest::call(found, Some(guest::soon()), ports::list_ports)
}

#[cfg(test)]
mod tests;
