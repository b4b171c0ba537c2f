use std::time::{Duration, Instant};

use super::Rng;
use super::device::MAX_REQUEST;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::hostile::{self, Shape};
use crate::virtio::testing::{Buffer, Harness};

fn active() -> Harness<Rng> {
    let mut harness = Harness::new(Rng::new().unwrap());
    harness.activate(harness.device.features());
    harness
}

#[test]
fn fills_every_byte_of_scattered_buffers() {
    let mut h = active();
    let (first, second) = (h.alloc(10), h.alloc(3000));
    let head = h.push(
        0,
        &[Buffer::writable(first, 10), Buffer::writable(second, 3000)],
    );
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0), [(head, 3010)]);
    assert_eq!(h.interrupts(), 1);
    let bytes = [h.bytes(first, 10), h.bytes(second, 3000)].concat();
    // 64 zeros in a row happen once in 2^500 runs.
    assert!(bytes.windows(64).all(|run| run.iter().any(|b| *b != 0)));
    assert_ne!(bytes[..1024], bytes[1024..2048], "each chunk is fresh");
}

#[test]
fn a_request_without_a_buffer_gets_nothing() {
    let mut h = active();
    let data = h.alloc_with(b"readable");
    let head = h.push(0, &[Buffer::readable(data, 8)]);
    h.kick(0).unwrap();
    assert_eq!(h.take_used(0), [(head, 0)]);
    assert_eq!(h.bytes(data, 8), b"readable");
}

/// A peer's bug: rng requests drove host allocation. The longest chain of the largest
/// overlapping buffers costs a fixed amount of work and no memory.
#[test]
fn longest_overlapping_requests_are_bounded() {
    let mut h = active();
    let data = h.alloc(4 << 20);
    let start = Instant::now();
    for _ in 0..8 {
        let buffers = [Buffer::writable(data, 4 << 20); 512];
        h.push_indirect(0, &buffers);
    }
    h.kick(0).unwrap();
    let used = h.take_used(0);
    assert_eq!(used.len(), 8);
    assert!(used.iter().all(|(_, len)| *len == MAX_REQUEST));
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn idle_device_leaves_no_descriptor_readable() {
    let mut h = Harness::new(Rng::new().unwrap());
    assert_eq!(h.poll_host(0).unwrap(), 0);
    assert_eq!(h.host_ready(0).map_err(|e| e.to_string()), Ok(()));
    h.activate(h.device.features());
    assert_eq!(h.poll_host(0).unwrap(), 0);
}

#[test]
fn hostile_driver() {
    hostile::assault(
        || Rng::new().unwrap(),
        &[
            vec![Shape::writable(64)],
            vec![Shape::writable(1 << 20), Shape::writable(1)],
            vec![Shape::readable(b"x")],
        ],
    );
}
