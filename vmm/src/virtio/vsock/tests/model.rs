//! Random interleavings of both ends against a model: every byte arrives once, in order, within
//! credit, and the device is quiet whenever nothing can move.
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::credit::BUF_ALLOC;
use super::super::packet::*;
use super::super::{RX, TX};
use super::guest::*;

const STREAMS: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    HostWrites(usize, usize),
    HostReads(usize, usize),
    HostEnds(usize),
    GuestSends(usize, usize),
    GuestTakes(usize, usize),
    GuestEnds(usize),
    GuestPosts(usize),
    Device,
    /// Pause and resume: drained, then every queue looked at.
    Pause,
}

fn step() -> impl Strategy<Value = Step> {
    let stream = 0..STREAMS;
    let len = prop_oneof![1usize..64, 1usize..20_000, Just(64 * 1024usize)];
    prop_oneof![
        6 => (stream.clone(), len.clone()).prop_map(|(s, n)| Step::HostWrites(s, n)),
        6 => (stream.clone(), len.clone()).prop_map(|(s, n)| Step::HostReads(s, n)),
        1 => stream.clone().prop_map(Step::HostEnds),
        8 => (stream.clone(), len.clone()).prop_map(|(s, n)| Step::GuestSends(s, n)),
        6 => (stream.clone(), len).prop_map(|(s, n)| Step::GuestTakes(s, n)),
        1 => stream.prop_map(Step::GuestEnds),
        6 => (1usize..40).prop_map(Step::GuestPosts),
        6 => Just(Step::Device),
        1 => Just(Step::Pause),
    ]
}

/// Byte `at` of what an end of stream `key` sends.
fn pattern(key: usize, at: usize) -> u8 {
    (at.wrapping_mul(31) ^ (at >> 8) ^ (key * 85)) as u8
}

fn bytes(key: usize, from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| pattern(key, at)).collect()
}

struct Stream {
    host: UnixStream,
    peer: Peer,
    key: usize,
    host_sent: usize,
    guest_got: usize,
    guest_sent: usize,
    host_got: usize,
    /// The device's `fwd_cnt` as the guest last saw it.
    host_fwd: usize,
    host_ended: bool,
    guest_ended: bool,
    /// What each end saw of the other's end.
    guest_saw_end: bool,
    host_saw_end: bool,
    closed: bool,
}

struct Model {
    guest: Guest,
    streams: Vec<Stream>,
    by_port: HashMap<u32, usize>,
}

impl Model {
    fn new() -> Self {
        let mut guest = Guest::new();
        let stream = |key: usize| {
            let (host, peer) = guest.connected(key as u32);
            Stream {
                host,
                peer,
                key,
                host_sent: 0,
                guest_got: 0,
                guest_sent: 0,
                host_got: 0,
                host_fwd: 0,
                host_ended: false,
                guest_ended: false,
                guest_saw_end: false,
                host_saw_end: false,
                closed: false,
            }
        };
        let streams: Vec<Stream> = (0..STREAMS).map(stream).collect();
        let by_port = streams.iter().map(|s| (s.peer.guest_port, s.key)).collect();
        Self {
            guest,
            streams,
            by_port,
        }
    }

    fn play(&mut self, step: &Step) {
        match *step {
            Step::HostWrites(s, len) => {
                let stream = &mut self.streams[s];
                if !stream.host_ended {
                    let data = bytes(2 * stream.key, stream.host_sent, len);
                    match stream.host.write(&data) {
                        Ok(written) => stream.host_sent += written,
                        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
                    }
                }
            }
            Step::HostReads(s, len) => self.host_reads(s, len),
            Step::HostEnds(s) => {
                self.streams[s].host.shutdown(Shutdown::Write).unwrap();
                self.streams[s].host_ended = true;
            }
            Step::GuestSends(s, len) => self.guest_sends(s, len),
            Step::GuestTakes(s, len) => {
                let stream = &mut self.streams[s];
                let free = stream.guest_got - stream.peer.fwd_cnt as usize;
                stream.peer.fwd_cnt += len.min(free) as u32;
                if !stream.closed {
                    let update = stream.peer.packet(Op::CreditUpdate);
                    self.guest.send(update, &[]);
                }
            }
            Step::GuestEnds(s) => {
                let stream = &mut self.streams[s];
                if !stream.guest_ended && !stream.closed {
                    stream.guest_ended = true;
                    let end = stream.peer.shutdown(SHUTDOWN_SEND);
                    self.guest.send(end, &[]);
                }
            }
            Step::GuestPosts(count) => {
                self.guest.post_rx(count);
                self.guest.h.kick(RX).unwrap();
            }
            Step::Device => {
                self.guest.pump();
                assert!(!self.guest.wants_call(), "busy");
            }
            Step::Pause => {
                self.guest.h.drain().unwrap();
                for queue in [RX, TX, 2] {
                    self.guest.h.kick(queue).unwrap();
                }
            }
        }
        self.take_packets();
    }

    fn host_reads(&mut self, s: usize, len: usize) {
        let stream = &mut self.streams[s];
        let mut data = vec![0; len];
        match stream.host.read(&mut data) {
            Ok(0) => {
                assert!(stream.guest_ended, "an end nobody asked for");
                assert_eq!(stream.host_got, stream.guest_sent, "an end too early");
                stream.host_saw_end = true;
            }
            Ok(got) => {
                let expected = bytes(2 * stream.key + 1, stream.host_got, got);
                assert!(data[..got] == expected, "host read other bytes");
                stream.host_got += got;
            }
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
        }
    }

    fn guest_sends(&mut self, s: usize, len: usize) {
        let stream = &mut self.streams[s];
        let credit = BUF_ALLOC as usize - (stream.guest_sent - stream.host_fwd);
        let len = len.min(credit);
        if len == 0 || stream.guest_ended || stream.closed {
            return;
        }
        let data = bytes(2 * stream.key + 1, stream.guest_sent, len);
        stream.guest_sent += len;
        let header = stream.peer.data(len);
        self.guest.send(header, &data);
    }

    fn take_packets(&mut self) {
        for (header, data) in self.guest.take_rx() {
            let stream = &mut self.streams[self.by_port[&header.dst_port]];
            let op = Op::from_u16(header.op).unwrap();
            if op != Op::Rst {
                assert_eq!(header.buf_alloc, BUF_ALLOC);
                let fwd_cnt = header.fwd_cnt as usize;
                assert!(fwd_cnt >= stream.host_fwd && fwd_cnt <= stream.guest_sent);
                stream.host_fwd = fwd_cnt;
            }
            match op {
                Op::Rw => {
                    assert!(!stream.guest_saw_end, "data after the end");
                    let expected = bytes(2 * stream.key, stream.guest_got, data.len());
                    assert!(data == expected, "guest read other bytes");
                    stream.guest_got += data.len();
                    let held = stream.guest_got - stream.peer.fwd_cnt as usize;
                    assert!(held <= GUEST_BUF as usize, "more than the guest's credit");
                }
                Op::Shutdown => {
                    assert!(stream.host_ended, "an end nobody asked for");
                    assert_eq!(stream.guest_got, stream.host_sent, "an end too early");
                    stream.guest_saw_end = true;
                    if header.flags == SHUTDOWN_BOTH && !stream.closed {
                        stream.closed = true;
                        let reset = stream.peer.packet(Op::Rst);
                        self.guest.send(reset, &[]);
                    }
                }
                Op::CreditRequest => {
                    let update = stream.peer.packet(Op::CreditUpdate);
                    self.guest.send(update, &[]);
                }
                Op::CreditUpdate => {}
                Op::Request | Op::Response | Op::Rst => panic!("{op:?}"),
            }
        }
    }

    /// Lets both ends take all there is.
    fn finish(&mut self) {
        for _ in 0..400 {
            self.play(&Step::GuestPosts(128));
            for s in 0..STREAMS {
                self.play(&Step::GuestTakes(s, usize::MAX));
                self.play(&Step::HostReads(s, 1 << 20));
            }
            self.play(&Step::Device);
            let done = |s: &Stream| {
                (s.host_got, s.host_saw_end) == (s.guest_sent, s.guest_ended)
                    && (s.guest_got, s.guest_saw_end) == (s.host_sent, s.host_ended)
            };
            if self.streams.iter().all(done) {
                break;
            }
        }
        for stream in &self.streams {
            assert_eq!(stream.guest_sent, stream.host_got, "stuck to the host");
            assert_eq!(stream.host_sent, stream.guest_got, "stuck to the guest");
            assert_eq!(stream.host_ended, stream.guest_saw_end);
            assert_eq!(stream.guest_ended, stream.host_saw_end);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 128,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn streams_deliver_every_byte_once_and_in_order(
        steps in proptest::collection::vec(step(), 1..160),
    ) {
        let mut model = Model::new();
        for step in &steps {
            model.play(step);
        }
        model.finish();
    }

    /// The driver resets the device after any step: hosts see their end, nothing is kept,
    /// nothing spins, and the next connection works.
    #[test]
    fn reset_at_every_step_leaves_nothing_behind(
        steps in proptest::collection::vec(step(), 0..40),
    ) {
        let mut model = Model::new();
        for step in &steps {
            model.play(step);
        }
        let mut guest = model.guest;
        guest.reset();
        prop_assert!(guest.h.device.muxer.is_empty());
        prop_assert!(!guest.wants_call());
        for stream in &mut model.streams {
            prop_assert!(read_now(&mut stream.host).1);
        }
        guest.up();
        guest.post_rx(128);
        let (mut host, peer) = guest.connected(9);
        guest.send(peer.data(3), b"new");
        prop_assert_eq!(read_now(&mut host).0, b"new");
    }
}
