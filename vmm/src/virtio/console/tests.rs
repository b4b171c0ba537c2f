use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::device::MAX_WRITE;
use super::hub::INPUT;
use super::{Console, ConsoleConfig, ConsoleHandle};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::hostile::{self, Shape};
use crate::virtio::testing::{Buffer, Harness};

const RX: usize = 0;
const TX: usize = 1;

struct Bench {
    h: Harness<Console>,
    handle: ConsoleHandle,
    dir: tempfile::TempDir,
    page: vm_memory::GuestAddress,
}

impl Bench {
    fn new(config: ConsoleConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("console")).unwrap();
        let console = Console::new(ConsoleConfig {
            listener: Some(listener),
            ..config
        })
        .unwrap();
        let handle = console.handle();
        let mut h = Harness::new(console);
        h.activate(h.device.features());
        let page = h.alloc(1 << 20);
        Self {
            h,
            handle,
            dir,
            page,
        }
    }

    fn connect(&self) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join("console")).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        client
    }

    /// The guest writes `data` in one buffer.
    fn print(&mut self, data: &[u8]) {
        vm_memory::Bytes::write_slice(&self.h.mem, data, self.page).unwrap();
        let head = self
            .h
            .push(TX, &[Buffer::readable(self.page, data.len() as u32)]);
        self.h.kick(TX).unwrap();
        assert_eq!(self.h.take_used(TX), [(head, 0)]);
    }

    /// Serves the host's descriptors until none is ready; fails if that never happens.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.h.poll_host(0).unwrap() == 0 {
                return;
            }
        }
        panic!("a descriptor stays readable: the event loop would spin");
    }

    fn offer_buffer(&mut self, len: u32) -> vm_memory::GuestAddress {
        let buffer = self.h.alloc(len);
        self.h.push(RX, &[Buffer::writable(buffer, len)]);
        self.h.kick(RX).unwrap();
        buffer
    }
}

fn read_exact(client: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    client.read_exact(&mut data).unwrap();
    data
}

#[test]
fn output_goes_to_the_output_the_tail_and_late_clients() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut bench = Bench::new(ConsoleConfig {
        output: Some(file.reopen().unwrap().into()),
        ..ConsoleConfig::default()
    });
    bench.print(b"Linux version\n");
    bench.print(b"agent: ready\n");
    assert_eq!(bench.handle.tail(1, 1024), b"agent: ready\n");
    assert_eq!(
        bench.handle.tail_text(5, 1024),
        "| Linux version\n| agent: ready"
    );
    let mut copy = String::new();
    file.read_to_string(&mut copy).unwrap();
    assert_eq!(copy, "Linux version\nagent: ready\n");

    let mut client = bench.connect();
    bench.settle();
    assert_eq!(read_exact(&mut client, 27), copy.as_bytes());
    bench.print(b"live\n");
    assert_eq!(read_exact(&mut client, 5), b"live\n");
}

#[test]
fn one_batch_larger_than_the_scrollback_reaches_a_reader_that_keeps_up() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut bench = Bench::new(ConsoleConfig {
        scrollback: 0,
        output: Some(file.reopen().unwrap().into()),
        ..ConsoleConfig::default()
    });
    let text: Vec<u8> = (0..32 * 4096u32).map(|i| (i % 251) as u8).collect();
    vm_memory::Bytes::write_slice(&bench.h.mem, &text, bench.page).unwrap();
    for page in 0..32 {
        let addr = vm_memory::GuestAddress(bench.page.0 + page * 4096);
        bench.h.push(TX, &[Buffer::readable(addr, 4096)]);
    }
    bench.h.kick(TX).unwrap();
    let mut copy = Vec::new();
    file.read_to_end(&mut copy).unwrap();
    assert!(copy == text, "{} of {} bytes", copy.len(), text.len());
    assert_eq!(bench.handle.stats().lost_bytes, 0);

    bench.handle.write(&text);
    assert_eq!(bench.handle.stats().lost_bytes, 0);
}

#[test]
fn typing_reaches_the_guest_when_it_has_buffers() {
    let mut bench = Bench::new(ConsoleConfig::default());
    let mut client = bench.connect();
    client.write_all(b"ls\n").unwrap();
    bench.settle();
    assert_eq!(bench.h.take_used(RX), []);
    let buffer = bench.offer_buffer(64);
    assert_eq!(bench.h.take_used(RX), [(0, 3)]);
    assert_eq!(bench.h.bytes(buffer, 3), b"ls\n");

    let (small, large) = (bench.offer_buffer(2), bench.offer_buffer(64));
    client.write_all(b"exit\n").unwrap();
    bench.settle();
    assert_eq!(bench.h.take_used(RX), [(1, 2), (2, 3)]);
    assert_eq!(bench.h.bytes(small, 2), b"ex");
    assert_eq!(bench.h.bytes(large, 3), b"it\n");
    assert_eq!(bench.handle.stats().input_bytes, 8);
}

#[test]
fn a_piped_script_arrives_whole_after_its_client_left() {
    let mut bench = Bench::new(ConsoleConfig::default());
    let script: Vec<u8> = (0..3 * INPUT).map(|i| i as u8).collect();
    let mut client = bench.connect();
    client.write_all(&script).unwrap();
    drop(client);
    let buffers: Vec<_> = (0..16).map(|_| bench.offer_buffer(1024)).collect();
    bench.settle();
    let used = bench.h.take_used(RX);
    let got: Vec<u8> = used
        .iter()
        .flat_map(|(head, len)| bench.h.bytes(buffers[usize::from(*head)], *len as usize))
        .collect();
    assert_eq!(got, script);
    assert_eq!(bench.handle.stats().clients, 0);
}

#[test]
fn clients_wait_while_the_guest_does_not_read() {
    let mut bench = Bench::new(ConsoleConfig::default());
    let mut client = bench.connect();
    client.set_nonblocking(true).unwrap();
    let mut typed = 0;
    loop {
        match client.write(&[b'x'; 4096]) {
            Ok(len) => typed += len,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
        bench.settle();
    }
    assert!(typed > INPUT, "the socket's own buffer holds more");
    assert_eq!(bench.handle.stats().input_bytes, INPUT as u64);
    bench.offer_buffer(1024);
    bench.settle();
    assert_eq!(bench.handle.stats().input_bytes, INPUT as u64 + 1024);
}

/// A peer's bug: output buffered without bound. One client and the output never read.
#[test]
fn a_flood_with_stalled_readers_neither_blocks_nor_grows() {
    let (_pipe_reader, pipe) = rustix::pipe::pipe().unwrap();
    let mut bench = Bench::new(ConsoleConfig {
        scrollback: 32 << 10,
        output: Some(pipe),
        ..ConsoleConfig::default()
    });
    let mut stalled = bench.connect();
    let mut reading = bench.connect();
    bench.settle();
    let mut line = vec![b'.'; 4095];
    line.push(b'\n');
    let start = Instant::now();
    for _ in 0..4096 {
        bench.print(&line);
        bench.settle();
        assert_eq!(read_exact(&mut reading, 4096), line);
    }
    assert!(start.elapsed() < Duration::from_secs(20));
    let stats = bench.handle.stats();
    assert_eq!(stats.output_bytes, 16 << 20);
    assert_eq!(stats.clients, 2);
    assert!(bench.handle.tail(usize::MAX, usize::MAX).len() <= 32 << 10);
    // The stalled client finds what its socket held, then the newest scroll-back.
    stalled.set_nonblocking(true).unwrap();
    let mut got = 0;
    let mut buffer = [0; 4096];
    loop {
        match stalled.read(&mut buffer) {
            Ok(len) => got += len,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                if bench.h.poll_host(0).unwrap() == 0 {
                    break;
                }
            }
            Err(e) => panic!("{e}"),
        }
    }
    let lost = bench.handle.stats().lost_bytes;
    assert!(got < 4 << 20 && lost > 12 << 20, "{got} read, {lost} lost");
}

#[test]
fn clients_come_and_go_within_the_limit() {
    let mut bench = Bench::new(ConsoleConfig::default());
    for _ in 0..3 {
        let mut clients: Vec<UnixStream> = (0..10).map(|_| bench.connect()).collect();
        bench.settle();
        assert_eq!(bench.handle.stats().clients, 8);
        let mut refused = String::new();
        clients[9].read_to_string(&mut refused).unwrap();
        assert!(refused.contains("most clients"), "{refused:?}");
        drop(clients);
        bench.settle();
        assert_eq!(bench.handle.stats().clients, 0);
    }
    assert_eq!(bench.handle.stats().refused_clients, 6);
}

#[test]
fn a_client_that_only_listens_keeps_listening() {
    let mut bench = Bench::new(ConsoleConfig::default());
    let mut client = bench.connect();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    bench.settle();
    bench.print(b"still here\n");
    assert_eq!(read_exact(&mut client, 11), b"still here\n");
}

#[test]
fn nothing_spins_before_the_driver_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("c")).unwrap();
    let (pipe_reader, pipe) = rustix::pipe::pipe().unwrap();
    let console = Console::new(ConsoleConfig {
        listener: Some(listener),
        output: Some(pipe),
        ..ConsoleConfig::default()
    })
    .unwrap();
    let handle = console.handle();
    let mut h = Harness::new(console);
    let mut clients: Vec<_> = (0..10)
        .map(|_| UnixStream::connect(dir.path().join("c")).unwrap())
        .collect();
    for client in clients.iter_mut().take(4) {
        client.write_all(&[b'x'; 6000]).unwrap();
    }
    drop(clients.split_off(5));
    drop(pipe_reader);
    handle.write(&[b'v'; 200_000]);
    let busy = (0..1000).find(|_| h.poll_host(0).unwrap() == 0);
    assert!(busy.is_some(), "descriptors stay readable");
}

#[test]
fn writes_are_cut_at_a_limit() {
    let mut bench = Bench::new(ConsoleConfig::default());
    let buffers = [Buffer::readable(bench.page, 1 << 20); 60];
    bench.h.push_indirect(TX, &buffers);
    bench.h.kick(TX).unwrap();
    let stats = bench.handle.stats();
    assert_eq!(stats.output_bytes, u64::from(MAX_WRITE));
    assert_eq!(stats.truncated_bytes, (60 << 20) - u64::from(MAX_WRITE));
}

#[test]
fn reset_forgets_input_and_keeps_the_scrollback() {
    let mut bench = Bench::new(ConsoleConfig::default());
    bench.print(b"before\n");
    let mut client = bench.connect();
    client.write_all(b"old").unwrap();
    bench.settle();
    bench.h.reset();
    bench.h.activate(bench.h.device.features());
    client.write_all(b"new").unwrap();
    bench.settle();
    let buffer = bench.offer_buffer(16);
    assert_eq!(bench.h.take_used(RX), [(0, 3)]);
    assert_eq!(bench.h.bytes(buffer, 3), b"new");
    assert_eq!(bench.handle.tail(9, 99), b"before\n");
}

/// What clients and the guest do to each other, in any order.
#[derive(Clone, Debug)]
enum Step {
    Connect,
    Type(usize, usize),
    Read(usize),
    ShutDown(usize, bool),
    Leave(usize),
    Print(usize),
    OfferBuffer,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0usize..10;
    prop_oneof![
        3 => Just(Step::Connect),
        4 => (client.clone(), 1usize..9000).prop_map(|(at, len)| Step::Type(at, len)),
        3 => client.clone().prop_map(Step::Read),
        2 => (client.clone(), any::<bool>()).prop_map(|(at, both)| Step::ShutDown(at, both)),
        2 => client.prop_map(Step::Leave),
        4 => (1usize..60_000).prop_map(Step::Print),
        4 => Just(Step::OfferBuffer),
        1 => Just(Step::Reset),
    ]
}

impl Bench {
    fn play(&mut self, clients: &mut Vec<UnixStream>, step: &Step) {
        match step {
            Step::Connect if clients.len() < 10 => {
                let client = self.connect();
                client.set_nonblocking(true).unwrap();
                clients.push(client);
            }
            Step::Type(at, len) => {
                if let Some(client) = clients.get_mut(*at) {
                    // Refused, shut down, or the guest does not read: all are fine here.
                    let _ = client.write(&vec![b't'; *len]);
                }
            }
            Step::Read(at) => {
                if let Some(client) = clients.get_mut(*at) {
                    let _ = client.read(&mut [0; 100_000]);
                }
            }
            Step::ShutDown(at, both) => {
                if let Some(client) = clients.get_mut(*at) {
                    let how = if *both {
                        std::net::Shutdown::Both
                    } else {
                        std::net::Shutdown::Write
                    };
                    let _ = client.shutdown(how);
                }
            }
            Step::Leave(at) if *at < clients.len() => {
                clients.remove(*at);
            }
            Step::Print(len) => self.print(&vec![b'p'; *len]),
            Step::OfferBuffer => {
                self.h.push(RX, &[Buffer::writable(self.page, 512)]);
                self.h.kick(RX).unwrap();
                self.h.take_used(RX);
            }
            Step::Reset => {
                self.h.reset();
                self.h.activate(self.h.device.features());
            }
            Step::Connect | Step::Leave(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Level-triggered descriptors always come to rest, and bounds hold.
    #[test]
    fn no_order_of_events_spins_or_grows(steps in prop::collection::vec(step(), 1..60)) {
        let (_pipe_reader, pipe) = rustix::pipe::pipe().unwrap();
        let mut bench = Bench::new(ConsoleConfig {
            scrollback: 16 << 10,
            output: Some(pipe),
            ..ConsoleConfig::default()
        });
        let mut clients = Vec::new();
        for step in &steps {
            bench.play(&mut clients, step);
            bench.settle();
            let stats = bench.handle.stats();
            prop_assert!(stats.clients <= 8);
            prop_assert!(bench.handle.lock().input.len() <= INPUT);
        }
        clients.clear();
        bench.settle();
        prop_assert_eq!(bench.handle.stats().clients, 0);
    }
}

#[test]
fn hostile_driver() {
    hostile::assault(
        || {
            let console = Console::new(ConsoleConfig::default()).unwrap();
            console.handle().lock().input.extend([b'x'; INPUT]);
            console
        },
        &[
            vec![Shape::readable(b"[    0.000000] Linux version\n")],
            vec![Shape::writable(4096)],
            vec![Shape::readable(&[b'x'; 9000]), Shape::writable(1)],
        ],
    );
}
