//! File calls: carried out in the thread of the call, with the rights of the user that is asked for.

mod change;
mod copy;
mod info;
mod list;
mod make;
mod path;
mod read;
mod rights;
mod tree;
mod write;
mod xattrs;

use belljar_protocol::v1::{self, error::Code, reply::Result as Answer, request::Call};
use rustix::io::Errno;

use super::conn::Conn;
use super::{Answered, Context, Outcome, refusal, system_error};
use path::GuestPath;
pub(super) use rights::Rights;

/// Whether [`answer`] knows the call.
pub(super) const fn is_call(call: &Call) -> bool {
    matches!(
        call,
        Call::Stat(_)
            | Call::ListDirectory(_)
            | Call::ReadFile(_)
            | Call::WriteFile(_)
            | Call::MakeDirectory(_)
            | Call::Remove(_)
            | Call::Rename(_)
            | Call::Copy(_)
            | Call::MakeLink(_)
            | Call::Change(_)
            | Call::Xattrs(_)
            | Call::StatFs(_)
            | Call::ReadTree(_)
            | Call::WriteTree(_)
    )
}

/// Whether a file call may change something on a drive.
pub(super) const fn changes(call: &Call) -> bool {
    !matches!(
        call,
        Call::Stat(_)
            | Call::ListDirectory(_)
            | Call::ReadFile(_)
            | Call::StatFs(_)
            | Call::ReadTree(_)
    )
}

/// Carries out a file call, up to the end of its stream.
pub(super) fn answer(context: &Context, conn: &mut Conn, call: Call) -> Answered {
    match call {
        Call::Stat(call) => info::stat(&call).map(|info| Outcome::Reply(Answer::Stat(info))),
        Call::ListDirectory(call) => list::list(context, conn, &call),
        Call::ReadFile(call) => read::read(context, conn, &call),
        Call::WriteFile(call) => write::write(context, conn, &call),
        Call::MakeDirectory(call) => changed(make::directory(&call)),
        Call::Remove(call) => changed(make::remove(&call)),
        Call::Rename(call) => changed(make::rename(&call)),
        Call::MakeLink(call) => changed(make::link(&call)),
        Call::Copy(call) => changed(copy::copy(&call)),
        Call::Change(call) => changed(change::change(&call)),
        Call::Xattrs(call) => {
            xattrs::xattrs(&call).map(|list| Outcome::Reply(Answer::Xattrs(list)))
        }
        Call::StatFs(call) => info::stat_fs(&call).map(|info| Outcome::Reply(Answer::StatFs(info))),
        Call::ReadTree(call) => tree::read(context, conn, &call),
        Call::WriteTree(call) => tree::write(context, conn, &call),
        _ => Err(refusal(Code::Unimplemented, "no file call").into()),
    }
}

fn changed(result: Result<(), v1::Error>) -> Answered {
    result?;
    Ok(Outcome::Reply(Answer::Changed(v1::Changed {})))
}

/// A failed system call on a path.
fn failed(doing: &str, path: &GuestPath, errno: Errno) -> v1::Error {
    system_error(format_args!("cannot {doing} {path}"), errno)
}

/// A failure below `path` in a tree.
fn failed_below(path: &GuestPath, error: &belljar_tree::TreeError) -> v1::Error {
    let below = String::from_utf8_lossy(&error.path);
    let doing = error.doing;
    let slash = if below.is_empty() { "" } else { "/" };
    system_error(
        format_args!("cannot {doing} {path}{slash}{below}"),
        error.errno,
    )
}
