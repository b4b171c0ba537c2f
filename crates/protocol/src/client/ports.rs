//! Ports of the guest.

use std::time::Instant;

use super::{CallError, Connection, Stream};
use crate::v1::{self, reply::Result as Answer, request::Call};

/// Makes `stream` the stream to a TCP port or Unix socket of the guest. Returns it with bytes of the
/// target that were read already. A target that cannot be reached is [`CallError::Refused`] with an errno.
pub fn connect<S: Stream>(
    stream: S,
    connect: v1::Connect,
    deadline: Option<Instant>,
) -> Result<(S, Vec<u8>), CallError> {
    let mut connection = Connection::new(stream);
    match connection.call(Call::Connect(connect), "connect", deadline)? {
        (_, Answer::Connect(_)) => Ok(connection.into_parts()),
        _ => Err(CallError::Unexpected("connect")),
    }
}

/// TCP ports of the guest on which something listens.
pub fn list_ports<S: Stream>(
    stream: S,
    deadline: Option<Instant>,
) -> Result<Vec<v1::Port>, CallError> {
    let call = Call::ListPorts(v1::ListPorts {});
    match Connection::new(stream).call(call, "list of ports", deadline)? {
        (_, Answer::Ports(list)) => Ok(list.ports),
        _ => Err(CallError::Unexpected("list of ports")),
    }
}
