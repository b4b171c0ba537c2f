//! Bytes, ends and stalls of established connections.
use std::io::Write;
use std::net::Shutdown;

use super::super::credit::BUF_ALLOC;
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

/// Named after a peer's bug: a stalled direction made the event loop spin.
#[test]
fn no_busy_spin_while_the_guest_gives_no_buffers_or_credit() {
    let mut guest = Guest::new();
    let (mut host, mut peer) = guest.connected(52);
    let data = vec![9; 200_000];
    let mut written = host.write(&data).unwrap();
    let first = guest.recv();
    let got: usize = first.iter().map(|(_, d)| d.len()).sum();
    assert_eq!(got, GUEST_BUF as usize, "exactly the guest's credit");
    assert_eq!(first.last().unwrap().0.op, Op::CreditRequest.to_u16());
    assert!(!guest.wants_call());
    // The host goes on writing: each write may wake the device, but only once.
    written += host.write(&data).unwrap_or(0);
    guest.pump();
    assert!(!guest.wants_call());
    drop(host);
    guest.pump();
    assert!(!guest.wants_call(), "not even for a closed socket");

    let mut total = got;
    let mut last = Op::Rw;
    while last != Op::Shutdown {
        peer.fwd_cnt = total as u32;
        guest.send(peer.packet(Op::CreditUpdate), &[]);
        let packets = guest.recv();
        total += packets.iter().map(|(_, d)| d.len()).sum::<usize>();
        last = *ops(&packets).last().expect("no progress");
    }
    assert_eq!(total, written);
}

/// Named after a peer's bug: stuck after a stall.
#[test]
fn slow_host_reader_stalls_only_itself_and_gets_every_byte() {
    let mut guest = Guest::new();
    let (mut slow, slow_peer) = guest.connected(1);
    let (mut quick, quick_peer) = guest.connected(2);
    let chunk: Vec<u8> = (0..32 * 1024).map(|i| (i % 251) as u8).collect();
    let mut sent = Vec::new();
    let mut free = BUF_ALLOC as usize;
    while free >= chunk.len() {
        guest.send(slow_peer.data(chunk.len()), &chunk);
        sent.extend_from_slice(&chunk);
        free -= chunk.len();
        for (header, _) in guest.recv() {
            assert_eq!(header.op, Op::CreditUpdate.to_u16());
            free = BUF_ALLOC as usize - (sent.len() - header.fwd_cnt as usize);
        }
    }
    assert!(sent.len() > BUF_ALLOC as usize, "the socket took some");
    guest.send(slow_peer.shutdown(SHUTDOWN_SEND), &[]);
    guest.send(quick_peer.data(5), b"quick");
    assert_eq!(read_now(&mut quick).0, b"quick");
    assert!(!guest.wants_call());

    let mut got = Vec::new();
    loop {
        let (bytes, ended) = read_now(&mut slow);
        got.extend_from_slice(&bytes);
        if ended {
            break;
        }
        assert!(
            !bytes.is_empty(),
            "stuck at {} of {}",
            got.len(),
            sent.len()
        );
        guest.pump();
    }
    assert!(got == sent);
}

/// Named after a peer's bug: bytes in flight were lost at a close.
#[test]
fn tx_in_flight_survives_the_guests_close() {
    for close in [Op::Shutdown, Op::Rst] {
        let mut guest = Guest::new();
        let (mut host, peer) = guest.connected(1);
        let data: Vec<u8> = (0..BUF_ALLOC).map(|i| (i % 249) as u8).collect();
        guest.send(peer.data(data.len()), &data);
        let flags = SHUTDOWN_BOTH;
        guest.send(
            Header {
                flags,
                ..peer.packet(close)
            },
            &[],
        );
        // The guest may take the same ports again at once.
        guest.send(peer.packet(Op::CreditRequest), &[]);
        let mut got = Vec::new();
        let mut ended = false;
        while !ended {
            let (bytes, end) = read_now(&mut host);
            assert!(end || !bytes.is_empty(), "stuck at {}", got.len());
            got.extend_from_slice(&bytes);
            ended = end;
            guest.pump();
        }
        assert!(got == data);
        assert!(guest.h.device.muxer.is_empty());
    }
}

#[test]
fn streams_share_the_receive_buffers_fairly() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..4).map(|port| guest.connected(port)).collect();
    guest.recv();
    // All buffers are posted; take them away to let data pile up, then give some back.
    guest.reset();
    guest.up();
    streams.clear();
    guest.post_rx(16);
    let mut streams: Vec<_> = (0..4).map(|port| guest.connected(port)).collect();
    guest.h.take_used(0);
    for (host, _) in &mut streams {
        let _ = host.write(&[1; 60_000]).unwrap();
    }
    guest.h.poll_host(0).unwrap();
    let packets = guest.take_rx();
    let mut ports: Vec<u32> = packets.iter().map(|(h, _)| h.dst_port).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports, [0, 1, 2, 3], "each had a turn");
}

#[test]
fn guest_that_takes_no_more_fails_the_hosts_writes() {
    let mut guest = Guest::new();
    let (mut host, peer) = guest.connected(1);
    guest.send(peer.shutdown(SHUTDOWN_RCV), &[]);
    let error = host.write(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    guest.send(peer.data(3), b"yes");
    assert_eq!(read_now(&mut host).0, b"yes");
}

#[test]
fn host_that_takes_no_more_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let (mut host, peer) = guest.connected(1);
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(peer.data(3), b"noo");
    let (shutdown, _) = guest.recv_one();
    assert_eq!(
        (shutdown.op, shutdown.flags),
        (Op::Shutdown.to_u16(), SHUTDOWN_RCV)
    );
    host.write_all(b"still").unwrap();
    assert_eq!(guest.recv_one().1, b"still");
}

/// Descriptors and resident KiB of this process, in which other tests may run, too.
fn held() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
    (descriptors, resident * 4)
}

/// A hundred thousand with `BELLJAR_SOAK=1`.
#[test]
fn many_calls_leave_nothing_behind() {
    let calls = match std::env::var_os("BELLJAR_SOAK") {
        Some(_) => 100_000,
        None => 10_000,
    };
    let mut guest = Guest::new();
    let mut before = (0, 0);
    for number in 0..calls {
        if number == 1_000 {
            before = held();
        }
        let (mut host, mut peer) = guest.connected(52);
        host.write_all(b"call").unwrap();
        assert_eq!(guest.recv_one().1, b"call");
        peer.fwd_cnt += 4;
        guest.send(peer.data(5), b"reply");
        assert_eq!(read_now(&mut host), (b"reply".to_vec(), false));
        if number % 2 == 0 {
            guest.send(peer.shutdown(SHUTDOWN_BOTH), &[]);
            assert_eq!(ops(&guest.recv()), [Op::Rst]);
            assert_eq!(read_now(&mut host), (Vec::new(), true));
        } else {
            drop(host);
            assert_eq!(ops(&guest.recv()), [Op::Shutdown]);
            guest.send(peer.packet(Op::Rst), &[]);
        }
        assert!(guest.h.device.muxer.is_empty());
    }
    let after = held();
    // Other tests may hold something, too, but not so much.
    assert!(after.0 < before.0 + calls / 20, "{before:?}, {after:?}");
    assert!(after.1 < before.1 + (64 << 10), "{before:?}, {after:?}");
}
