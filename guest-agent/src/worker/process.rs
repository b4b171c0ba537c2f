//! The calls about processes: checks them, and has the holder carry them out.

use std::time::{Duration, Instant};

use belljar_protocol::DEFAULT_GRACE_MS;
use belljar_protocol::v1::{self, error::Code, reply::Result as Answer};
use rustix::fs::{Mode, OFlags};

use super::conn::Conn;
use super::holder::out_of_step;
use super::relay::Relay;
use super::{Answered, Context, Failure, Outcome, refusal};
use crate::exec::plan;
use crate::exec::users::{self, Identity, UserError};
use crate::sys::spawn::{Failure as SpawnFailure, Program, Step};
use crate::wire::{self, Start, from_holder::Message as Said, to_holder::Message as Asked};

/// Most bytes read of `/etc/passwd` and `/etc/group`.
const MAX_FILE: usize = 1 << 20;

/// How long a process is kept after its end, milliseconds: one that somebody may come back to, and
/// any other.
const KEEP_WANTED_MS: u64 = 600_000;
const KEEP_MS: u64 = 60_000;

/// Runs a program, up to its end if it is tied.
pub(super) fn exec(context: &Context, conn: &mut Conn, exec: &v1::Exec) -> Answered {
    let start = match prepare(exec) {
        Ok(start) => start,
        Err(NotPrepared::Invalid(error)) => {
            return Err(refusal(Code::Invalid, error.to_string()).into());
        }
        Err(NotPrepared::NoUser(error)) => {
            return Ok(Outcome::Reply(Answer::SpawnFailure(v1::SpawnFailure {
                kind: error.kind().into(),
                errno: 0,
                message: error.to_string(),
            })));
        }
    };
    let mut channel = context.holder.open()?;
    let is_tied = !start.detached;
    channel.request(&context.holder, Asked::Start(start))?;
    if is_tied {
        // A start may take long: in a guest that is frozen, for instance.
        super::relay::wait_for_either(conn, &channel, None)?;
    }
    match channel.answer()? {
        Said::Started(started) => {
            let reply = Answer::Exec(v1::ExecStarted {
                pid: started.pid,
                id: started.id,
                existed: started.existed,
            });
            if started.existed {
                context.holder.give_back(channel);
                return Ok(Outcome::Reply(reply));
            }
            Relay::new(context, conn, channel).run(&context.head(reply))
        }
        Said::SpawnFailed(failed) => {
            context.holder.give_back(channel);
            let failure = SpawnFailure {
                step: Step::of_number(failed.step),
                errno: i32::try_from(failed.errno).unwrap_or(libc::EIO),
            };
            let failure = plan::failure(&failure, exec);
            Ok(Outcome::Reply(Answer::SpawnFailure(failure)))
        }
        _ => Err(out_of_step()),
    }
}

/// Shows, and lets type into, a process that was started before.
pub(super) fn attach(context: &Context, conn: &mut Conn, attach: v1::Attach) -> Answered {
    let mut channel = context.holder.open()?;
    match channel.ask(&context.holder, Asked::Attach(attach))? {
        Said::Attached(attached) => {
            let head = context.head(Answer::Attach(attached));
            Relay::new(context, conn, channel).run(&head)
        }
        _ => Err(out_of_step()),
    }
}

/// Waits for the end of a process; gives up when the host does.
pub(super) fn wait_end(
    context: &Context,
    conn: &mut Conn,
    wait: v1::WaitEnd,
    deadline_ms: u64,
) -> Answered {
    let now = Instant::now();
    let limits = [wait.time_limit_ms, deadline_ms];
    let limit = limits.into_iter().filter(|limit| *limit != 0).min();
    let deadline = limit.and_then(|limit| now.checked_add(Duration::from_millis(limit)));
    let mut channel = context.holder.open()?;
    let reference = wait.process.unwrap_or_default();
    channel.request(&context.holder, Asked::WaitEnd(reference))?;
    if !super::relay::wait_for_either(conn, &channel, deadline)? {
        return Err(refusal(Code::Deadline, "the process has not ended by then").into());
    }
    match channel.receive(None)? {
        Some(Said::Info(info)) => {
            context.holder.give_back(channel);
            Ok(Outcome::Reply(Answer::WaitEnd(info)))
        }
        Some(Said::Refused(error)) => Err(error.into()),
        _ => Err(out_of_step()),
    }
}

/// Calls with one answer of the holder, which is the reply.
pub(super) fn ask(context: &Context, asked: Asked) -> Answered {
    let answer = match context.holder.ask(asked)? {
        Said::List(list) => Answer::Processes(list),
        Said::Info(info) => Answer::Process(info),
        Said::SignalSent(sent) => Answer::Signal(sent),
        Said::Resized(resized) => Answer::Resize(resized),
        Said::Forgotten(forgotten) => Answer::Forget(forgotten),
        _ => return Err(out_of_step()),
    };
    Ok(Outcome::Reply(answer))
}

/// Begins to end the guest. The channel stays open until the host has hung up: as long as there is one,
/// the holder leaves the power on for a moment, and a reply that is still on its way would be lost with it.
pub(super) fn shutdown(context: &Context, conn: &mut Conn, call: v1::Shutdown) -> Answered {
    context.holder.retire();
    let mut channel = context.holder.open()?;
    match channel.ask(&context.holder, Asked::Shutdown(call))? {
        Said::Shutdown(started) => conn.send(&context.head(Answer::Shutdown(started)))?,
        _ => return Err(out_of_step()),
    }
    super::linger(conn, super::LINGER_TIME);
    Ok(Outcome::Streamed)
}

enum NotPrepared {
    Invalid(plan::Invalid),
    NoUser(UserError),
}

/// From the call to what the holder starts.
fn prepare(exec: &v1::Exec) -> Result<Start, NotPrepared> {
    let identity = identity(exec).map_err(NotPrepared::NoUser)?;
    let program = plan::program(exec, identity).map_err(NotPrepared::Invalid)?;
    let Program {
        candidates,
        argv,
        env,
        cwd,
        ids,
        limits,
        has_terminal: _,
    } = program;
    let bytes = |strings: Vec<std::ffi::CString>| {
        strings
            .into_iter()
            .map(std::ffi::CString::into_bytes)
            .collect()
    };
    let is_wanted = exec.detached || !exec.name.is_empty();
    let keep_ms = if is_wanted { KEEP_WANTED_MS } else { KEEP_MS };
    Ok(Start {
        candidates: bytes(candidates),
        argv: bytes(argv),
        env: bytes(env),
        cwd: cwd.into_bytes(),
        identity: ids.map(|ids| wire::Identity {
            uid: ids.uid,
            gid: ids.gid,
            groups: ids.groups,
        }),
        rlimits: limits
            .into_iter()
            .map(|limit| wire::ResolvedRlimit {
                resource: limit.resource,
                soft: limit.values[0],
                hard: limit.values[1],
            })
            .collect(),
        user: exec.user.clone(),
        stdin: exec.stdin() == v1::exec::Stdin::Stream,
        time_limit_ms: exec.time_limit_ms,
        grace_ms: exec.grace_ms.unwrap_or(DEFAULT_GRACE_MS),
        name: exec.name.clone(),
        replace_ended: exec.replace_ended,
        detached: exec.detached,
        terminal: exec.terminal,
        ring_bytes: exec.ring_bytes,
        limits: exec.limits,
        keep_ms: exec.keep_ms.unwrap_or(keep_ms),
        owner_key: exec.owner_key.clone(),
    })
}

fn identity(exec: &v1::Exec) -> Result<Identity, UserError> {
    let group = || read_small_file("/etc/group");
    let mut identity = match exec.user.as_str() {
        "" => Identity::root(),
        user => users::resolve(user, &read_small_file("/etc/passwd"), &group())?,
    };
    if !exec.groups.is_empty() {
        users::add_groups(&mut identity, &exec.groups, &group())?;
    }
    Ok(identity)
}

/// The content of a regular file up to [`MAX_FILE`] bytes; nothing where it is missing or something
/// else, like a FIFO that would block.
fn read_small_file(path: &str) -> Vec<u8> {
    let mut content = Vec::new();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) else {
        return content;
    };
    let is_file = rustix::fs::fstat(&fd)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file());
    if is_file {
        use std::io::Read;
        let file = std::fs::File::from(fd);
        // What could be read counts.
        let _ = file.take(MAX_FILE as u64).read_to_end(&mut content);
    }
    content
}

/// Why the service of a connection ended early: nothing that anybody could be told.
pub(super) fn hung_up() -> Failure {
    Failure::Gone(super::conn::ConnError::HungUp)
}
