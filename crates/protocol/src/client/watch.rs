//! Watches of the guest's files.

use std::time::Instant;

use super::{CallError, Connection, Stream};
use crate::v1::{self, reply::Result as Answer, request::Call};

/// A reader of a watch. The watch itself outlives it, for a while.
#[derive(Debug)]
pub struct WatchReader<S> {
    connection: Connection<S>,
    started: v1::WatchStarted,
}

impl<S: Stream> WatchReader<S> {
    /// Begins a watch, or goes on with one ([`v1::Watch::id`]). [`CallError::Refused`] with the code for "not
    /// found": that one is not kept any more.
    pub fn start(
        stream: S,
        watch: v1::Watch,
        deadline: Option<Instant>,
    ) -> Result<Self, CallError> {
        let mut connection = Connection::new(stream);
        match connection.call(Call::Watch(watch), "watch", deadline)? {
            (_, Answer::Watch(started)) => Ok(Self {
                connection,
                started,
            }),
            _ => Err(CallError::Unexpected("watch")),
        }
    }

    /// Its id and where it begins.
    pub const fn started(&self) -> &v1::WatchStarted {
        &self.started
    }

    /// The stream below.
    pub const fn get_ref(&self) -> &S {
        self.connection.get_ref()
    }

    /// The next event; `None` at the end.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<v1::WatchEvent>, CallError> {
        self.connection.receive("watch", deadline)
    }
}

/// Ends a watch.
pub fn unwatch<S: Stream>(stream: S, id: u64, deadline: Option<Instant>) -> Result<(), CallError> {
    let call = Call::Unwatch(v1::Unwatch { id });
    match Connection::new(stream).call(call, "end of a watch", deadline)? {
        (_, Answer::Unwatch(_)) => Ok(()),
        _ => Err(CallError::Unexpected("end of a watch")),
    }
}
