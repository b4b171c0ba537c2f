//! From a request to the function that carries it out.

use std::sync::atomic::Ordering;

use belljar_protocol::v1::{self, error::Code, reply::Result as Answer, request::Call};

use super::conn::Conn;
use super::{
    Answered, Context, Outcome, files, ports, process, refusal, system, terminal, wait, watch,
};
use crate::wire::to_holder::Message as Asked;

/// Carries out a call, up to the end of its stream if it has one.
pub(super) fn answer(context: &Context, conn: &mut Conn, request: v1::Request) -> Answered {
    let Some(call) = request.call else {
        return Err(unknown().into());
    };
    if is_activity(&call) {
        context.touch();
    }
    match call {
        Call::Ping(_) => Ok(Outcome::Reply(Answer::Pong(pong(context)))),
        Call::Touch(_) => Ok(Outcome::Reply(Answer::Touch(v1::Touched {}))),
        Call::Shutdown(call) => process::shutdown(context, conn, call),
        Call::Exec(call) => process::exec(context, conn, &call),
        Call::Attach(call) => process::attach(context, conn, call),
        Call::ListProcesses(call) => process::ask(context, Asked::List(call)),
        Call::Inspect(call) => process::ask(context, Asked::Inspect(call)),
        Call::Signal(call) => process::ask(context, Asked::SendSignal(call)),
        Call::WaitEnd(call) => process::wait_end(context, conn, call, request.deadline_ms),
        Call::Forget(call) => process::ask(context, Asked::Forget(call)),
        Call::Resize(call) => process::ask(context, Asked::ResizeProcess(call)),
        Call::Screen(call) => terminal::screen(context, call),
        Call::Metrics(call) => system::metrics(context, call),
        Call::Events(call) => system::events(context, conn, call),
        Call::SetClock(call) => system::set_clock(context, call),
        Call::Reseed(call) => system::reseed(&call),
        Call::Freeze(call) => system::freeze(context, conn, call),
        Call::Thaw(_) => system::thaw(context),
        Call::Adopt(call) => system::adopt(context, conn, call),
        Call::Sync(_) => system::sync(),
        Call::Await(call) => wait::wait(context, conn, call, request.deadline_ms),
        Call::Connect(call) => ports::connect(context, conn, call),
        Call::ListPorts(_) => ports::list(),
        call if files::is_call(&call) => {
            let _change = files::changes(&call)
                .then(system::quiet::change)
                .transpose()?;
            files::answer(context, conn, call)
        }
        Call::Watch(call) => watch::watch(context, conn, &call),
        Call::Unwatch(call) => watch::unwatch(context, call),
        _ => Err(unknown().into()),
    }
}

/// Calls that are served although there is no thread for them: they end at once, and some end others.
pub(super) const fn is_quick(request: &v1::Request) -> bool {
    matches!(
        request.call,
        Some(Call::Ping(_) | Call::Touch(_) | Call::Signal(_) | Call::Shutdown(_))
    )
}

/// Looking at a guest does not keep it awake.
const fn is_activity(call: &Call) -> bool {
    !matches!(
        call,
        Call::Ping(_)
            | Call::Metrics(_)
            | Call::Events(_)
            | Call::ListProcesses(_)
            | Call::Inspect(_)
            | Call::ListPorts(_)
    )
}

fn pong(context: &Context) -> v1::Pong {
    v1::Pong {
        boottime_ns: crate::boot::now_ns(),
        last_activity_ns: context.activity.load(Ordering::Relaxed),
        worker_restarts: context.config.restarts,
        frozen: system::is_guest_frozen(),
    }
}

fn unknown() -> v1::Error {
    refusal(
        Code::Unimplemented,
        "this agent does not know the call; its generation is in this reply",
    )
}
