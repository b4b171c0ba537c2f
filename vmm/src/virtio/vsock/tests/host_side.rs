//! Host programs that are slow, rude, early or gone.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::connection::REQUEST_TIMEOUT;
use super::super::host::{GREETING_TIMEOUT, MAX_GREETINGS};
use super::super::muxer::MAX_CONNECTIONS;
use super::super::packet::*;
use super::super::{Dial, RX, listen};
use super::guest::*;
use crate::backend::unix::ListenError;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::hostile;

fn is_closed(socket: &mut UnixStream) -> bool {
    socket.set_nonblocking(true).unwrap();
    read_now(socket).1
}

#[test]
fn connect_to_a_port_nobody_serves_is_closed_at_once() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = guest.recv_one();
    guest.send(request.reset_for(), &[]);
    assert!(is_closed(&mut host));
    assert!(guest.recv().is_empty(), "a reset is not answered");
    assert!(guest.h.device.muxer.is_empty());
}

#[test]
fn guest_that_never_answers_is_given_up() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    guest.recv_one();
    guest.advance(REQUEST_TIMEOUT - 1);
    assert!(!is_closed(&mut host));
    guest.advance(1);
    assert!(is_closed(&mut host));
    assert_eq!(ops(&guest.recv()), [Op::Rst]);
}

/// The transport hands over no queues while it waits for the driver's reset.
#[test]
fn a_device_that_needs_a_reset_still_ends_what_nobody_answers() {
    let mut guest = Guest::new();
    let clock = AtomicU64::new(0);
    let device = &mut guest.h.device;
    device.host.set_clock(Box::new(move || {
        clock.fetch_add(2 * REQUEST_TIMEOUT, Ordering::Relaxed)
    }));
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    for _ in 0..10 {
        let device = &mut guest.h.device;
        hostile::readable(&device.host_events(), 1000);
        device.host_ready(None, 0).unwrap();
        if is_closed(&mut host) {
            return;
        }
    }
    panic!("the host was left waiting");
}

#[test]
fn greeting_may_come_in_pieces_and_with_data_behind_it() {
    let mut guest = Guest::new();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    for piece in ["CON", "NECT 5", "2\nGET"] {
        assert!(guest.recv().is_empty());
        host.write_all(piece.as_bytes()).unwrap();
    }
    let (request, _) = guest.recv_one();
    assert_eq!(request.dst_port, 52);
    host.write_all(b" /index").unwrap();
    let peer = Peer::new(52, request.src_port);
    guest.send(peer.packet(Op::Response), &[]);
    let data: Vec<u8> = guest.recv().into_iter().flat_map(|(_, d)| d).collect();
    assert_eq!(data, b"GET /index");
}

#[test]
fn greeting_has_a_length_and_a_time_limit() {
    let mut guest = Guest::new();
    let mut long = UnixStream::connect(guest.path()).unwrap();
    long.write_all(&[b' '; 32]).unwrap();
    let mut wrong = UnixStream::connect(guest.path()).unwrap();
    wrong.write_all(b"HELO\n").unwrap();
    let mut silent = UnixStream::connect(guest.path()).unwrap();
    guest.pump();
    assert!(is_closed(&mut long) && is_closed(&mut wrong) && !is_closed(&mut silent));
    guest.advance(GREETING_TIMEOUT);
    assert!(is_closed(&mut silent));
}

#[test]
fn silent_connections_are_bounded_and_others_get_through() {
    let mut guest = Guest::new();
    let mut silent: Vec<_> = (0..MAX_GREETINGS + 3)
        .map(|_| {
            let socket = UnixStream::connect(guest.path()).unwrap();
            guest.pump();
            socket
        })
        .collect();
    let open = silent
        .iter_mut()
        .filter_map(|s| (!is_closed(s)).then_some(()));
    assert_eq!(open.count(), MAX_GREETINGS);
    guest.connected(52);
}

#[test]
fn connections_are_bounded_with_a_refusal_on_either_side() {
    let mut guest = Guest::new();
    let listener = guest.listener(1);
    for port in 0..MAX_CONNECTIONS as u32 {
        guest.send(Peer::new(port, 1).packet(Op::Request), &[]);
        guest.recv_one();
        // Taking and dropping them would end the connections.
        std::mem::forget(listener.accept().unwrap());
    }
    guest.send(Peer::new(99_999, 1).packet(Op::Request), &[]);
    assert_eq!(ops(&guest.recv()), [Op::Rst]);
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 9\n").unwrap();
    guest.pump();
    assert!(is_closed(&mut host));
    assert_eq!(guest.h.device.muxer.counters.refused.total(), 2);
    // The driver's reset closes all; there is room again.
    guest.reset();
    guest.up();
    guest.post_rx(128);
    guest.connected(52);
}

#[test]
fn before_the_driver_is_up_connections_wait_without_a_spin() {
    let mut guest = Guest::idle();
    let mut host = UnixStream::connect(guest.path()).unwrap();
    host.write_all(b"CONNECT 52\n").unwrap();
    assert!(!guest.wants_call());
    guest.up();
    guest.post_rx(4);
    assert_eq!(guest.recv_one().0.dst_port, 52);
}

#[test]
fn driver_reset_closes_connections_and_listening_goes_on() {
    let mut guest = Guest::new();
    let (mut host, _) = guest.connected(52);
    guest.reset();
    assert!(read_now(&mut host).1);
    assert!(!guest.wants_call());
    let mut waiting = UnixStream::connect(guest.path()).unwrap();
    waiting.write_all(b"CONNECT 53\n").unwrap();
    assert!(!guest.wants_call(), "nobody can answer yet");
    guest.up();
    guest.post_rx(4);
    assert_eq!(guest.recv_one().0.dst_port, 53);
}

#[test]
fn requests_to_absent_sockets_leave_nothing_behind() {
    // A thousand without a receive buffer, and then some: what is kept is bounded.
    let mut guest = Guest::idle();
    guest.up();
    for port in 0..1_000 {
        guest.send(Peer::new(port, 4_000).packet(Op::Request), &[]);
    }
    assert!(guest.h.device.muxer.is_empty());
    assert_eq!(guest.h.device.muxer.counters.no_listener.total(), 1_000);
    guest.post_rx(128);
    guest.h.kick(RX).unwrap();
    let resets = guest.recv();
    assert_eq!(resets.len(), super::super::muxer::MAX_RESETS);
    assert!(resets.iter().all(|(h, _)| h.op == Op::Rst.to_u16()));
}

#[test]
fn directory_descriptor_names_sockets_by_port() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("_1025")).unwrap();
    let fd = std::fs::File::open(dir.path()).unwrap().into();
    let path = Dial::Under(fd).path(1025).unwrap();
    assert!(path.starts_with("/proc/self/fd"));
    // Only while the directory is open.
    assert!(UnixStream::connect(path).is_err());
    let dial = Dial::Under(std::fs::File::open(dir.path()).unwrap().into());
    let mut client = UnixStream::connect(dial.path(1025).unwrap()).unwrap();
    client.write_all(b"x").unwrap();
    let mut byte = [0];
    listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
    assert!(Dial::Nowhere.path(1025).is_none());
}

#[test]
fn socket_file_in_use_is_refused_stale_is_replaced_ours_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let (live, _) = listen(&path).unwrap();
    assert!(matches!(listen(&path), Err(ListenError::InUse { .. })));
    drop(live);
    assert!(!path.exists());

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves its file");
    let (replaced, _) = listen(&path).unwrap();
    // Somebody else's file under our name stays.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"data").unwrap();
    drop(replaced);
    assert!(matches!(listen(&path), Err(ListenError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");

    let long = dir.path().join("x".repeat(100));
    assert!(matches!(listen(&long), Err(ListenError::TooLong { .. })));
}
