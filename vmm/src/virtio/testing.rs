//! The driver's side of a device, for tests: guest RAM, split rings written by hand (so that
//! they can lie), one device, and a line that counts interrupts. `hostile` makes up drivers.
//!
//! ```ignore
//! let mut h = Harness::new(device);
//! h.activate(h.device.features());
//! let data = h.alloc(512);
//! let head = h.push(0, &[Buffer::readable(data, 16), Buffer::writable(data, 100)]);
//! h.kick(0).unwrap();
//! assert_eq!(h.take_used(0), [(head, 100)]);
//! assert_eq!(h.interrupts(), 1);
//! ```
use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::device::{
    DeviceError, DeviceIo, DeviceState, Interrupt, InterruptLine, RestoreError, VirtioDevice,
};
use crate::memory::GuestRam;

#[path = "testing_hostile.rs"]
pub mod hostile;

/// Feature bits 28 and 29 (virtio 1.2 §6).
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// RAM of a harness: two regions with a hole between them, as beyond 3 GiB.
pub const LOW_RAM: u64 = 8 << 20;
pub const HIGH_RAM_START: u64 = 1 << 32;
pub const HIGH_RAM: u64 = 1 << 20;

const RINGS_START: u64 = 0x1000;
/// Room for the rings of one queue of up to 1,024 entries: table, available, used.
const RING_STRIDE: u64 = 0x8000;
const AVAIL_OFFSET: u64 = 0x4000;
const USED_OFFSET: u64 = 0x5000;

/// An interrupt line that only counts.
#[derive(Debug, Default)]
pub struct CountingLine(AtomicUsize);

impl InterruptLine for CountingLine {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// One buffer of a well-formed chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

impl Buffer {
    pub fn readable(addr: GuestAddress, len: u32) -> Self {
        Self {
            addr: addr.0,
            len,
            writable: false,
        }
    }

    pub fn writable(addr: GuestAddress, len: u32) -> Self {
        Self {
            addr: addr.0,
            len,
            writable: true,
        }
    }
}

/// A descriptor exactly as it stands in the table, true or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDesc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

struct Ring {
    desc: u64,
    avail: u64,
    used: u64,
    size: u16,
    next_desc: u16,
    avail_idx: Wrapping<u16>,
    seen_used: Wrapping<u16>,
}

/// A device under test with the driver that drives it.
pub struct Harness<D> {
    pub device: D,
    pub mem: GuestRam,
    pub queues: Vec<Queue>,
    pub irq: Interrupt,
    line: Arc<CountingLine>,
    rings: Vec<Ring>,
    next_buffer: u64,
    active: bool,
}

impl<D: VirtioDevice> Harness<D> {
    /// RAM with rings of the device's own sizes laid out. Not activated.
    pub fn new(device: D) -> Self {
        let mem = GuestRam::from_ranges(&[
            (GuestAddress(0), LOW_RAM as usize),
            (GuestAddress(HIGH_RAM_START), HIGH_RAM as usize),
        ])
        .unwrap();
        let line = Arc::new(CountingLine::default());
        let rings: Vec<Ring> = device
            .queue_sizes()
            .iter()
            .zip(0u64..)
            .map(|(&size, index)| {
                assert!(size <= 1024, "the harness lays out up to 1,024 entries");
                let desc = RINGS_START + index * RING_STRIDE;
                Ring {
                    desc,
                    avail: desc + AVAIL_OFFSET,
                    used: desc + USED_OFFSET,
                    size,
                    next_desc: 0,
                    avail_idx: Wrapping(0),
                    seen_used: Wrapping(0),
                }
            })
            .collect();
        let mut harness = Self {
            next_buffer: RINGS_START + rings.len() as u64 * RING_STRIDE,
            device,
            mem,
            queues: Vec::new(),
            irq: Interrupt::new(line.clone()),
            line,
            rings,
            active: false,
        };
        harness.reset_queues();
        harness
    }

    fn reset_queues(&mut self) {
        self.queues.clear();
        for ring in &mut self.rings {
            ring.next_desc = 0;
            ring.avail_idx = Wrapping(0);
            ring.seen_used = Wrapping(0);
            let zeros = [0u8; RING_STRIDE as usize];
            self.mem
                .write_slice(&zeros, GuestAddress(ring.desc))
                .unwrap();
            let mut queue = Queue::new(ring.size).unwrap();
            queue.set_size(ring.size);
            queue.set_desc_table_address(Some(ring.desc as u32), Some(0));
            queue.set_avail_ring_address(Some(ring.avail as u32), Some(0));
            queue.set_used_ring_address(Some(ring.used as u32), Some(0));
            queue.set_ready(true);
            self.queues.push(queue);
        }
    }

    /// DRIVER_OK with `features` agreed.
    pub fn activate(&mut self, features: u64) {
        self.try_activate(features).unwrap();
    }

    pub fn try_activate(&mut self, features: u64) -> Result<(), DeviceError> {
        for queue in &mut self.queues {
            queue.set_event_idx(features & EVENT_IDX != 0);
            assert!(queue.is_valid(&self.mem));
        }
        self.active = true;
        self.with_io(|device, io| device.activate(io, features))
    }

    /// The device becomes one whose driver is up, with `features` agreed.
    pub fn restore(&mut self, features: u64, state: &DeviceState) -> Result<(), RestoreError> {
        for queue in &mut self.queues {
            queue.set_event_idx(features & EVENT_IDX != 0);
        }
        self.active = true;
        self.with_io(|device, io| device.restore(Some(io), features, state))
    }

    /// The driver writes 0 to the status: drained, reset, queues as after power-on.
    pub fn reset(&mut self) {
        if self.active {
            let _ = self.drain();
        }
        self.device.reset();
        self.irq.reset();
        self.reset_queues();
        self.active = false;
    }

    /// Fresh guest RAM, 16-byte aligned.
    pub fn alloc(&mut self, len: u32) -> GuestAddress {
        let addr = self.next_buffer;
        self.next_buffer = (addr + u64::from(len)).next_multiple_of(16);
        assert!(self.next_buffer <= LOW_RAM, "the harness is out of RAM");
        GuestAddress(addr)
    }

    /// Fresh guest RAM that holds `data`.
    pub fn alloc_with(&mut self, data: &[u8]) -> GuestAddress {
        let addr = self.alloc(data.len() as u32);
        self.mem.write_slice(data, addr).unwrap();
        addr
    }

    /// `len` bytes of guest RAM.
    pub fn bytes(&self, addr: GuestAddress, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, addr).unwrap();
        data
    }

    /// Makes a well-formed chain available; returns its head.
    pub fn push(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let head = self.rings[queue].next_desc;
        let descs = self.link(queue, head, buffers);
        self.push_raw(queue, &descs)
    }

    /// The same through an indirect table.
    pub fn push_indirect(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let table = self.alloc(buffers.len() as u32 * 16);
        let count = buffers.len();
        for (i, buffer) in buffers.iter().enumerate() {
            let last = i + 1 == count;
            self.write_desc(
                table,
                i as u16,
                RawDesc {
                    addr: buffer.addr,
                    len: buffer.len,
                    flags: flags(*buffer, last),
                    next: if last { 0 } else { i as u16 + 1 },
                },
            );
        }
        self.push_raw(
            queue,
            &[RawDesc {
                addr: table.0,
                len: count as u32 * 16,
                flags: INDIRECT,
                next: 0,
            }],
        )
    }

    fn link(&self, queue: usize, head: u16, buffers: &[Buffer]) -> Vec<RawDesc> {
        let size = self.rings[queue].size;
        let count = buffers.len();
        buffers
            .iter()
            .zip(0u16..)
            .map(|(buffer, i)| RawDesc {
                addr: buffer.addr,
                len: buffer.len,
                flags: flags(*buffer, usize::from(i) + 1 == count),
                next: (head + i + 1) % size,
            })
            .collect()
    }

    /// Writes `descs` to the next free slots of the table as they are, and makes the first one
    /// available; returns its index. `next` is the caller's: `next_slot` tells where they go.
    pub fn push_raw(&mut self, queue: usize, descs: &[RawDesc]) -> u16 {
        let (table, size, head) = {
            let ring = &self.rings[queue];
            (GuestAddress(ring.desc), ring.size, ring.next_desc)
        };
        for (desc, i) in descs.iter().zip(0u16..) {
            self.write_desc(table, (head + i) % size, *desc);
        }
        self.rings[queue].next_desc = (head + descs.len() as u16) % size;
        self.make_available(queue, head);
        head
    }

    /// The table index where the next chain starts.
    pub fn next_slot(&self, queue: usize) -> u16 {
        self.rings[queue].next_desc
    }

    /// Writes one descriptor to any table.
    pub fn write_desc(&self, table: GuestAddress, index: u16, desc: RawDesc) {
        let raw = RawDescriptor::from(Descriptor::new(desc.addr, desc.len, desc.flags, desc.next));
        self.mem
            .write_obj(raw, GuestAddress(table.0 + u64::from(index) * 16))
            .unwrap();
    }

    /// Puts `head` (whatever it is) into the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.avail_idx.0 % ring.size);
        self.mem
            .write_obj(head, GuestAddress(ring.avail + 4 + 2 * slot))
            .unwrap();
        ring.avail_idx += Wrapping(1);
        let index = ring.avail_idx.0;
        self.set_avail_idx(queue, index);
    }

    /// Writes the available index, true or not.
    pub fn set_avail_idx(&self, queue: usize, index: u16) {
        self.mem
            .write_obj(index, GuestAddress(self.rings[queue].avail + 2))
            .unwrap();
    }

    /// Writes `used_event` (virtio 1.2 §2.7.7): interrupt once the used index passes `index`.
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let ring = &self.rings[queue];
        self.mem
            .write_obj(
                index,
                GuestAddress(ring.avail + 4 + 2 * u64::from(ring.size)),
            )
            .unwrap();
    }

    /// `avail_event`: the device wants a kick once the available index passes it.
    pub fn avail_event(&self, queue: usize) -> u16 {
        let ring = &self.rings[queue];
        self.mem
            .read_obj(GuestAddress(ring.used + 4 + 8 * u64::from(ring.size)))
            .unwrap()
    }

    /// The used index as the device wrote it.
    pub fn used_idx(&self, queue: usize) -> u16 {
        self.mem
            .read_obj(GuestAddress(self.rings[queue].used + 2))
            .unwrap()
    }

    /// The entries of the used ring since the last call: head and bytes written.
    pub fn take_used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let end = Wrapping(self.used_idx(queue));
        let ring = &mut self.rings[queue];
        let mut entries = Vec::new();
        while ring.seen_used != end {
            let slot = u64::from(ring.seen_used.0 % ring.size);
            let entry = ring.used + 4 + 8 * slot;
            let id: u32 = self.mem.read_obj(GuestAddress(entry)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(entry + 4)).unwrap();
            entries.push((id.try_into().unwrap(), len));
            ring.seen_used += Wrapping(1);
        }
        entries
    }

    /// How often the line was raised so far.
    pub fn interrupts(&self) -> usize {
        self.line.0.load(Ordering::SeqCst)
    }

    pub fn kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.with_io(|device, io| device.queue_notified(io, queue))
    }

    pub fn drain(&mut self) -> Result<(), DeviceError> {
        self.with_io(|device, io| device.drain(io))
    }

    pub fn host_ready(&mut self, token: u16) -> Result<(), DeviceError> {
        if self.active {
            self.with_io(|device, io| device.host_ready(Some(io), token))
        } else {
            self.device.host_ready(None, token)
        }
    }

    /// Polls the device's host descriptors for up to `timeout_ms` and serves those that are
    /// readable; returns how many there were.
    pub fn poll_host(&mut self, timeout_ms: i64) -> Result<usize, DeviceError> {
        let events = self.device.host_events();
        let ready = hostile::readable(&events, timeout_ms);
        for token in &ready {
            self.host_ready(*token)?;
        }
        Ok(ready.len())
    }

    pub fn is_active(&self) -> bool {
        self.active
    }

    fn with_io<R>(&mut self, call: impl FnOnce(&mut D, &mut DeviceIo<'_>) -> R) -> R {
        let mut io = DeviceIo {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irq,
        };
        call(&mut self.device, &mut io)
    }
}

fn flags(buffer: Buffer, last: bool) -> u16 {
    let write = if buffer.writable { WRITE } else { 0 };
    write | if last { 0 } else { NEXT }
}
