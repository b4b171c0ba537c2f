//! Drivers that lie.
use super::super::credit::BUF_ALLOC;
use super::super::muxer::Counters;
use super::super::packet::*;
use super::super::{RX, TX, Vsock, listen};
use super::guest::*;
use crate::virtio::testing::Buffer;
use crate::virtio::testing::hostile::{self, Shape};

#[test]
fn hostile_driver() {
    let dir = tempfile::tempdir().unwrap();
    let peer = Peer::new(7, 1025);
    let packet = |header: Header, data: &[u8]| {
        vec![Shape::readable(&header.to_bytes()), Shape::readable(data)]
    };
    let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("v_1025")).unwrap();
    let shapes = [
        packet(peer.packet(Op::Request), &[0]),
        packet(peer.data(100), &[7; 100]),
        packet(peer.shutdown(SHUTDOWN_SEND), &[0]),
        packet(peer.packet(Op::Rst), &[0]),
        packet(peer.packet(Op::CreditRequest), &[0]),
        vec![Shape::writable(4096)],
        vec![Shape::writable(44), Shape::writable(1)],
    ];
    let make = || {
        let (listener, dial) = listen(&dir.path().join("v")).unwrap();
        Vsock::new(3, listener, dial, Counters::default()).unwrap()
    };
    hostile::assault(make, &shapes);
}

#[test]
fn packets_between_other_machines_are_dropped() {
    let mut guest = Guest::new();
    let good = Peer::new(7, 1025).packet(Op::Request);
    for (src_cid, dst_cid) in [(4, 2), (2, 2), (3, 3), (3, 0), (3, u64::MAX)] {
        let header = Header {
            src_cid,
            dst_cid,
            ..good
        };
        guest.send(header, &[]);
    }
    assert!(guest.recv().is_empty());
    assert_eq!(guest.h.device.muxer.counters.misaddressed.total(), 5);
}

#[test]
fn unknown_connections_types_and_operations_are_reset() {
    let mut guest = Guest::new();
    let peer = Peer::new(7, 1025);
    let seqpacket = Header {
        kind: 2,
        ..peer.packet(Op::Request)
    };
    let no_operation = Header {
        op: 99,
        ..peer.packet(Op::Request)
    };
    for header in [
        peer.data(0),
        peer.packet(Op::Response),
        peer.packet(Op::CreditUpdate),
        peer.shutdown(SHUTDOWN_BOTH),
        seqpacket,
        no_operation,
    ] {
        guest.send(header, &[]);
        let (reset, _) = guest.recv_one();
        assert_eq!(reset.op, Op::Rst.to_u16());
        assert_eq!((reset.src_port, reset.dst_port), (1025, 7));
        assert_eq!(reset.kind, header.kind);
    }
    guest.send(peer.packet(Op::Rst), &[]);
    assert!(guest.recv().is_empty());
}

#[test]
fn breaking_the_rules_resets_only_that_connection() {
    type Breach = fn(&Peer) -> (Header, Vec<u8>);
    let broken: [Breach; 5] = [
        |peer| (peer.packet(Op::Request), vec![]),
        |peer| (peer.packet(Op::Response), vec![]),
        |peer| {
            (
                Header {
                    op: 0,
                    ..peer.data(0)
                },
                vec![],
            )
        },
        |peer| {
            (
                Header {
                    len: 1 << 30,
                    ..peer.data(0)
                },
                vec![1],
            )
        },
        |peer| {
            (
                peer.data(BUF_ALLOC as usize + 1),
                vec![0; BUF_ALLOC as usize + 1],
            )
        },
    ];
    for make in broken {
        let mut guest = Guest::new();
        let (mut good, good_peer) = guest.connected(1);
        let (mut bad, bad_peer) = guest.connected(2);
        let (header, data) = make(&bad_peer);
        guest.send(header, &data);
        assert_eq!(ops(&guest.recv()), [Op::Rst]);
        assert_eq!(read_now(&mut bad), (vec![], true));
        guest.send(good_peer.data(2), b"ok");
        assert_eq!(read_now(&mut good), (b"ok".to_vec(), false));
    }
}

#[test]
fn data_after_shutdown_is_reset() {
    let mut guest = Guest::new();
    let (mut host, peer) = guest.connected(1);
    guest.send(peer.data(1), b"a");
    guest.send(peer.shutdown(SHUTDOWN_SEND), &[]);
    guest.send(peer.data(1), b"b");
    assert_eq!(ops(&guest.recv()), [Op::Rst]);
    assert_eq!(read_now(&mut host), (b"a".to_vec(), true));
}

#[test]
fn header_and_payload_may_be_split_anywhere() {
    for cut in 1..HEADER_LEN + 3 {
        let mut guest = Guest::new();
        let (mut host, peer) = guest.connected(1);
        let mut bytes = peer.data(3).to_bytes().to_vec();
        bytes.extend_from_slice(b"abc");
        let (front, back) = bytes.split_at(cut);
        let front_addr = guest.h.alloc_with(front);
        let back_addr = guest.h.alloc_with(back);
        guest.h.push(
            TX,
            &[
                Buffer::readable(front_addr, front.len() as u32),
                Buffer::readable(back_addr, back.len() as u32),
            ],
        );
        guest.h.kick(TX).unwrap();
        assert_eq!(read_now(&mut host), (b"abc".to_vec(), false), "cut {cut}");
    }
}

#[test]
fn buffers_too_small_for_the_protocol_need_a_reset() {
    let mut guest = Guest::idle();
    guest.up();
    let addr = guest.h.alloc(64);
    guest.h.push(TX, &[Buffer::readable(addr, 43)]);
    assert!(guest.h.kick(TX).is_err());

    let mut guest = Guest::idle();
    guest.up();
    let addr = guest.h.alloc(64);
    guest.h.push(RX, &[Buffer::writable(addr, 44)]);
    let unknown = Peer::new(1, 1).packet(Op::Response);
    assert!(guest.try_send(unknown, &[]).is_err());
}

#[test]
fn flood_of_resets_and_credit_requests_stays_bounded() {
    let mut guest = Guest::new();
    let (_host, peer) = guest.connected(1);
    guest.h.take_used(TX);
    for _ in 0..5_000 {
        guest.send(peer.packet(Op::CreditRequest), &[]);
        guest.send(Peer::new(1, 1).packet(Op::Rst), &[]);
    }
    // 128 receive buffers were posted; each answer took one, the rest is one owed update.
    let answers = guest.take_rx();
    assert_eq!(answers.len(), 128);
    guest.post_rx(128);
    guest.h.kick(RX).unwrap();
    assert_eq!(ops(&guest.take_rx()), [Op::CreditUpdate]);
}
