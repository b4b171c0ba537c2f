//! Calls about processes and terminals that are one question and one answer. The long ones, exec and
//! attach, are a machine in `belljar-node`.

use std::time::{Duration, Instant};

use super::{CallError, Connection, Stream};
use crate::v1::{self, reply::Result as Answer, request::Call};

/// Time for an agent to send its answer once the call's own limit has passed.
const PATIENCE: Duration = Duration::from_secs(5);

fn one<S: Stream, T>(
    stream: S,
    call: Call,
    doing: &'static str,
    deadline: Option<Instant>,
    pick: impl FnOnce(Answer) -> Option<T>,
) -> Result<T, CallError> {
    let (_, answer) = Connection::new(stream).call(call, doing, deadline)?;
    pick(answer).ok_or(CallError::Unexpected(doing))
}

/// What runs in the guest, sorted by id; with `ended` also what has ended and is kept.
pub fn list<S: Stream>(
    stream: S,
    ended: bool,
    deadline: Option<Instant>,
) -> Result<Vec<v1::ProcessInfo>, CallError> {
    let call = Call::ListProcesses(v1::ListProcesses { ended });
    one(
        stream,
        call,
        "list processes",
        deadline,
        |answer| match answer {
            Answer::Processes(list) => Some(list.processes),
            _ => None,
        },
    )
}

/// One process.
pub fn inspect<S: Stream>(
    stream: S,
    process: v1::ProcessRef,
    deadline: Option<Instant>,
) -> Result<v1::ProcessInfo, CallError> {
    let process = Some(process);
    let call = Call::Inspect(v1::Inspect { process });
    one(
        stream,
        call,
        "inspect a process",
        deadline,
        |answer| match answer {
            Answer::Process(info) => Some(info),
            _ => None,
        },
    )
}

/// Sends a signal. True: the process had ended before.
pub fn signal<S: Stream>(
    stream: S,
    signal: v1::Signal,
    deadline: Option<Instant>,
) -> Result<bool, CallError> {
    let call = Call::Signal(signal);
    one(
        stream,
        call,
        "signal a process",
        deadline,
        |answer| match answer {
            Answer::Signal(sent) => Some(sent.was_ended),
            _ => None,
        },
    )
}

/// Waits for the end of a process; `None` if it still runs after `limit`.
pub fn wait<S: Stream>(
    stream: S,
    process: v1::ProcessRef,
    limit: Option<Duration>,
) -> Result<Option<v1::ProcessInfo>, CallError> {
    let millis = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let call = Call::WaitEnd(v1::WaitEnd {
        process: Some(process),
        // 0 would mean for ever.
        time_limit_ms: limit.map_or(0, |limit| millis(limit).max(1)),
    });
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit.checked_add(PATIENCE)?));
    // The limit of the call is its own: `deadline_ms` would end it with the same code.
    match one(
        stream,
        call,
        "wait for a process",
        deadline,
        |answer| match answer {
            Answer::WaitEnd(info) => Some(info),
            _ => None,
        },
    ) {
        Ok(info) => Ok(Some(info)),
        Err(CallError::Refused {
            code: v1::error::Code::Deadline,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Drops the record and the output of a process that has ended.
pub fn forget<S: Stream>(
    stream: S,
    process: v1::ProcessRef,
    deadline: Option<Instant>,
) -> Result<(), CallError> {
    let process = Some(process);
    let call = Call::Forget(v1::Forget { process });
    one(stream, call, "forget a process", deadline, |answer| {
        matches!(answer, Answer::Forget(_)).then_some(())
    })
}

/// A terminal's screen as it is now.
pub fn screen<S: Stream>(
    stream: S,
    screen: v1::GetScreen,
    deadline: Option<Instant>,
) -> Result<v1::Screen, CallError> {
    let call = Call::Screen(screen);
    one(
        stream,
        call,
        "read a screen",
        deadline,
        |answer| match answer {
            Answer::Screen(screen) => Some(screen),
            _ => None,
        },
    )
}

/// Sets a terminal's size.
pub fn resize<S: Stream>(
    stream: S,
    process: v1::ProcessRef,
    size: v1::Terminal,
    deadline: Option<Instant>,
) -> Result<(), CallError> {
    let (process, size) = (Some(process), Some(size));
    let call = Call::Resize(v1::Resize { process, size });
    one(stream, call, "resize a terminal", deadline, |answer| {
        matches!(answer, Answer::Resize(_)).then_some(())
    })
}
