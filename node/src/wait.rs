//! Waiting until something is so in a guest.

use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, system};
use belljar_protocol::v1::{self, r#await::What, error::Code};

use crate::again;
use crate::guest::GuestError;
use crate::registry::Found;

/// How much later than the agent's own answer its silence is taken for one.
const GRACE: Duration = Duration::from_secs(5);

/// How a wait ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Waited {
    /// It is so.
    So(v1::Awaited),
    /// It was not so in time; what was seen last.
    Late(String),
}

/// Waits until something is so, as long as `limit`. A worker that is replaced meanwhile is asked again.
///
/// # Errors
/// The sandbox does not run, or this cannot be waited for.
pub fn wait_for(found: &Found, what: &What, limit: Option<Duration>) -> Result<Waited, GuestError> {
    let until = limit.and_then(|limit| Instant::now().checked_add(limit));
    let waited = again::call(
        found,
        until.and_then(|until| until.checked_add(GRACE)),
        |stream, deadline| {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let wanted = v1::Await {
                // 0 would be for ever.
                time_limit_ms: left.map_or(0, |left| {
                    u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
                }),
                what: Some(what.clone()),
            };
            system::wait_for(stream, wanted, deadline)
        },
    );
    match waited {
        Ok(awaited) => Ok(Waited::So(awaited)),
        Err(GuestError::Call {
            source:
                CallError::Refused {
                    code: Code::Deadline,
                    message,
                    ..
                },
            ..
        }) => Ok(Waited::Late(message)),
        Err(error) if matches!(what, What::Output(_)) => Err(error.of_process()),
        Err(error) => Err(error),
    }
}
