use super::config::*;
use super::*;
use crate::config::{CacheType, IoEngine};
use crate::virtio::testing::hostile::{self, Shape};
use crate::virtio::testing::{Buffer, Harness};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

const SECTORS: u64 = 2048;
/// What the drive's file holds: byte i of sector s.
fn content() -> Vec<u8> {
    (0..SECTORS * SECTOR)
        .map(|i| (i / SECTOR * 31 + i) as u8)
        .collect()
}

struct Drive {
    h: Harness<Block>,
    file: File,
}

fn options(read_only: bool, engine: IoEngine) -> Options {
    Options {
        id: "d".into(),
        serial: "serial-of-d".into(),
        read_only,
        cache_type: CacheType::Writeback,
        engine,
    }
}

fn block(read_only: bool, engine: IoEngine) -> (Block, File) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content()).unwrap();
    let disk = open_disk(file.try_clone().unwrap(), "d", read_only, engine).unwrap();
    (Block::new(disk, &options(read_only, engine)).unwrap(), file)
}

fn drive_with(read_only: bool, engine: IoEngine) -> Drive {
    let (block, file) = block(read_only, engine);
    let mut h = Harness::new(block);
    let features = h.device.features();
    h.activate(features & !(1 << 29));
    Drive { h, file }
}

fn drive() -> Drive {
    drive_with(false, IoEngine::Sync)
}

/// A sparse drive.
fn drive_of(size: u64) -> Drive {
    let file = tempfile_of(size);
    let disk = open_disk(file.try_clone().unwrap(), "d", false, IoEngine::Sync).unwrap();
    let block = Block::new(disk, &options(false, IoEngine::Sync)).unwrap();
    let mut h = Harness::new(block);
    let features = h.device.features();
    h.activate(features & !(1 << 29));
    Drive { h, file }
}

const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

impl Drive {
    /// Makes a request available; returns where its status will stand.
    fn push(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> GuestAddress {
        let header = self.h.alloc_with(&header(kind, sector));
        let status = self.h.alloc_with(&[0xee]);
        let mut buffers = vec![Buffer::readable(header, 16)];
        buffers.extend(data);
        buffers.push(Buffer::writable(status, 1));
        self.h.push(0, &buffers);
        status
    }

    /// Kicks, and waits until `count` requests are answered.
    fn finish(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.h.kick(0).unwrap();
        let mut used = self.h.take_used(0);
        for _ in 0..100 {
            if used.len() >= count {
                break;
            }
            self.h.poll_host(100).unwrap();
            used.extend(self.h.take_used(0));
        }
        assert_eq!(used.len(), count);
        used
    }

    /// One request; its status and the length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let status = self.push(kind, sector, data);
        let used = self.finish(1);
        (self.h.bytes(status, 1)[0], used[0].1)
    }

    fn zap(&mut self, kind: u32, ranges: &[u8]) -> u8 {
        let at = self.h.alloc_with(ranges);
        self.request(kind, 0, &[Buffer::readable(at, ranges.len() as u32)])
            .0
    }

    fn on_disk(&self) -> Vec<u8> {
        let mut data = vec![0; (SECTORS * SECTOR) as usize];
        self.file.read_exact_at(&mut data, 0).unwrap();
        data
    }
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn reads_and_writes_through_both_engines() {
    for engine in ENGINES {
        let mut d = drive_with(false, engine);
        let a = d.h.alloc(1024);
        let b = d.h.alloc(512);
        let read = d.request(
            IN,
            3,
            &[Buffer::writable(a, 1024), Buffer::writable(b, 512)],
        );
        assert_eq!(read, (OK, 1537));
        let want = content();
        assert_eq!(d.h.bytes(a, 1024), want[1536..2560]);
        assert_eq!(d.h.bytes(b, 512), want[2560..3072]);

        let c = d.h.alloc_with(&[0x5a; 512]);
        assert_eq!(
            d.request(OUT, SECTORS - 1, &[Buffer::readable(c, 512)]),
            (OK, 1)
        );
        let end = ((SECTORS - 1) * SECTOR) as usize;
        assert_eq!(d.on_disk()[..end], want[..end]);
        assert_eq!(d.on_disk()[end..], [0x5a; 512]);
        assert_eq!(d.request(FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn header_data_and_status_in_other_framings() {
    let mut d = drive();
    let whole = d.h.alloc_with(&header(IN, 1));
    let out = d.h.alloc(513);
    d.h.push(
        0,
        &[
            Buffer::readable(whole, 5),
            Buffer::readable(GuestAddress(whole.0 + 5), 11),
            Buffer::writable(out, 513),
        ],
    );
    d.h.kick(0).unwrap();
    assert_eq!(d.h.take_used(0), [(0, 513)]);
    assert_eq!(d.h.bytes(out, 512), content()[512..1024]);
    assert_eq!(d.h.bytes(GuestAddress(out.0 + 512), 1), [OK]);
}

#[test]
fn a_deep_queue_is_served_with_few_interrupts() {
    for engine in ENGINES {
        let mut d = drive_with(false, engine);
        let buffers: Vec<_> = (0..60).map(|_| d.h.alloc(4096)).collect();
        for (i, at) in buffers.iter().enumerate() {
            d.push(IN, i as u64 * 8, &[Buffer::writable(*at, 4096)]);
        }
        d.finish(60);
        for (i, at) in buffers.iter().enumerate() {
            assert_eq!(d.h.bytes(*at, 4096), content()[i * 4096..][..4096]);
        }
        if engine == IoEngine::Sync {
            assert_eq!(d.h.interrupts(), 1);
        }
    }
}

#[test]
fn the_serial_is_padded_and_needs_its_20_bytes() {
    let mut d = drive();
    let at = d.h.alloc_with(&[0xff; 32]);
    assert_eq!(d.request(GET_ID, 0, &[Buffer::writable(at, 20)]), (OK, 21));
    assert_eq!(d.h.bytes(at, 21), b"serial-of-d\0\0\0\0\0\0\0\0\0\xff");
    assert_eq!(d.request(GET_ID, 0, &[Buffer::writable(at, 19)]).0, IOERR);
}

#[test]
fn read_only_is_enforced_by_the_device() {
    for engine in ENGINES {
        // The file itself is open for writing, so that only the device stands in the way.
        let mut d = drive_with(true, engine);
        assert_ne!(d.h.device.features() & F_RO, 0);
        let a = d.h.alloc_with(&[0x5a; 512]);
        assert_eq!(d.request(OUT, 0, &[Buffer::readable(a, 512)]).0, IOERR);
        assert_eq!(d.zap(DISCARD, &range(0, 8, 0)), IOERR);
        assert_eq!(d.zap(WRITE_ZEROES, &range(0, 8, 0)), IOERR);
        assert_eq!(d.request(IN, 0, &[Buffer::writable(a, 512)]).0, OK);
        assert_eq!(d.on_disk(), content());
    }
}

#[test]
fn positions_beyond_the_end_or_that_overflow_are_errors() {
    let mut d = drive();
    let a = d.h.alloc(1024);
    for sector in [SECTORS - 1, SECTORS, 1 << 55, u64::MAX / SECTOR, u64::MAX] {
        assert_eq!(d.request(IN, sector, &[Buffer::writable(a, 1024)]).0, IOERR);
        assert_eq!(
            d.request(OUT, sector, &[Buffer::readable(a, 1024)]).0,
            IOERR
        );
    }
    assert_eq!(d.on_disk(), content());
}

#[test]
fn unaligned_lengths_are_errors() {
    let mut d = drive();
    let a = d.h.alloc(1024);
    for len in [1, 511, 513] {
        assert_eq!(d.request(IN, 0, &[Buffer::writable(a, len)]), (IOERR, 0));
        assert_eq!(d.request(OUT, 0, &[Buffer::readable(a, len)]), (IOERR, 1));
    }
    assert_eq!(d.on_disk(), content());
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut d = drive();
    for kind in [2, 3, 14, 16, u32::MAX] {
        assert_eq!(d.request(kind, 0, &[]).0, UNSUPP);
    }
}

#[test]
fn requests_without_header_or_status_need_a_reset() {
    let mut d = drive();
    let a = d.h.alloc(32);
    d.h.push(0, &[Buffer::readable(a, 15), Buffer::writable(a, 1)]);
    assert!(d.h.kick(0).unwrap_err().to_string().contains("header"));
    d.h.reset();
    d.h.activate(0);
    d.h.push(0, &[Buffer::readable(a, 16)]);
    assert!(d.h.kick(0).unwrap_err().to_string().contains("status"));
}

#[test]
fn discard_and_write_zeroes_clear_exactly_their_ranges() {
    let mut d = drive();
    let mut ranges = range(8, 8, 0);
    ranges.extend(range(32, 16, 0));
    assert_eq!(d.zap(DISCARD, &ranges), OK);
    assert_eq!(d.zap(WRITE_ZEROES, &range(100, 1, 1)), OK);
    assert_eq!(d.zap(WRITE_ZEROES, &range(102, 1, 0)), OK);
    let mut want = content();
    for (start, count) in [(8, 8), (32, 16), (100, 1), (102, 1)] {
        want[start * 512..(start + count) * 512].fill(0);
    }
    assert_eq!(d.on_disk(), want);
}

#[test]
fn bad_discard_ranges_change_nothing() {
    let mut d = drive();
    let good = range(0, 8, 0);
    for (bad, status) in [
        (range(SECTORS - 1, 2, 0), IOERR),
        (range(u64::MAX, 1, 0), IOERR),
        (range(u64::MAX / SECTOR + 1, 1, 0), IOERR),
        (range(0, u32::MAX, 0), IOERR),
        (range(0, 1, 1), UNSUPP),
        (range(0, 1, 2), UNSUPP),
        (vec![0; 15], IOERR),
    ] {
        let mut ranges = good.clone();
        ranges.extend(&bad);
        assert_eq!(d.zap(DISCARD, &ranges), status, "{bad:?}");
    }
    assert_eq!(d.zap(DISCARD, &[]), IOERR);
    assert_eq!(d.zap(DISCARD, &good.repeat(33)), IOERR);
    assert_eq!(d.zap(WRITE_ZEROES, &good.repeat(2)), IOERR);
    assert_eq!(d.zap(WRITE_ZEROES, &range(0, 1, 2)), UNSUPP);
    assert_eq!(
        d.zap(WRITE_ZEROES, &range(0, ZERO_SECTORS_MAX + 1, 0)),
        IOERR
    );
    assert_eq!(d.on_disk(), content());
}

#[test]
fn discard_needs_its_feature() {
    let mut d = drive();
    d.h.reset();
    d.h.activate(0);
    assert_eq!(d.zap(DISCARD, &range(0, 8, 0)), UNSUPP);
    assert_eq!(d.zap(WRITE_ZEROES, &range(0, 8, 0)), UNSUPP);
}

#[test]
fn flush_is_offered_unless_the_cache_is_unsafe() {
    let (block, _file) = block(false, IoEngine::Sync);
    assert_ne!(block.features() & F_FLUSH, 0);
    let disk = open_disk(tempfile_of(512), "d", false, IoEngine::Sync).unwrap();
    let block = Block::new(
        disk,
        &Options {
            cache_type: CacheType::Unsafe,
            ..options(false, IoEngine::Sync)
        },
    )
    .unwrap();
    assert_eq!(block.features() & F_FLUSH, 0);
    let disk = open_disk(tempfile_of(512), "d", false, IoEngine::Sync).unwrap();
    let block = Block::new(
        disk,
        &Options {
            cache_type: CacheType::Volatile,
            ..options(false, IoEngine::Sync)
        },
    )
    .unwrap();
    assert_ne!(block.features() & F_FLUSH, 0);
}

fn tempfile_of(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

#[test]
fn reset_and_drain_leave_nothing_in_flight() {
    for reset in [false, true] {
        let mut d = drive_with(false, IoEngine::Async);
        let buffers: Vec<_> = (0..50).map(|_| d.h.alloc(8192)).collect();
        for at in &buffers {
            d.push(IN, 16, &[Buffer::writable(*at, 8192)]);
        }
        d.h.kick(0).unwrap();
        if reset {
            d.h.reset();
        } else {
            d.h.drain().unwrap();
            assert_eq!(d.h.used_idx(0), 50);
        }
        assert_eq!(d.h.device.work.in_flight.iter().flatten().count(), 0);
        assert_eq!(
            d.h.device.work.free_tags.len(),
            usize::from(d.h.device.work.disk.depth())
        );
        // Whatever is written to the buffers now stays.
        for at in &buffers {
            d.h.mem.write_slice(&[0xab; 8192], *at).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        for at in &buffers {
            assert_eq!(d.h.bytes(*at, 8192), [0xab; 8192]);
        }
    }
}

#[test]
fn a_broken_ring_leaves_nothing_in_flight() {
    let mut d = drive_with(false, IoEngine::Async);
    let at = d.h.alloc(8192);
    for _ in 0..50 {
        d.push(IN, 16, &[Buffer::writable(at, 8192)]);
    }
    // The 51st request is not one.
    d.h.push(0, &[Buffer::readable(at, 1)]);
    d.h.kick(0).unwrap_err();
    assert_eq!(d.h.device.work.in_flight.iter().flatten().count(), 0);
    d.h.mem.write_slice(&[0xab; 8192], at).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(d.h.bytes(at, 8192), [0xab; 8192]);
}

#[test]
fn a_device_dropped_with_requests_in_flight_waits_for_them() {
    let mut d = drive_with(false, IoEngine::Async);
    let at = d.h.alloc(1 << 20);
    for _ in 0..20 {
        d.push(IN, 0, &[Buffer::writable(at, 1 << 20)]);
    }
    d.h.kick(0).unwrap();
    let mem = d.h.mem.clone();
    drop(d);
    mem.write_slice(&[0xab; 4096], at).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut data = [0; 4096];
    mem.read_slice(&mut data, at).unwrap();
    assert_eq!(data, [0xab; 4096]);
}

#[test]
fn one_head_made_available_over_and_over_stays_bounded() {
    for engine in ENGINES {
        let mut d = drive_with(false, engine);
        let at = d.h.alloc(512);
        d.push(IN, 0, &[Buffer::writable(at, 512)]);
        for _ in 0..255 {
            d.h.make_available(0, 0);
        }
        d.finish(256);
    }
}

#[test]
fn much_data_in_one_kick_is_taken_in_turns() {
    let mut d = drive();
    let at = d.h.alloc(1 << 20);
    for _ in 0..80 {
        d.push(IN, 0, &[Buffer::writable(at, 1 << 20)]);
    }
    d.h.kick(0).unwrap();
    let mut done = d.h.take_used(0).len();
    while done < 80 {
        d.h.poll_host(1000).unwrap();
        let turn = d.h.take_used(0).len();
        assert!((1..=2).contains(&turn), "{turn} after {done}");
        done += turn;
    }
    assert_eq!(done, 80);
}

#[test]
fn zeroing_much_in_one_kick_is_taken_in_turns() {
    let mut d = drive_of(1 << 40);
    let at = d.h.alloc_with(&range(0, ZERO_SECTORS_MAX, 1));
    for _ in 0..10 {
        d.push(WRITE_ZEROES, 0, &[Buffer::readable(at, 16)]);
    }
    d.h.kick(0).unwrap();
    assert_eq!(d.h.take_used(0).len(), 1);
    d.h.poll_host(1000).unwrap();
    assert_eq!(d.h.take_used(0).len(), 1);
}

#[test]
fn overlapping_buffers_cannot_make_one_request_endless() {
    // A drive large enough that only the length stands in the way.
    let mut d = drive_of(1 << 40);
    let at = d.h.alloc(1 << 20);
    let buffers = vec![Buffer::writable(at, 1 << 20); 250];
    assert_eq!(d.request(IN, 0, &buffers).0, IOERR);
}

#[test]
fn a_file_that_was_cut_off_gives_io_errors() {
    for engine in ENGINES {
        let mut d = drive_with(false, engine);
        d.file.set_len(512).unwrap();
        let at = d.h.alloc(1024);
        assert_eq!(d.request(IN, 0, &[Buffer::writable(at, 1024)]), (IOERR, 0));
        assert_eq!(d.request(IN, 0, &[Buffer::writable(at, 512)]), (OK, 513));
    }
}

#[test]
fn a_new_medium_changes_the_capacity_and_tells_the_driver() {
    for engine in ENGINES {
        let mut d = drive_with(false, engine);
        let control = d.h.device.control();
        let mut other = tempfile::tempfile().unwrap();
        other.write_all(&[0x77; 1024]).unwrap();
        let at = d.h.alloc(512);
        d.push(IN, 0, &[Buffer::writable(at, 512)]);
        d.h.kick(0).unwrap();
        control.replace(other, "new").unwrap();
        assert_eq!(d.h.poll_host(1000).unwrap(), 1);
        assert_eq!(d.h.take_used(0).len(), 1);
        assert_eq!(d.h.irq.status() & 2, 2);
        let mut capacity = [0; 8];
        d.h.device.read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2);
        assert_eq!(d.request(IN, 1, &[Buffer::writable(at, 512)]).0, OK);
        assert_eq!(d.h.bytes(at, 512), [0x77; 512]);
        assert_eq!(d.request(IN, 2, &[Buffer::writable(at, 512)]).0, IOERR);
    }
}

#[test]
fn the_same_file_resized_is_measured_again() {
    let mut d = drive();
    let control = d.h.device.control();
    d.file.set_len(8192 * SECTOR).unwrap();
    control.replace(d.file.try_clone().unwrap(), "d").unwrap();
    d.h.poll_host(1000).unwrap();
    let mut capacity = [0; 8];
    d.h.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8192);
    d.file.set_len(100).unwrap();
    control.rescan();
    d.h.irq.reset();
    d.h.poll_host(1000).unwrap();
    assert_eq!(d.h.irq.status(), 0);
    d.h.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8192);
}

#[test]
fn a_bad_medium_is_refused_and_the_old_one_stays() {
    let mut d = drive();
    let control = d.h.device.control();
    let error = control.replace(tempfile_of(0), "empty.img").unwrap_err();
    assert!(error.to_string().contains("empty.img"), "{error}");
    assert_eq!(d.h.poll_host(0).unwrap(), 0);
    let at = d.h.alloc(512);
    assert_eq!(d.request(IN, 0, &[Buffer::writable(at, 512)]).0, OK);
}

#[test]
fn orders_reach_an_inactive_device() {
    let (block, _file) = block(false, IoEngine::Async);
    let mut h = Harness::new(block);
    h.device
        .control()
        .replace(tempfile_of(1024), "new")
        .unwrap();
    assert_eq!(h.poll_host(1000).unwrap(), 1);
    assert_eq!(h.poll_host(0).unwrap(), 0);
    let mut capacity = [0; 8];
    h.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2);
}

#[test]
fn hostile_driver() {
    let get_id = vec![
        Shape::readable(&header(GET_ID, 0)),
        Shape::writable(20),
        Shape::writable(1),
    ];
    for engine in ENGINES {
        hostile::assault(
            || block(false, engine).0,
            &[
                vec![
                    Shape::readable(&header(IN, 1)),
                    Shape::writable(4096),
                    Shape::writable(1),
                ],
                vec![
                    Shape::readable(&header(OUT, 7)),
                    Shape::readable(&[0x5a; 1024]),
                    Shape::writable(1),
                ],
                vec![Shape::readable(&header(FLUSH, 0)), Shape::writable(1)],
                vec![
                    Shape::readable(&header(DISCARD, 0)),
                    Shape::readable(&range(0, 8, 0)),
                    Shape::writable(1),
                ],
                vec![
                    Shape::readable(&header(WRITE_ZEROES, 0)),
                    Shape::readable(&range(1, 8, 1)),
                    Shape::writable(1),
                ],
                get_id.clone(),
            ],
        );
    }
}
