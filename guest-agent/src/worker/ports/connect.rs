//! Connecting to a port, with a limit of time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, connect, error::Code};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::super::conn::{ConnError, timespec};
use super::super::{Failure, refusal, system_error};

/// A full accept queue of a Unix socket gives no sign when there is room again.
const QUEUE_PAUSE: Duration = Duration::from_millis(2);

/// Where to.
#[derive(Debug)]
pub(in super::super) enum Target {
    /// The first of these addresses that takes it.
    Tcp(Vec<SocketAddr>),
    Unix {
        address: SocketAddrUnix,
        name: String,
    },
}

impl Target {
    /// A port of the guest's own.
    pub(in super::super) fn loopback(port: u16) -> Self {
        let hosts = hosts("").unwrap_or_default().into_iter();
        Self::Tcp(hosts.map(|host| SocketAddr::new(host, port)).collect())
    }

    pub(super) fn from_call(target: Option<connect::Target>) -> Result<Self, v1::Error> {
        let invalid = |message: String| refusal(Code::Invalid, message);
        match target {
            Some(connect::Target::Tcp(tcp)) => {
                let port = u16::try_from(tcp.port).ok().filter(|port| *port != 0);
                let port =
                    port.ok_or_else(|| invalid(format!("target: {} is no TCP port", tcp.port)))?;
                let hosts = hosts(&tcp.host)
                    .ok_or_else(|| invalid(format!("target: {:?} is no IP address", tcp.host)))?;
                let addresses = hosts.into_iter().map(|host| SocketAddr::new(host, port));
                Ok(Self::Tcp(addresses.collect()))
            }
            Some(connect::Target::Unix(path)) => {
                let address = match path.split_first() {
                    Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name),
                    Some(_) => SocketAddrUnix::new(path.as_slice()),
                    None => Err(Errno::INVAL),
                };
                let name = String::from_utf8_lossy(&path).into_owned();
                let address = address
                    .map_err(|_| invalid(format!("target: {name:?} is no Unix socket's path")))?;
                Ok(Self::Unix { address, name })
            }
            None => Err(invalid("target: none is given".to_owned())),
        }
    }
}

/// No names are resolved; there may be nobody to ask.
fn hosts(text: &str) -> Option<Vec<IpAddr>> {
    match text {
        "" | "localhost" => Some(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]),
        text => text.parse().ok().map(|address| vec![address]),
    }
}

/// Connects. Ends early when `host` hangs up.
pub(in super::super) fn connect(
    target: &Target,
    limit: Duration,
    host: BorrowedFd<'_>,
) -> Result<OwnedFd, Failure> {
    let deadline = Instant::now().checked_add(limit);
    match target {
        Target::Unix { address, name } => {
            let made = connect_unix(address, deadline, host);
            made.map_err(|stop| stop.failure(&format!("the Unix socket {name:?}")))
        }
        Target::Tcp(addresses) => {
            let mut first = None;
            for address in addresses {
                match connect_tcp(address, deadline, host) {
                    Ok(stream) => return Ok(stream),
                    Err(Stop::System(error)) => {
                        first.get_or_insert(Stop::System(error).failure(&address.to_string()));
                    }
                    Err(stop) => return Err(stop.failure(&address.to_string())),
                }
            }
            Err(first.unwrap_or_else(|| refusal(Code::Invalid, "target: no address").into()))
        }
    }
}

enum Stop {
    System(Errno),
    Late,
    HungUp,
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Self {
        Self::System(error)
    }
}

impl Stop {
    fn failure(self, target: &str) -> Failure {
        match self {
            Self::System(error) => system_error(format!("connecting to {target}"), error).into(),
            Self::Late => {
                refusal(Code::Deadline, format!("{target} did not answer in time")).into()
            }
            Self::HungUp => ConnError::HungUp.into(),
        }
    }
}

fn connect_tcp(
    address: &SocketAddr,
    deadline: Option<Instant>,
    host: BorrowedFd<'_>,
) -> Result<OwnedFd, Stop> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            wait_connected(socket.as_fd(), deadline, host)?;
            sockopt::socket_error(&socket)??;
        }
        Err(error) => return Err(error.into()),
    }
    // A relay must not add its own delays.
    let _ = sockopt::set_tcp_nodelay(&socket, true);
    Ok(socket)
}

fn connect_unix(
    address: &SocketAddrUnix,
    deadline: Option<Instant>,
    host: BorrowedFd<'_>,
) -> Result<OwnedFd, Stop> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, address) {
            Ok(()) => return Ok(socket),
            Err(Errno::AGAIN) => wait(&mut [], Some(QUEUE_PAUSE), deadline, host)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_connected(
    socket: BorrowedFd<'_>,
    deadline: Option<Instant>,
    host: BorrowedFd<'_>,
) -> Result<(), Stop> {
    loop {
        let mut set = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
        wait(&mut set, None, deadline, host)?;
        if set.iter().any(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
    }
}

/// Waits until one of `set` is ready or `pause` is over.
fn wait<'a>(
    set: &mut [PollFd<'a>],
    pause: Option<Duration>,
    deadline: Option<Instant>,
    host: BorrowedFd<'a>,
) -> Result<(), Stop> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    if left.is_some_and(|left| left.is_zero()) {
        return Err(Stop::Late);
    }
    // No events asked for: only a hang-up of both sides is told.
    let host = PollFd::from_borrowed_fd(host, PollFlags::empty());
    let mut all: Vec<PollFd<'a>> = set.iter().cloned().chain([host]).collect();
    let time = match (left, pause) {
        (Some(left), Some(pause)) => Some(left.min(pause)),
        (left, pause) => left.or(pause),
    };
    match poll(&mut all, time.map(timespec).as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if all.pop().is_some_and(|host| !host.revents().is_empty()) {
        return Err(Stop::HungUp);
    }
    for (place, polled) in set.iter_mut().zip(all) {
        *place = polled;
    }
    Ok(())
}
