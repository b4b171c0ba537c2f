//! Streams to ports, and which there are.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, ports};
use belljar_protocol::v1::{self, connect::Target, error::Code};

use common::{Agent, PATIENCE, soon, wait_until};

fn tcp(host: &str, port: u16) -> v1::Connect {
    v1::Connect {
        target: Some(Target::Tcp(v1::TcpTarget {
            host: host.to_owned(),
            port: port.into(),
        })),
        time_limit_ms: 0,
    }
}

fn unix(path: &[u8]) -> v1::Connect {
    v1::Connect {
        target: Some(Target::Unix(path.to_vec())),
        time_limit_ms: 0,
    }
}

fn connect(agent: &Agent, call: v1::Connect) -> UnixStream {
    let (stream, early) = ports::connect(agent.connect(), call, soon()).unwrap();
    assert!(early.is_empty());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn refusal(agent: &Agent, call: v1::Connect) -> (Code, u32, String) {
    match ports::connect(agent.connect(), call, soon()) {
        Err(CallError::Refused {
            code,
            errno,
            message,
        }) => (code, errno, message),
        other => panic!("not refused: {other:?}"),
    }
}

/// Both ways, each end told to the other.
fn talks(mut host: UnixStream, mut target: impl Read + Write, end: impl FnOnce(&mut dyn Write)) {
    host.write_all(b"hello").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut heard = String::new();
    target.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hello");
    target.write_all(b"and to you").unwrap();
    end(&mut target);
    drop(target);
    heard.clear();
    host.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "and to you");
}

#[test]
fn tcp_ports_of_both_loopbacks_are_reached() {
    let agent = Agent::start_worker();
    let before = agent.settled_descriptors();
    for (address, host) in [
        ("127.0.0.1:0", "127.0.0.1"),
        ("127.0.0.1:0", ""),
        ("127.0.0.1:0", "localhost"),
        ("[::1]:0", "::1"),
        ("[::1]:0", ""),
    ] {
        let Ok(listener) = TcpListener::bind(address) else {
            assert!(address.starts_with('['), "no IPv4 here");
            continue;
        };
        let port = listener.local_addr().unwrap().port();
        let stream = connect(&agent, tcp(host, port));
        talks(stream, listener.accept().unwrap().0, |_| {});
    }
    wait_until("all is closed", || agent.open_descriptors() <= before);
}

#[test]
fn unix_sockets_are_reached_by_path_and_by_abstract_name() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let stream = connect(&agent, unix(path.as_os_str().as_encoded_bytes()));
    talks(stream, listener.accept().unwrap().0, |_| {});

    let name = format!("belljar-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let stream = connect(&agent, unix(format!("@{name}").as_bytes()));
    talks(stream, listener.accept().unwrap().0, |_| {});
}

#[test]
fn what_cannot_be_reached_is_told_by_errno() {
    let agent = Agent::start_worker();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let (code, errno, message) = refusal(&agent, tcp("", port));
    assert_eq!((code, errno), (Code::System, 111));
    assert!(message.contains(&format!("127.0.0.1:{port}")), "{message}");
    assert_eq!(refusal(&agent, unix(b"/no/such/socket")).1, 2);
    assert_eq!(refusal(&agent, unix(b"/etc/passwd")).1, 111);
    for invalid in [
        v1::Connect::default(),
        tcp("", 0),
        tcp("example.org", 80),
        unix(b""),
        unix(&[b'x'; 200]),
    ] {
        assert_eq!(refusal(&agent, invalid).0, Code::Invalid);
    }
}

#[test]
fn a_target_that_takes_no_connection_is_given_up_in_time() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full");
    let _listener = UnixListener::bind(&path).unwrap();
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    // Its queue is full when a connection would have to wait.
    let mut queued = Vec::new();
    loop {
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        if rustix::net::connect(&socket, &address).is_err() {
            break;
        }
        queued.push(socket);
    }
    let call = v1::Connect {
        time_limit_ms: 100,
        ..unix(path.as_os_str().as_encoded_bytes())
    };
    let begin = Instant::now();
    assert_eq!(refusal(&agent, call.clone()).0, Code::Deadline);
    assert!(begin.elapsed() >= Duration::from_millis(100));
    // A host that gives up first leaves nothing behind.
    let before = agent.settled_descriptors();
    let given_up = v1::Connect {
        time_limit_ms: 60_000,
        ..call
    };
    let soon = Some(Instant::now() + Duration::from_millis(50));
    ports::connect(agent.connect(), given_up, soon).unwrap_err();
    wait_until("it is given up", || agent.open_descriptors() <= before);
}

#[test]
fn a_stream_does_not_hold_back_others_and_ends_with_its_target() {
    let agent = Agent::start_worker();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // This one is full: nobody reads at its end.
    let mut stuck = connect(&agent, tcp("", port));
    let (_unread, _) = listener.accept().unwrap();
    stuck
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    while stuck.write(&[0; 65536]).is_ok() {}
    let stream = connect(&agent, tcp("", port));
    let (target, _) = listener.accept().unwrap();
    drop(target);
    assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0);
    let before = agent.open_descriptors();
    drop(stuck);
    wait_until("the stuck one ends", || agent.open_descriptors() < before);
    drop(stream);
}

#[test]
fn listening_ports_are_listed_with_their_program() {
    let agent = Agent::start_worker();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let found = || {
        let list = ports::list_ports(agent.connect(), soon()).unwrap();
        list.into_iter().find(|listed| listed.port == port)
    };
    let listed = found().unwrap();
    assert_eq!(listed.address, "127.0.0.1");
    assert_eq!(listed.pid, std::process::id());
    assert!(listed.program.starts_with(b"ports-"), "{listed:?}");
    // Not one that only talks.
    let talking = std::net::TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
    let local = u32::from(talking.local_addr().unwrap().port());
    drop(listener);
    let list = ports::list_ports(agent.connect(), soon()).unwrap();
    assert!(list.iter().all(|l| l.port != port && l.port != local));
}
