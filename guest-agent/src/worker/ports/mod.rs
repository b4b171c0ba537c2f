//! Ports of the guest: streams to them, and which there are.

pub(super) mod connect;
pub(super) mod table;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

use belljar_protocol::relay::relay;
use belljar_protocol::v1::{self, error::Code, reply::Result as Answer};
use rustix::fs::{AtFlags, Dir, Mode, OFlags};

use self::connect::Target;
use self::table::Socket;
use super::conn::Conn;
use super::{Answered, Context, Failure, Outcome, procfs, refusal};

/// How long a connection may take to be made, unless the call says.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Listening sockets told in one reply.
const MAX_PORTS: usize = 8192;

/// Makes the connection the stream to a port.
pub(super) fn connect(context: &Context, conn: &mut Conn, call: v1::Connect) -> Answered {
    let target = Target::from_call(call.target)?;
    let limit = match call.time_limit_ms {
        0 => CONNECT_TIME,
        limit => Duration::from_millis(limit),
    };
    let stream = connect::connect(&target, limit, conn.as_fd())?;
    conn.send(&context.head(Answer::Connect(v1::Connected {})))?;
    let unread = conn.take_unread();
    relay(conn.as_fd(), stream.as_fd(), unread, None, || {
        context.touch();
    });
    Ok(Outcome::Streamed)
}

/// Lists the TCP ports on which something listens.
pub(super) fn list() -> Answered {
    let sockets = listening().map_err(Failure::Refused)?;
    let owners = owners(&sockets);
    let mut ports: Vec<v1::Port> = sockets
        .into_iter()
        .take(MAX_PORTS)
        .map(|socket| {
            let (pid, program) = owners.get(&socket.inode).cloned().unwrap_or_default();
            v1::Port {
                port: socket.port.into(),
                address: socket.address.to_string(),
                pid,
                program,
            }
        })
        .collect();
    ports.sort_by(|a, b| (a.port, &a.address).cmp(&(b.port, &b.address)));
    Ok(Outcome::Reply(Answer::Ports(v1::PortList { ports })))
}

/// Listening TCP sockets of the agent's network namespace.
pub(super) fn listening() -> Result<Vec<Socket>, v1::Error> {
    let mut sockets = Vec::new();
    let mut found = false;
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // A kernel without IPv6 has no tcp6.
        if let Ok(file) = procfs::open(path) {
            found = true;
            table::listening(file, &mut sockets)
                .map_err(|error| refusal(Code::Internal, format!("reading {path}: {error}")))?;
        }
    }
    if found {
        Ok(sockets)
    } else {
        Err(refusal(Code::Internal, "there is no /proc/net/tcp"))
    }
}

/// By inode of the socket: a process that holds it, the one with the lowest id.
fn owners(sockets: &[Socket]) -> HashMap<u64, (u32, Vec<u8>)> {
    let mut owners: HashMap<u64, (u32, Vec<u8>)> = HashMap::new();
    let mut missing: usize = sockets.len();
    for pid in procfs::pids() {
        if missing == 0 {
            break;
        }
        for inode in socket_inodes(pid) {
            if !owners.contains_key(&inode) && sockets.iter().any(|socket| socket.inode == inode) {
                owners.insert(inode, (pid, procfs::program(pid)));
                missing = missing.saturating_sub(1);
            }
        }
    }
    owners
}

/// Inodes of the sockets that a process holds. A process that has gone holds none.
fn socket_inodes(pid: u32) -> Vec<u64> {
    let path = format!("/proc/{pid}/fd");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open(path, flags, Mode::empty()) else {
        return Vec::new();
    };
    let Ok(entries) = Dir::read_from(&folder) else {
        return Vec::new();
    };
    let is_socket = |stat: &rustix::fs::Stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket
    };
    entries
        .flatten()
        .filter_map(|entry| rustix::fs::statat(&folder, entry.file_name(), AtFlags::empty()).ok())
        .filter(is_socket)
        .map(|stat| stat.st_ino)
        .collect()
}
