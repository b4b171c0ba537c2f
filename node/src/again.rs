//! Reaching a guest again after a connection was cut: the agent's worker may be replaced at any moment.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use belljar_protocol::client::CallError;

use crate::guest::{self, GuestError};
use crate::registry::{ConnectError, Found};

/// Before a connection that broke is made again: a guest that cuts each one is not asked without a pause.
pub(crate) const PAUSE: Duration = Duration::from_millis(2);

/// How long a guest may be out of reach.
const LIMIT: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = PAUSE;
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Whether the connection broke, rather than the call failed.
pub(crate) fn is_cut(error: &CallError) -> bool {
    matches!(
        error,
        CallError::Closed { .. } | CallError::Io { .. } | CallError::Frame { .. }
    )
}

/// Makes a call, and again if the connection breaks before its end, until `deadline` or for half a minute.
/// Only for calls that may be made twice.
///
/// # Errors
/// The sandbox does not run, the guest is out of reach for too long, or the call failed.
pub(crate) fn call<T>(
    found: &Found,
    deadline: Option<Instant>,
    mut call: impl FnMut(UnixStream, Option<Instant>) -> Result<T, CallError>,
) -> Result<T, GuestError> {
    let mut pause = FIRST_PAUSE;
    let mut give_up = None;
    loop {
        let begin = Instant::now();
        let error = match guest::call(found, deadline, &mut call) {
            Err(error) if may_pass(&error) => error,
            other => return other,
        };
        // One that held for a while was a good one.
        if begin.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
            give_up = None;
        }
        let give_up = *give_up.get_or_insert_with(|| begin + LIMIT);
        let late = |at: Instant| Instant::now() + pause >= at;
        if late(give_up) || deadline.is_some_and(late) {
            return Err(error);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn may_pass(error: &GuestError) -> bool {
    match error {
        GuestError::Connect(ConnectError::Guest { .. }) => true,
        GuestError::Connect(_) => false,
        GuestError::Call { source, .. } | GuestError::NoProcess { source, .. } => is_cut(source),
    }
}
