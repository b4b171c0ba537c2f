//! The guest as a whole: figures, clock, randomness, freezing, events.

use std::time::{Duration, Instant};

use super::{CallError, Connection, Stream};
use crate::v1::{self, reply::Result as Answer, request::Call};

macro_rules! simple {
    ($stream:expr, $call:expr, $doing:literal, $deadline:expr, $pattern:pat => $value:expr) => {
        match Connection::new($stream).call($call, $doing, $deadline)? {
            (_, $pattern) => Ok($value),
            _ => Err(CallError::Unexpected($doing)),
        }
    };
}

/// Figures of the guest; `processes`: also for each process that the host started.
pub fn metrics<S: Stream>(
    stream: S,
    processes: bool,
    deadline: Option<Instant>,
) -> Result<v1::Metrics, CallError> {
    let call = Call::Metrics(v1::GetMetrics { processes });
    simple!(stream, call, "metrics", deadline, Answer::Metrics(metrics) => metrics)
}

/// Counts as activity and does nothing else.
pub fn touch<S: Stream>(stream: S, deadline: Option<Instant>) -> Result<(), CallError> {
    let call = Call::Touch(v1::Touch {});
    simple!(stream, call, "touch", deadline, Answer::Touch(_) => ())
}

/// Sets the guest's clock, nanoseconds since 1970. Returns what it is then.
pub fn set_clock<S: Stream>(
    stream: S,
    unix_ns: u64,
    deadline: Option<Instant>,
) -> Result<u64, CallError> {
    let call = Call::SetClock(v1::SetClock { unix_ns });
    simple!(stream, call, "set clock", deadline, Answer::SetClock(clock) => clock.unix_ns)
}

/// Mixes bytes into the guest's random pool and has it reseed.
pub fn reseed<S: Stream>(
    stream: S,
    seed: Vec<u8>,
    deadline: Option<Instant>,
) -> Result<(), CallError> {
    let call = Call::Reseed(v1::Reseed { seed });
    simple!(stream, call, "reseed", deadline, Answer::Reseed(_) => ())
}

/// Stops all user processes; returns when they are stopped.
pub fn freeze<S: Stream>(
    stream: S,
    limit: Duration,
    file_systems: bool,
    deadline: Option<Instant>,
) -> Result<(), CallError> {
    let call = Call::Freeze(v1::Freeze {
        time_limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        file_systems,
    });
    simple!(stream, call, "freeze", deadline, Answer::Freeze(_) => ())
}

/// Lets them run again.
pub fn thaw<S: Stream>(stream: S, deadline: Option<Instant>) -> Result<(), CallError> {
    let call = Call::Thaw(v1::Thaw {});
    simple!(stream, call, "thaw", deadline, Answer::Thaw(_) => ())
}

/// A guest that has been told who it is now, and whose programs are about to go on.
#[derive(Debug)]
pub struct Adoption<S> {
    connection: Connection<S>,
    adopted: v1::Adopted,
}

impl<S: Stream> Adoption<S> {
    /// Tells it. Returns when everything is set, before programs go on.
    pub fn start(stream: S, call: v1::Adopt, deadline: Option<Instant>) -> Result<Self, CallError> {
        let mut connection = Connection::new(stream);
        match connection.call(Call::Adopt(call), "adopt", deadline)? {
            (_, Answer::Adopt(adopted)) => Ok(Self {
                connection,
                adopted,
            }),
            _ => Err(CallError::Unexpected("adopt")),
        }
    }

    /// What was set, and what could not be.
    pub const fn adopted(&self) -> &v1::Adopted {
        &self.adopted
    }

    /// Waits until programs go on.
    pub fn thawed(mut self, deadline: Option<Instant>) -> Result<v1::Adopted, CallError> {
        let thawed: Option<v1::Thawed> = self.connection.receive("thaw", deadline)?;
        match thawed {
            Some(_) => Ok(self.adopted),
            None => Err(CallError::Closed { doing: "thaw" }),
        }
    }
}

/// Writes everything out.
pub fn sync<S: Stream>(stream: S, deadline: Option<Instant>) -> Result<(), CallError> {
    let call = Call::Sync(v1::Sync {});
    simple!(stream, call, "sync", deadline, Answer::Sync(_) => ())
}

/// Waits until something is so. [`CallError::Refused`] with the code for a deadline: it is not by then.
pub fn wait_for<S: Stream>(
    stream: S,
    wanted: v1::Await,
    deadline: Option<Instant>,
) -> Result<v1::Awaited, CallError> {
    let call = Call::Await(wanted);
    simple!(stream, call, "wait", deadline, Answer::Await(awaited) => awaited)
}

/// A reader of the guest's events.
#[derive(Debug)]
pub struct Events<S> {
    connection: Connection<S>,
    started: v1::EventsStarted,
}

impl<S: Stream> Events<S> {
    /// From event number `from` on (0: the oldest kept), for ever if `follow`.
    pub fn start(
        stream: S,
        from: u64,
        follow: bool,
        deadline: Option<Instant>,
    ) -> Result<Self, CallError> {
        let mut connection = Connection::new(stream);
        let call = Call::Events(v1::FollowEvents { from, follow });
        match connection.call(call, "events", deadline)? {
            (_, Answer::Events(started)) => Ok(Self {
                connection,
                started,
            }),
            _ => Err(CallError::Unexpected("events")),
        }
    }

    /// Which are kept.
    pub const fn started(&self) -> &v1::EventsStarted {
        &self.started
    }

    /// The stream below.
    pub const fn get_ref(&self) -> &S {
        self.connection.get_ref()
    }

    /// The next one; `None` at the end.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<v1::Event>, CallError> {
        self.connection.receive("events", deadline)
    }
}
