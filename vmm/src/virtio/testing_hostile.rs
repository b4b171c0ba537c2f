//! Made-up drivers: mostly well-formed requests with rare lies, for every device alike.
//!
//! A device's test says what its requests look like, and `assault` does the rest:
//!
//! ```ignore
//! #[test]
//! fn hostile_driver() {
//!     hostile::assault(|| Rng::new(), &[vec![Shape::writable(64)]]);
//! }
//! ```
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use super::{Buffer, HIGH_RAM, HIGH_RAM_START, Harness, INDIRECT, LOW_RAM, NEXT, RawDesc, WRITE};
use crate::virtio::device::{HostEvent, VirtioDevice};
use virtio_queue::QueueT;
use vm_memory::GuestAddress;

/// Longest any one call may take. Debug builds on loaded machines included.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Most address space that one script may add (KiB). Threads' heaps reserve 128 MiB each.
const MEMORY_LIMIT: u64 = 1 << 20;

/// One buffer of a typical request of a device.
#[derive(Clone, Debug)]
pub struct Shape {
    pub data: Vec<u8>,
    pub len: u32,
    pub writable: bool,
}

impl Shape {
    pub fn readable(data: &[u8]) -> Self {
        Self {
            data: data.to_vec(),
            len: data.len() as u32,
            writable: false,
        }
    }

    pub fn writable(len: u32) -> Self {
        Self {
            data: Vec::new(),
            len,
            writable: true,
        }
    }
}

/// How one descriptor of a request is spoiled.
#[derive(Clone, Copy, Debug)]
pub enum Lie {
    Addr(u64),
    Len(u32),
    Flags(u16),
    Next(u16),
}

#[derive(Clone, Debug)]
pub enum Step {
    /// Request number `shape`, with lies about some descriptors and bytes flipped in what the
    /// device reads.
    Request {
        queue: usize,
        shape: usize,
        lies: Vec<(usize, Lie)>,
        flips: Vec<(usize, u8)>,
        indirect: bool,
    },
    /// A chain as long as the queue over the same buffer, as large as RAM allows.
    Longest {
        queue: usize,
        writable: bool,
        len: u32,
    },
    Head {
        queue: usize,
        head: u16,
    },
    AvailIdx {
        queue: usize,
        index: u16,
    },
    Kick {
        queue: usize,
    },
    WriteConfig {
        offset: u64,
        data: Vec<u8>,
    },
    ReadConfig {
        offset: u64,
        len: usize,
    },
    Host,
    Drain,
    Reset,
    Activate {
        features: u64,
    },
}

fn addr() -> impl Strategy<Value = u64> {
    prop_oneof![
        select(vec![
            0,
            LOW_RAM - 1,
            LOW_RAM,
            HIGH_RAM_START - 1,
            HIGH_RAM_START,
            HIGH_RAM_START + HIGH_RAM - 1,
            u64::MAX,
            u64::MAX - 15,
        ]),
        0..LOW_RAM,
        any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        select(vec![
            0,
            1,
            15,
            16,
            17,
            511,
            512,
            513,
            4096,
            0x7fff_ffff,
            u32::MAX
        ]),
        0..LOW_RAM as u32,
        any::<u32>(),
    ]
}

fn lie() -> impl Strategy<Value = Lie> {
    prop_oneof![
        addr().prop_map(Lie::Addr),
        length().prop_map(Lie::Len),
        (0u16..8).prop_map(Lie::Flags),
        prop_oneof![0u16..8, any::<u16>()].prop_map(Lie::Next),
    ]
}

fn step(queues: usize, shapes: usize) -> impl Strategy<Value = Step> {
    let queue = 0..queues;
    let lies = prop_oneof![
        3 => Just(Vec::new()),
        1 => proptest::collection::vec((0usize..4, lie()), 1..3),
    ];
    let flips = prop_oneof![
        2 => Just(Vec::new()),
        1 => proptest::collection::vec((0usize..64, any::<u8>()), 1..4),
    ];
    prop_oneof![
        12 => (queue.clone(), 0..shapes, lies, flips, any::<bool>()).prop_map(
            |(queue, shape, lies, flips, indirect)| Step::Request { queue, shape, lies, flips, indirect }
        ),
        12 => queue.clone().prop_map(|queue| Step::Kick { queue }),
        1 => (queue.clone(), any::<bool>(), length())
            .prop_map(|(queue, writable, len)| Step::Longest { queue, writable, len }),
        1 => (queue.clone(), any::<u16>()).prop_map(|(queue, head)| Step::Head { queue, head }),
        1 => (queue, any::<u16>()).prop_map(|(queue, index)| Step::AvailIdx { queue, index }),
        1 => (prop_oneof![0u64..64, any::<u64>()], proptest::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::WriteConfig { offset, data }),
        1 => (prop_oneof![0u64..64, any::<u64>()], 0usize..9)
            .prop_map(|(offset, len)| Step::ReadConfig { offset, len }),
        2 => Just(Step::Host),
        1 => Just(Step::Drain),
        1 => Just(Step::Reset),
        2 => any::<u64>().prop_map(|features| Step::Activate { features }),
    ]
}

/// Runs 256 made-up drivers, each against a device from `make`. `shapes` are the device's
/// typical requests. Nothing may panic, take longer than `CALL_LIMIT`, grow without bound, or
/// give back chains that were never made available.
pub fn assault<D: VirtioDevice>(make: impl Fn() -> D, shapes: &[Vec<Shape>]) {
    let queues = make().queue_sizes().len();
    let mut runner = TestRunner::new(Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    });
    let script = proptest::collection::vec(step(queues, shapes.len()), 1..48);
    let outcome = runner.run(&script, |steps| {
        run(make(), shapes, &steps);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// Plays one script against `device`.
pub fn run<D: VirtioDevice>(device: D, shapes: &[Vec<Shape>], steps: &[Step]) {
    let before = peak_memory();
    let mut harness = Harness::new(device);
    let features = harness.device.features();
    harness.activate(features);
    let mut spoilt = false;
    for step in steps {
        let start = Instant::now();
        spoilt = play(&mut harness, shapes, step, spoilt);
        assert!(start.elapsed() < CALL_LIMIT, "{step:?} took too long");
    }
    harness.reset();
    let grown = peak_memory().saturating_sub(before);
    assert!(grown < MEMORY_LIMIT, "the device took {grown} KiB");
}

/// One step; `true` if the device needs a reset. Then the transport leaves its queues alone
/// until the driver resets it.
fn play<D: VirtioDevice>(
    h: &mut Harness<D>,
    shapes: &[Vec<Shape>],
    step: &Step,
    spoilt: bool,
) -> bool {
    let usable = h.is_active() && !spoilt;
    match step {
        Step::Request {
            queue,
            shape,
            lies,
            flips,
            indirect,
        } => {
            request(h, *queue, &shapes[*shape], lies, flips, *indirect);
        }
        Step::Longest {
            queue,
            writable,
            len,
        } => longest(h, *queue, *writable, *len),
        Step::Head { queue, head } => h.make_available(*queue, *head),
        Step::AvailIdx { queue, index } => h.set_avail_idx(*queue, *index),
        Step::Kick { queue } if usable => {
            let before = h.used_idx(*queue);
            let size = h.queues[*queue].size();
            let failed = h.kick(*queue).is_err();
            let done = h.used_idx(*queue).wrapping_sub(before);
            assert!(done <= 2 * size, "{done} requests in one call");
            return failed;
        }
        Step::WriteConfig { offset, data } => h.device.write_config(*offset, data),
        Step::ReadConfig { offset, len } => h.device.read_config(*offset, &mut vec![0; *len]),
        Step::Host if !spoilt => return h.poll_host(0).is_err(),
        Step::Drain if usable => return h.drain().is_err(),
        Step::Reset => {
            h.reset();
            return false;
        }
        Step::Activate { features } if !h.is_active() => {
            let features = h.device.features() & features;
            return h.try_activate(features).is_err();
        }
        Step::Kick { .. } | Step::Host | Step::Drain | Step::Activate { .. } => {}
    }
    spoilt
}

fn request<D: VirtioDevice>(
    h: &mut Harness<D>,
    queue: usize,
    shapes: &[Shape],
    lies: &[(usize, Lie)],
    flips: &[(usize, u8)],
    indirect: bool,
) {
    let head = h.next_slot(queue);
    let size = h.queues[queue].size();
    let mut descs = Vec::new();
    let count = shapes.len();
    // Buffers are small and fixed: scripts must not run the harness out of RAM.
    let mut at = LOW_RAM / 2;
    for (shape, i) in shapes.iter().zip(0u16..) {
        let buffer = Buffer {
            addr: at,
            len: shape.len,
            writable: shape.writable,
        };
        if !shape.data.is_empty() {
            let mut data = shape.data.clone();
            for (offset, bits) in flips {
                if let Some(byte) = data.get_mut(*offset) {
                    *byte ^= bits;
                }
            }
            vm_memory::Bytes::write_slice(&h.mem, &data, GuestAddress(at)).unwrap();
        }
        at += u64::from(shape.len).next_multiple_of(16);
        let last = usize::from(i) + 1 == count;
        descs.push(RawDesc {
            addr: buffer.addr,
            len: buffer.len,
            flags: super::flags(buffer, last),
            next: if indirect {
                i + 1
            } else {
                (head + i + 1) % size
            },
        });
    }
    for (i, lie) in lies {
        if let Some(desc) = descs.get_mut(*i) {
            match *lie {
                Lie::Addr(addr) => desc.addr = addr,
                Lie::Len(len) => desc.len = len,
                Lie::Flags(flags) => desc.flags = flags,
                Lie::Next(next) => desc.next = next,
            }
        }
    }
    if indirect {
        let table = GuestAddress(LOW_RAM / 2 - 0x1000);
        for (desc, i) in descs.iter().zip(0u16..) {
            h.write_desc(table, i, *desc);
        }
        let len = descs.len() as u32 * 16;
        descs = vec![RawDesc {
            addr: table.0,
            len,
            flags: INDIRECT,
            next: 0,
        }];
    }
    h.push_raw(queue, &descs);
}

fn longest<D: VirtioDevice>(h: &mut Harness<D>, queue: usize, writable: bool, len: u32) {
    let head = h.next_slot(queue);
    let size = h.queues[queue].size();
    let write = if writable { WRITE } else { 0 };
    let start = LOW_RAM / 2;
    let len = len.min((LOW_RAM - start) as u32);
    let descs: Vec<RawDesc> = (0..size)
        .map(|i| RawDesc {
            addr: start,
            len,
            flags: write | if i + 1 == size { 0 } else { NEXT },
            next: (head + i + 1) % size,
        })
        .collect();
    h.push_raw(queue, &descs);
}

/// The tokens of those descriptors that are readable within `timeout_ms`.
pub fn readable(events: &[HostEvent], timeout_ms: i64) -> Vec<u16> {
    if events.is_empty() {
        return Vec::new();
    }
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    for event in events {
        epoll
            .ctl(
                vmm_sys_util::epoll::ControlOperation::Add,
                event.fd,
                vmm_sys_util::epoll::EpollEvent::new(
                    vmm_sys_util::epoll::EventSet::IN,
                    u64::from(event.token),
                ),
            )
            .unwrap();
    }
    let mut ready = vec![vmm_sys_util::epoll::EpollEvent::default(); events.len()];
    let count = epoll.wait(timeout_ms as i32, &mut ready).unwrap();
    ready[..count].iter().map(|e| e.data() as u16).collect()
}

/// Peak address space of this process, in KiB. A size that a driver chose shows here even
/// where the memory was never touched.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmPeak:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.trim().parse().ok())
        .unwrap()
}
