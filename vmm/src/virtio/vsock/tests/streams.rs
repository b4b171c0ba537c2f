//! Bytes, ends and stalls of established connections.
use std::io::Write;
use std::net::Shutdown;

use super::super::packet::*;
use super::guest::*;

#[test]
fn host_connects_and_bytes_echo() {
    let mut guest = Guest::new();
    let (mut host, mut peer) = guest.connected(52);
    host.write_all(b"hello, guest").unwrap();
    let (header, data) = guest.recv_one();
    assert_eq!(header.op, Op::Rw.to_u16());
    assert_eq!(data, b"hello, guest");
    peer.fwd_cnt += 12;
    guest.send(peer.data(12), &data);
    assert_eq!(read_now(&mut host), (b"hello, guest".to_vec(), false));
    assert!(!guest.wants_call());
}

#[test]
fn guest_reaches_a_listener_by_port() {
    let mut guest = Guest::new();
    let listener = guest.listener(1025);
    let peer = Peer::new(7000, 1025);
    let mut host = guest.dialled(&listener, &peer);
    guest.send(peer.data(5), b"ready");
    assert_eq!(read_now(&mut host), (b"ready".to_vec(), false));
    host.write_all(b"go").unwrap();
    assert_eq!(guest.recv_one().1, b"go");
}

#[test]
fn guest_close_flushes_and_is_confirmed() {
    let mut guest = Guest::new();
    let (mut host, peer) = guest.connected(52);
    guest.send(peer.data(3), b"end");
    guest.send(peer.shutdown(SHUTDOWN_BOTH), &[]);
    assert_eq!(ops(&guest.recv()), [Op::Rst]);
    assert_eq!(read_now(&mut host), (b"end".to_vec(), true));
}

#[test]
fn host_close_is_a_full_shutdown() {
    let mut guest = Guest::new();
    let (mut host, peer) = guest.connected(52);
    host.write_all(b"last").unwrap();
    drop(host);
    let packets = guest.recv();
    assert_eq!(ops(&packets), [Op::Rw, Op::Shutdown]);
    assert_eq!(packets[0].1, b"last");
    assert_eq!(packets[1].0.flags, SHUTDOWN_BOTH);
    guest.send(peer.packet(Op::Rst), &[]);
    assert!(guest.recv().is_empty());
    assert!(guest.h.device.muxer.is_empty());
}

#[test]
fn half_close_works_both_ways() {
    let mut guest = Guest::new();
    let (mut host, peer) = guest.connected(52);
    host.write_all(b"request").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let packets = guest.recv();
    assert_eq!(ops(&packets), [Op::Rw, Op::Shutdown]);
    assert_eq!(packets[1].0.flags, SHUTDOWN_SEND);
    guest.send(peer.data(6), b"answer");
    guest.send(peer.shutdown(SHUTDOWN_SEND), &[]);
    assert_eq!(read_now(&mut host), (b"answer".to_vec(), true));
    let (last, _) = guest.recv_one();
    assert_eq!(
        (last.op, last.flags),
        (Op::Shutdown.to_u16(), SHUTDOWN_BOTH)
    );
}
