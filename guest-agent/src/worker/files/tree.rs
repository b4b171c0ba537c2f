//! Trees as tar streams, both ways.

use std::os::fd::{AsFd, OwnedFd};

use belljar_protocol::transfer::Piece;
use belljar_protocol::v1::{
    self, error::Code, file_chunk, reply::Result as Answer, transfer_result,
};
use belljar_tree::TreeError;
use belljar_tree::pack::{Options, PackError, Root, Sink, pack};
use belljar_tree::problems::Problems;
use belljar_tree::unpack::{self, Rules, UnpackError, Unpacker};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::change::Owner;
use super::info::{Names, describe, file_type, of_descriptor};
use super::path::GuestPath;
use super::read::{READ, Sender};
use super::rights::{Rights, reopen};
use super::write::{Broken, receive, send_result};
use super::{failed, failed_below, make, refusal};
use crate::worker::conn::{Conn, ConnError};
use crate::worker::{Answered, Context, Outcome};

impl Sink for Sender<'_> {
    type Error = ConnError;

    fn space(&mut self) -> &mut [u8] {
        Sender::space(self, u64::MAX)
    }

    fn filled(&mut self, count: usize) -> Result<(), ConnError> {
        Sender::filled(self, count)
    }
}

pub(super) fn read(context: &Context, conn: &mut Conn, call: &v1::ReadTree) -> Answered {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let error = |errno| failed("read", &path, errno);
    let found = rights.find(&path, call.follow).map_err(error)?;
    let what = of_descriptor(found.as_fd()).map_err(error)?;
    let root = match file_type(&what) {
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            Root::Directory(reopen(&found, flags).map_err(error)?)
        }
        FileType::RegularFile => {
            Root::File(reopen(&found, READ.difference(OFlags::NOFOLLOW)).map_err(error)?)
        }
        _ => {
            let (folder, name) = rights.parent(&path)?;
            Root::Node(folder, name)
        }
    };
    drop(found);
    let own_name = || {
        path.split()
            .map_or(b".".to_vec(), |(_, name)| name.into_bytes())
    };
    let options = Options {
        name: match call.name.as_slice() {
            b"" => own_name(),
            name => name.to_vec(),
        },
        xattrs: call.xattrs,
    };
    let info = Some(describe(&what, &mut Names::default()));
    conn.send(&context.head(Answer::ReadTree(v1::TreeStarted { info })))?;
    let mut sender = Sender::new(conn);
    let packed = pack(root, &options, &mut sender);
    let last = match packed {
        Ok(report) => file_chunk::Piece::End(v1::TransferEnd {
            entries: report.entries,
            problems: told(&path, &report.problems),
            problems_total: report.problems.total,
        }),
        Err(PackError::Tree(error)) => file_chunk::Piece::Error(failed_below(&path, &error)),
        Err(PackError::Sink(error)) => return Err(error.into()),
    };
    sender.flush()?;
    sender.conn.send(&v1::FileChunk { piece: Some(last) })?;
    drop(rights);
    Ok(Outcome::Streamed)
}

fn told(path: &GuestPath, problems: &Problems) -> Vec<v1::Error> {
    let told = |error: &TreeError| failed_below(path, error);
    problems.first.iter().map(told).collect()
}

pub(super) fn write(context: &Context, conn: &mut Conn, call: &v1::WriteTree) -> Answered {
    let path = GuestPath::new(&call.path)?;
    let owner = Owner::parse(&call.owner, true)?;
    let rights = Rights::of(&call.user)?;
    let (root, new_root) = open_root(&rights, &path, call.parents, owner)?;
    let rules = Rules {
        owner: match owner {
            Owner {
                user: Some(user),
                group: Some(group),
            } => unpack::Owner::Given(user, group),
            _ if rights.is_root() => unpack::Owner::Stream,
            _ => unpack::Owner::Unpacker,
        },
        mode_mask: 0o7777,
        xattrs: true,
        nodes: true,
        no_replace: call.no_replace,
        new_root,
    };
    conn.send(&context.head(Answer::WriteTree(v1::WriteStarted {})))?;
    let mut unpacker = Unpacker::new(root, rules);
    let fail = |error| explain(&path, error);
    let received = receive(conn, |piece| match piece {
        Piece::Data(data) => unpacker.feed(data).map_err(fail),
        Piece::Hole(_) => Err(refusal(
            Code::Invalid,
            "a tar stream has no holes of its own",
        )),
        Piece::End(_) | Piece::Error(_) => Ok(()),
    });
    let result = match received {
        Ok(()) => unpacker.finish().map_err(fail),
        Err(Broken::Refused(error)) => Err(error),
        Err(Broken::System(errno)) => Err(failed("write", &path, errno)),
        Err(Broken::Gone(error)) => return Err(error.into()),
    };
    let result = match result {
        Ok(report) => transfer_result::Result::Done(v1::WriteDone {
            bytes: report.bytes,
            entries: report.entries,
            problems: told(&path, &report.problems),
            problems_total: report.problems.total,
        }),
        Err(error) => transfer_result::Result::Error(error),
    };
    drop(rights);
    send_result(conn, result)
}

/// The directory, and whether it was made now.
fn open_root(
    rights: &Rights,
    path: &GuestPath,
    parents: bool,
    owner: Owner,
) -> Result<(OwnedFd, bool), v1::Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    match rights.open(path, flags, Mode::empty()) {
        Ok(root) => return Ok((root, false)),
        Err(Errno::NOENT) if parents => {}
        Err(errno) => return Err(failed("unpack into", path, errno)),
    }
    make::directories(rights, path, None, owner)?;
    let root = rights.open(path, flags, Mode::empty());
    root.map(|root| (root, true))
        .map_err(|errno| failed("unpack into", path, errno))
}

fn explain(path: &GuestPath, error: UnpackError) -> v1::Error {
    match error {
        UnpackError::Tree(error) => failed_below(path, &error),
        other => refusal(Code::Invalid, other.to_string()),
    }
}
