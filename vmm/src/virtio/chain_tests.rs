use super::*;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::hostile::{self, Shape};
use crate::virtio::testing::{Buffer, EVENT_IDX, Harness, INDIRECT, NEXT, RawDesc, WRITE};

/// Copies the readable bytes of each request to its writable ones.
struct Echo {
    chain: Chain,
    more: bool,
    put_back: bool,
}

impl Echo {
    fn new() -> Self {
        Self {
            chain: Chain::new(),
            more: false,
            put_back: false,
        }
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        99
    }
    fn name(&self) -> &str {
        "echo"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        EVENT_IDX | crate::virtio::testing::INDIRECT_DESC
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, _io: &mut DeviceIo<'_>, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        let put_back = self.put_back;
        self.more = serve(io, queue, &mut self.chain, |mem, chain| {
            if put_back {
                return Ok(Outcome::PutBack);
            }
            let mut data = [0; 64];
            let n = chain.read(mem, 0, &mut data).unwrap();
            let n = chain.write(mem, 0, &data[..n]).unwrap();
            Ok(Outcome::Used(n as u32))
        })?;
        Ok(())
    }
    fn reset(&mut self) {}
}

fn echo(features: u64) -> Harness<Echo> {
    let mut h = Harness::new(Echo::new());
    h.activate(features);
    h
}

fn rejects(h: &mut Harness<Echo>, what: &str) {
    let error = h.kick(0).unwrap_err().to_string();
    assert!(error.contains(what), "{error}");
    assert_eq!(h.take_used(0), []);
}

#[test]
fn a_chain_is_split_and_copied_across_buffers() {
    for indirect in [false, true] {
        let mut h = echo(0);
        let a = h.alloc_with(b"hel");
        let b = h.alloc_with(b"lo you");
        let out = h.alloc(16);
        let buffers = [
            Buffer::readable(a, 3),
            Buffer::readable(b, 0),
            Buffer::readable(b, 6),
            Buffer::writable(out, 4),
            Buffer::writable(GuestAddress(out.0 + 8), 5),
        ];
        let head = if indirect {
            h.push_indirect(0, &buffers)
        } else {
            h.push(0, &buffers)
        };
        h.kick(0).unwrap();
        assert_eq!(h.take_used(0), [(head, 9)]);
        assert_eq!(h.bytes(out, 4), b"hell");
        assert_eq!(h.bytes(GuestAddress(out.0 + 8), 5), b"o you");
        assert_eq!(h.interrupts(), 1);
    }
}

#[test]
fn reading_from_an_offset_skips_whole_buffers() {
    let mut h = echo(0);
    let a = h.alloc_with(b"abcd");
    let chain = Chain {
        segments: vec![
            Segment { addr: a, len: 2 },
            Segment {
                addr: GuestAddress(a.0 + 2),
                len: 2,
            },
        ],
        split: 2,
        readable_len: 4,
        ..Chain::default()
    };
    let mut data = [0; 8];
    assert_eq!(chain.read(&h.mem, 3, &mut data), Ok(1));
    assert_eq!(data[0], b'd');
    assert_eq!(chain.read(&h.mem, 4, &mut data), Ok(0));
    assert_eq!(chain.read(&h.mem, u32::MAX, &mut data), Ok(0));
}

#[test]
fn header_and_status_may_share_or_span_descriptors() {
    let mut h = echo(0);
    let at = h.alloc_with(b"abcdefgh");
    let part = |offset, len| Segment {
        addr: GuestAddress(at.0 + offset),
        len,
    };
    let mut chain = Chain {
        segments: vec![part(0, 1), part(1, 1), part(2, 3), part(5, 2), part(7, 1)],
        split: 3,
        readable_len: 5,
        writable_len: 3,
        ..Chain::default()
    };
    assert_eq!(chain.take_header(&h.mem, &mut [0; 6]), Ok(false));
    let mut header = [0; 3];
    assert_eq!(chain.take_header(&h.mem, &mut header), Ok(true));
    assert_eq!(&header, b"abc");
    assert_eq!(chain.readable(), [part(3, 2)]);
    assert_eq!(chain.readable_len(), 2);
    assert_eq!(chain.take_last_writable(), Some(GuestAddress(at.0 + 7)));
    assert_eq!(chain.take_last_writable(), Some(GuestAddress(at.0 + 6)));
    assert_eq!(chain.writable(), [part(5, 1)]);
    assert_eq!(chain.writable_len(), 1);
    assert_eq!(chain.take_last_writable(), Some(GuestAddress(at.0 + 5)));
    assert_eq!(chain.take_last_writable(), None);
    assert_eq!(chain.take_header(&h.mem, &mut [0; 2]), Ok(true));
    assert_eq!(chain.readable(), []);
}

#[test]
fn avail_index_beyond_the_queue_size_is_an_error() {
    let mut h = echo(0);
    h.set_avail_idx(0, 17);
    rejects(&mut h, "queue 0");
}

#[test]
fn a_readable_descriptor_after_a_writable_one_is_an_error() {
    let mut h = echo(0);
    let a = h.alloc(16);
    h.push(0, &[Buffer::writable(a, 4), Buffer::readable(a, 4)]);
    rejects(&mut h, "readable descriptor follows");
}

#[test]
fn a_chain_that_loops_is_an_error() {
    let mut h = echo(0);
    let a = h.alloc(16).0;
    let desc = |next| RawDesc {
        addr: a,
        len: 1,
        flags: NEXT,
        next,
    };
    h.push_raw(0, &[desc(1), desc(0)]);
    rejects(&mut h, "loops");
}

#[test]
fn a_next_index_beyond_the_table_is_an_error() {
    let mut h = echo(0);
    let a = h.alloc(16).0;
    h.push_raw(
        0,
        &[RawDesc {
            addr: a,
            len: 1,
            flags: NEXT,
            next: 16,
        }],
    );
    rejects(&mut h, "leaves its table");
    let mut h = echo(0);
    h.make_available(0, 16);
    rejects(&mut h, "leaves its table");
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_an_error() {
    let mut h = echo(0);
    let table = h.alloc(32);
    let own = RawDesc {
        addr: table.0,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    h.write_desc(table, 0, own);
    h.push_raw(0, &[own]);
    rejects(&mut h, "leaves its table");
}

#[test]
fn an_indirect_table_that_loops_is_an_error() {
    let mut h = echo(0);
    let table = h.alloc(65536);
    for i in 0..4096 {
        h.write_desc(
            table,
            i,
            RawDesc {
                addr: table.0,
                len: 1,
                flags: NEXT,
                next: 0,
            },
        );
    }
    h.push_raw(
        0,
        &[RawDesc {
            addr: table.0,
            len: 65536,
            flags: INDIRECT,
            next: 0,
        }],
    );
    rejects(&mut h, "too many descriptors");
}

#[test]
fn buffers_outside_ram_are_errors() {
    use crate::virtio::testing::{HIGH_RAM, HIGH_RAM_START, LOW_RAM};
    for (addr, len) in [
        (LOW_RAM, 1),
        (LOW_RAM - 1, 2),
        (HIGH_RAM_START - 1, 1),
        (HIGH_RAM_START + HIGH_RAM - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (0, u32::MAX),
    ] {
        let mut h = echo(0);
        h.push_raw(
            0,
            &[RawDesc {
                addr,
                len,
                flags: WRITE,
                next: 0,
            }],
        );
        rejects(&mut h, "outside RAM");
    }
}

#[test]
fn an_indirect_table_outside_ram_is_an_error() {
    let mut h = echo(0);
    h.push_raw(
        0,
        &[RawDesc {
            addr: u64::MAX - 8,
            len: 64,
            flags: INDIRECT,
            next: 0,
        }],
    );
    rejects(&mut h, "leaves its table or RAM");
}

#[test]
fn one_interrupt_for_a_batch_and_none_when_turned_off() {
    let mut h = echo(0);
    let a = h.alloc(16);
    for _ in 0..16 {
        h.push(0, &[Buffer::readable(a, 1)]);
    }
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0).len(), 16);
    assert_eq!(h.interrupts(), 1);

    // VIRTQ_AVAIL_F_NO_INTERRUPT.
    let avail = GuestAddress(h.queues[0].avail_ring());
    h.mem.write_obj(1u16, avail).unwrap();
    h.push(0, &[Buffer::readable(a, 1)]);
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0).len(), 1);
    assert_eq!(h.interrupts(), 1);
}

#[test]
fn event_idx_holds_interrupts_back_until_the_driver_wants_one() {
    let mut h = echo(EVENT_IDX);
    let a = h.alloc(16);
    h.set_used_event(0, 1);
    h.push(0, &[Buffer::readable(a, 1)]);
    h.kick(0).unwrap();
    assert_eq!(h.interrupts(), 0);
    assert_eq!(h.avail_event(0), 1);
    h.push(0, &[Buffer::readable(a, 1)]);
    h.kick(0).unwrap();
    assert_eq!(h.interrupts(), 1);
    assert_eq!(h.avail_event(0), 2);
}

#[test]
fn a_chain_put_back_is_the_next_one_again() {
    let mut h = echo(0);
    let a = h.alloc(16);
    let head = h.push(0, &[Buffer::readable(a, 1)]);
    h.device.put_back = true;
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0), []);
    assert_eq!(h.interrupts(), 0);
    h.device.put_back = false;
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0), [(head, 0)]);
}

#[test]
fn a_driver_that_refills_the_queue_cannot_keep_the_caller() {
    let mut h = echo(0);
    let a = h.alloc(16);
    for _ in 0..16 {
        h.push(0, &[Buffer::readable(a, 1)]);
    }
    // Another virtual CPU makes one more available for each that is taken.
    let avail = GuestAddress(h.queues[0].avail_ring() + 2);
    let mut index = 16u16;
    let mut taken = 0;
    let mut io = DeviceIo {
        mem: &h.mem,
        queues: &mut h.queues,
        irq: &h.irq,
    };
    let more = serve(&mut io, 0, &mut Chain::new(), |mem, _| {
        index = index.wrapping_add(1);
        taken += 1;
        mem.write_obj(index, avail).unwrap();
        Ok(Outcome::Used(0))
    });
    assert!(more.unwrap());
    assert_eq!(taken, 16);
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let mut h = echo(0);
    let a = h.alloc(16);
    h.push(0, &[Buffer::readable(a, 1)]);
    h.queues[0].set_ready(false);
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0), []);
}

#[test]
fn hostile_driver() {
    hostile::assault(
        Echo::new,
        &[
            vec![Shape::readable(b"hello"), Shape::writable(16)],
            vec![Shape::writable(4096)],
        ],
    );
}
