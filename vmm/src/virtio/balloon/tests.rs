use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::device::MAX_RANGES;
use super::{Balloon, BalloonHandle};
use crate::config::Balloon as Config;
use crate::memory::discard::AnonymousPages;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::hostile::{self, Shape};
use crate::virtio::testing::{Buffer, HIGH_RAM_START, Harness, LOW_RAM};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;

const WAKE: u16 = 0;
const TIMER: u16 = 1;

/// Pages that tests give back: 4 MiB to 5 MiB, away from rings and buffers.
const AREA: u64 = 4 << 20;
const PAGE: u64 = 4096;

fn config() -> Config {
    Config {
        amount_mib: 64,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

fn idle(config: &Config) -> (Harness<Balloon>, BalloonHandle) {
    let balloon = Balloon::new(config, Box::new(AnonymousPages::new())).unwrap();
    let handle = balloon.handle();
    let h = Harness::new(balloon);
    h.mem
        .write_slice(&[7; 1 << 20], GuestAddress(AREA))
        .unwrap();
    (h, handle)
}

fn active() -> (Harness<Balloon>, BalloonHandle) {
    let (mut h, handle) = idle(&config());
    h.activate(h.device.features());
    (h, handle)
}

fn pfns(numbers: &[u64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|pfn| u32::try_from(*pfn).unwrap().to_le_bytes())
        .collect()
}

/// Sends `data` in one readable buffer, which must come back.
fn send(h: &mut Harness<Balloon>, queue: usize, data: &[u8]) {
    let addr = h.alloc_with(data);
    let head = h.push(queue, &[Buffer::readable(addr, data.len() as u32)]);
    h.kick(queue).unwrap();
    assert_eq!(h.take_used(queue), [(head, 0)]);
}

/// Sends ranges as writable buffers of one request.
fn send_ranges(h: &mut Harness<Balloon>, queue: usize, ranges: &[(u64, u32)]) {
    let buffers: Vec<Buffer> = ranges
        .iter()
        .map(|(addr, len)| Buffer::writable(GuestAddress(*addr), *len))
        .collect();
    let head = h.push(queue, &buffers);
    h.kick(queue).unwrap();
    assert_eq!(h.take_used(queue), [(head, 0)]);
}

fn page_of(h: &Harness<Balloon>, page: u64) -> u8 {
    h.mem.read_obj(GuestAddress(AREA + page * PAGE)).unwrap()
}

fn read_config(h: &Harness<Balloon>, offset: u64) -> u32 {
    let mut data = [0; 4];
    h.device.read_config(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn inflated_pages_are_gone_in_any_order() {
    let (mut h, handle) = active();
    let first = AREA / PAGE;
    send(
        &mut h,
        INFLATE,
        &pfns(&[first + 9, first + 2, first + 1, first + 2]),
    );
    for page in 0..16 {
        let expected = if [1, 2, 9].contains(&page) { 0 } else { 7 };
        assert_eq!(page_of(&h, page), expected, "page {page}");
    }
    assert_eq!(handle.counters().inflated_bytes, 3 * PAGE);
    assert_eq!(h.interrupts(), 1);

    h.device.write_config(4, &3u32.to_le_bytes());
    assert_eq!(handle.stats().actual_pages, 3);
    send(&mut h, DEFLATE, &pfns(&[first + 1]));
    assert_eq!(page_of(&h, 3), 7);
}

#[test]
fn page_numbers_outside_ram_are_ignored_one_by_one() {
    let (mut h, handle) = active();
    let end = LOW_RAM / PAGE;
    h.mem.write_obj(7u8, GuestAddress(LOW_RAM - 1)).unwrap();
    let high = HIGH_RAM_START / PAGE;
    send(
        &mut h,
        INFLATE,
        &pfns(&[end - 1, end, end + 1, high - 1, high, u64::from(u32::MAX)]),
    );
    let last: u8 = h.mem.read_obj(GuestAddress(LOW_RAM - 1)).unwrap();
    assert_eq!(last, 0);
    let counters = handle.counters();
    assert_eq!(counters.inflated_bytes, 2 * PAGE);
    assert_eq!(counters.ignored_ranges, 4);
}

/// A peer's bug: balloon requests drove host allocation. A list of page numbers as long as
/// descriptors allow costs a fixed amount of work and no memory.
#[test]
fn longest_overlapping_requests_are_bounded() {
    let (mut h, handle) = active();
    let start = Instant::now();
    for queue in [INFLATE, DEFLATE, STATS, HINTING, REPORTING] {
        let size = h.device.queue_sizes()[queue];
        for _ in 0..size.min(32) {
            let buffer = match queue {
                HINTING | REPORTING => Buffer::writable(GuestAddress(AREA), 1 << 20),
                _ => Buffer::readable(GuestAddress(AREA), 4 << 20),
            };
            h.push_indirect(queue, &[buffer; 512]);
        }
        h.kick(queue).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    let counters = handle.counters();
    assert_eq!(counters.reported_bytes, (32 * MAX_RANGES as u64) << 20);
    assert_eq!(counters.hinted_bytes, 0);
    assert!(counters.ignored_ranges > 0);
    assert_eq!(page_of(&h, 0), 0);
}

#[test]
fn reported_ranges_are_gone() {
    let (mut h, handle) = active();
    send_ranges(
        &mut h,
        REPORTING,
        &[(AREA, 2 * 4096), (AREA + 4 * PAGE + 1, 2 * 4096)],
    );
    let zeroed: Vec<u64> = (0..8).filter(|page| page_of(&h, *page) == 0).collect();
    assert_eq!(zeroed, [0, 1, 5], "whole pages only");
    assert_eq!(handle.counters().reported_bytes, 3 * PAGE);
}

#[test]
fn the_target_is_configuration_space_and_interrupts() {
    let (mut h, handle) = active();
    assert_eq!(read_config(&h, 0), 64 * 256);
    handle.set_target(100);
    assert_eq!(h.poll_host(1000).unwrap(), 1);
    assert_eq!(read_config(&h, 0), 100 * 256);
    assert_eq!(h.irq.status(), 2);
    assert_eq!(h.poll_host(0).unwrap(), 0);
    assert_eq!(handle.stats().target_mib, 100);
    // Not the driver's to write, and no part of the field that is.
    h.device.write_config(0, &[9; 4]);
    h.device.write_config(4, &[9; 2]);
    h.device.write_config(5, &[9; 4]);
    assert_eq!(read_config(&h, 0), 100 * 256);
    assert_eq!(read_config(&h, 4), 0);
    assert_eq!(read_config(&h, u64::MAX), 0);
}

fn stats(entries: &[(u16, u64)]) -> Vec<u8> {
    let mut data = Vec::new();
    for (tag, value) in entries {
        data.extend_from_slice(&tag.to_le_bytes());
        data.extend_from_slice(&value.to_le_bytes());
    }
    data
}

#[test]
fn statistics_are_kept_until_the_next_tick() {
    let (mut h, handle) = idle(&config());
    // Linux fills this queue before DRIVER_OK.
    let addr = h.alloc_with(&stats(&[(4, 1 << 20), (5, 2 << 20), (999, 1)]));
    let first = h.push(STATS, &[Buffer::readable(addr, 30)]);
    h.activate(h.device.features());
    assert_eq!(h.take_used(STATS), []);
    assert_eq!(handle.stats().guest.free_memory, Some(1 << 20));
    assert_eq!(handle.stats().guest.total_memory, Some(2 << 20));
    assert_eq!(handle.stats().guest.swap_in, None);

    handle.set_stats_interval(0).unwrap();
    assert_eq!(h.poll_host(0).unwrap(), 0);
    handle.set_stats_interval(1).unwrap();
    assert_eq!(h.poll_host(5000).unwrap(), 1);
    assert_eq!(h.take_used(STATS), [(first, 0)]);
    assert_eq!(h.interrupts(), 1);
    assert_eq!(h.poll_host(0).unwrap(), 0, "the timer was read");
    h.host_ready(TIMER).unwrap();
    assert_eq!(h.take_used(STATS), [], "nothing to ask with");

    let addr = h.alloc_with(&stats(&[(4, 5)]));
    h.push(STATS, &[Buffer::readable(addr, 10)]);
    h.kick(STATS).unwrap();
    assert_eq!(handle.stats().guest.free_memory, Some(5));
    assert_eq!(handle.stats().guest.total_memory, Some(2 << 20));
}

#[test]
fn a_pause_takes_the_statistics_buffer_back() {
    let (mut h, _) = active();
    let addr = h.alloc_with(&stats(&[(4, 5)]));
    let head = h.push(STATS, &[Buffer::readable(addr, 10)]);
    h.kick(STATS).unwrap();
    h.drain().unwrap();
    h.drain().unwrap();
    h.host_ready(TIMER).unwrap();
    assert_eq!(h.take_used(STATS), []);
    // The machine resumed.
    h.kick(STATS).unwrap();
    h.host_ready(TIMER).unwrap();
    assert_eq!(h.take_used(STATS), [(head, 0)]);
}

#[test]
fn a_second_statistics_buffer_gives_the_first_back() {
    let (mut h, _) = active();
    let addr = h.alloc_with(&stats(&[(4, 5)]));
    let first = h.push(STATS, &[Buffer::readable(addr, 10)]);
    let second = h.push(STATS, &[Buffer::readable(addr, 10)]);
    h.kick(STATS).unwrap();
    assert_eq!(h.take_used(STATS), [(first, 0)]);
    h.host_ready(TIMER).unwrap();
    assert_eq!(h.take_used(STATS), [(second, 0)]);
}

#[test]
fn hinting_runs_from_start_to_acknowledgement() {
    let (mut h, handle) = active();
    // Nobody asked.
    send_ranges(&mut h, HINTING, &[(AREA, 4096)]);
    assert_eq!(page_of(&h, 0), 7);

    handle.start_hinting(true);
    h.host_ready(WAKE).unwrap();
    assert_eq!(h.irq.status() & 2, 2);
    let run = read_config(&h, 8);
    assert!(run >= 2);
    assert_eq!(handle.hinting().host_cmd, run);
    // The guest has not begun this run: its ranges belong to an older one.
    send_ranges(&mut h, HINTING, &[(AREA, 4096)]);
    assert_eq!(page_of(&h, 0), 7);

    send(&mut h, HINTING, &run.to_le_bytes());
    send_ranges(&mut h, HINTING, &[(AREA + PAGE, 2 * 4096)]);
    assert_eq!([7, 0, 0, 7], [0, 1, 2, 3].map(|page| page_of(&h, page)));
    assert_eq!(handle.hinting().guest_cmd, Some(run));

    h.irq.reset();
    send(&mut h, HINTING, &0u32.to_le_bytes());
    assert_eq!(read_config(&h, 8), 1, "done: the guest has its pages back");
    assert_eq!(h.irq.status() & 2, 2);
    assert_eq!(handle.hinting().guest_cmd, Some(0));
    assert_eq!(handle.counters().hinted_bytes, 2 * PAGE);
}

#[test]
fn hinting_without_acknowledgement_waits_for_the_host() {
    let (mut h, handle) = active();
    handle.start_hinting(false);
    let run = read_config(&h, 8);
    send(&mut h, HINTING, &run.to_le_bytes());
    send(&mut h, HINTING, &0u32.to_le_bytes());
    assert_eq!(read_config(&h, 8), run);
    handle.stop_hinting();
    assert_eq!(read_config(&h, 8), 1);
    // Late ranges may be pages that are in use again.
    send_ranges(&mut h, HINTING, &[(AREA, 4096)]);
    assert_eq!(page_of(&h, 0), 7);
}

#[test]
fn a_new_run_makes_the_old_one_stale() {
    let (mut h, handle) = active();
    handle.start_hinting(true);
    let old = read_config(&h, 8);
    send(&mut h, HINTING, &old.to_le_bytes());
    handle.start_hinting(true);
    assert_ne!(read_config(&h, 8), old);
    send_ranges(&mut h, HINTING, &[(AREA, 4096)]);
    assert_eq!(page_of(&h, 0), 7);
    send(&mut h, HINTING, &0u32.to_le_bytes());
    assert_ne!(read_config(&h, 8), 1, "the stop was the old run's");
}

#[test]
fn only_what_is_configured_is_offered() {
    let (h, handle) = idle(&Config {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: true,
    });
    assert_eq!(h.device.features() & 0xff, 1 << 5);
    assert_eq!(h.device.queue_sizes().len(), 3);
    assert!(!(0..3).any(|queue| h.device.kicked_synchronously(queue)));
    assert_eq!(handle.stats().target_pages, 0);
    let (h, _) = idle(&config());
    assert!(h.device.kicked_synchronously(HINTING));
}

#[test]
fn a_driver_without_a_feature_numbers_queues_without_it() {
    let (mut h, handle) = idle(&config());
    h.activate(h.device.features() & !(1 << 1 | 1 << 3));
    send_ranges(&mut h, 2, &[(AREA, 4096)]);
    assert_eq!(page_of(&h, 0), 0);
    assert_eq!(handle.counters().reported_bytes, PAGE);
    h.kick(4).unwrap();
}

#[test]
fn reset_forgets_the_driver_and_keeps_the_target() {
    let (mut h, handle) = active();
    h.device.write_config(4, &3u32.to_le_bytes());
    handle.start_hinting(true);
    let run = read_config(&h, 8);
    send(&mut h, HINTING, &run.to_le_bytes());
    h.reset();
    assert_eq!(handle.stats().actual_pages, 0);
    assert_eq!(handle.stats().target_mib, 64);
    assert_eq!(handle.hinting().guest_cmd, None);
    assert_eq!(read_config(&h, 8), 0);
    // Not active: every host descriptor must become unreadable all the same.
    handle.set_target(1);
    h.host_ready(WAKE).unwrap();
    assert_eq!(read_config(&h, 0), 256);
    h.activate(h.device.features());
    send_ranges(&mut h, HINTING, &[(AREA, 4096)]);
    assert_eq!(page_of(&h, 0), 7);
}

#[test]
fn hostile_driver() {
    let area = pfns(&[AREA / PAGE, AREA / PAGE + 1, 3, u64::from(u32::MAX)]);
    hostile::assault(
        || {
            let balloon = Balloon::new(&config(), Box::new(AnonymousPages::new())).unwrap();
            balloon.handle().start_hinting(true);
            balloon
        },
        &[
            vec![Shape::readable(&area)],
            vec![Shape::readable(&stats(&[(4, 5), (6, 7)]))],
            vec![Shape::readable(&2u32.to_le_bytes())],
            vec![Shape::readable(&0u32.to_le_bytes())],
            vec![Shape::writable(4 << 20), Shape::writable(4096)],
        ],
    );
}
