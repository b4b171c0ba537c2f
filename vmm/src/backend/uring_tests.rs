use super::super::engine::Ring;
use super::*;
use crate::memory::segment::Segment;
use io_uring::{IoUring, opcode};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

fn disk(size: usize) -> (UringFile, std::fs::File) {
    let mut file = tempfile::tempfile().unwrap();
    let content: Vec<u8> = (0..size).map(|i| (i / 512) as u8).collect();
    file.write_all(&content).unwrap();
    let raw = RawFile::new(file.try_clone().unwrap(), "d", false).unwrap();
    (UringFile::new(raw), file)
}

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn segment(addr: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len,
    }
}

/// Starts `op` and waits for its end.
fn run(disk: &mut UringFile, mem: &GuestRam, op: Op<'_>) -> io::Result<()> {
    match disk.start(mem, op, 7) {
        Started::Done(result) => result,
        Started::InFlight => {
            disk.submit().unwrap();
            let mut done = Vec::new();
            disk.reap(true, &mut done).unwrap();
            assert_eq!(done.len(), 1);
            let (tag, result) = done.remove(0);
            assert_eq!(tag, 7);
            result
        }
    }
}

#[test]
fn the_ring_is_made_with_the_first_request_and_takes_only_disk_operations() {
    if IoUring::new(2).is_err() {
        // A kernel without io_uring: the engine's other way is tested below.
        return;
    }
    let (mut disk, _file) = disk(4096);
    assert!(matches!(disk.engine.ring, Ring::Unmade));
    run(&mut disk, &ram(), Op::Flush).unwrap();
    let Ring::Made(ring) = &mut disk.engine.ring else {
        panic!("no ring");
    };
    // SAFETY: the entry refers to no memory.
    unsafe { ring.submission().push(&opcode::Nop::new().build()) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    let refused = ring.completion().next().unwrap();
    assert_eq!(refused.result(), -libc::EACCES);
}

#[test]
fn without_io_uring_requests_are_done_at_once() {
    let (mut disk, _file) = disk(4096);
    disk.engine.ring = Ring::Refused;
    let mem = ram();
    let to = [segment(0, 512)];
    let started = disk.start(
        &mem,
        Op::Read {
            to: &to,
            offset: 1024,
        },
        0,
    );
    assert!(matches!(started, Started::Done(Ok(()))));
    assert_eq!(mem.read_obj::<u8>(GuestAddress(0)).unwrap(), 2);
    let mut done = Vec::new();
    disk.submit().unwrap();
    disk.reap(true, &mut done).unwrap();
    assert!(done.is_empty());
}

#[test]
fn reads_writes_and_long_lists() {
    let (mut disk, file) = disk(1 << 20);
    let mem = ram();
    mem.write_slice(&[0xaa; 512], GuestAddress(0)).unwrap();
    let from = [segment(0, 512)];
    run(
        &mut disk,
        &mem,
        Op::Write {
            from: &from,
            offset: 512,
        },
    )
    .unwrap();
    let mut got = [0; 512];
    file.read_exact_at(&mut got, 512).unwrap();
    assert_eq!(got, [0xaa; 512]);

    // More vectors than one operation takes: the rest is moved afterwards.
    let to: Vec<Segment> = (0..1200u64)
        .map(|i| segment(0x1000 + i * 512, 512))
        .collect();
    run(&mut disk, &mem, Op::Read { to: &to, offset: 0 }).unwrap();
    for i in [0, 2, 1023, 1024, 1199] {
        let byte: u8 = mem.read_obj(GuestAddress(0x1000 + i * 512)).unwrap();
        assert_eq!(byte, i as u8);
    }
    run(&mut disk, &mem, Op::Read { to: &[], offset: 0 }).unwrap();
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    let (mut disk, file) = disk(4096);
    file.set_len(1024).unwrap();
    let mem = ram();
    for (offset, len) in [(512, 1024), (2048, 512)] {
        let to = [segment(0, len)];
        let error = run(&mut disk, &mem, Op::Read { to: &to, offset }).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_tag_in_flight_cannot_be_used_again() {
    let (mut disk, _file) = disk(4096);
    let mem = ram();
    let to = [segment(0, 512)];
    let op = Op::Read { to: &to, offset: 0 };
    if let Started::InFlight = disk.start(&mem, op, 1) {
        for tag in [1, DEPTH, u16::MAX] {
            assert!(matches!(disk.start(&mem, op, tag), Started::Done(Err(_))));
        }
        assert_eq!(disk.engine.in_flight, 1);
    }
}

#[test]
fn requests_in_flight_keep_their_guest_memory() {
    let (mut disk, _file) = disk(1 << 20);
    let wakeup = EventFd::new(EFD_NONBLOCK).unwrap();
    disk.notify_through(wakeup);
    let mem = ram();
    let to = [segment(0, 1 << 20)];
    let mut started = 0;
    for tag in 0..DEPTH {
        let op = Op::Read { to: &to, offset: 0 };
        started += usize::from(matches!(disk.start(&mem, op, tag), Started::InFlight));
    }
    disk.submit().unwrap();
    // The VM goes away. Were the buffers unmapped, the kernel would report EFAULT.
    drop(mem);
    let mut done = Vec::new();
    disk.reap(true, &mut done).unwrap();
    assert_eq!(done.len(), started);
    assert!(done.iter().all(|(_, result)| result.is_ok()));
}

/// Reads that miss the page cache finish after submission, on a worker or in this thread's own
/// task work: the event loop must hear of both.
#[test]
fn whatever_finishes_after_submission_wakes_the_event_loop() {
    const READS: u16 = 32;
    const GAP: u64 = 512 << 10;
    let (mut disk, file) = disk(usize::from(READS) * GAP as usize);
    let wakeup = EventFd::new(EFD_NONBLOCK).unwrap();
    disk.notify_through(wakeup.try_clone().unwrap());
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mem = ram();
    let mut done = Vec::new();
    for tag in 0..READS {
        let to = [segment(u64::from(tag) * 4096, 4096)];
        let offset = u64::from(tag) * GAP;
        if let Started::Done(result) = disk.start(&mem, Op::Read { to: &to, offset }, tag) {
            done.push((tag, result));
        }
    }
    disk.submit().unwrap();
    disk.reap(false, &mut done).unwrap();
    while done.len() < usize::from(READS) {
        // SAFETY: `wakeup` is open until the end of the test.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(wakeup.as_raw_fd()) };
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            fd,
            rustix::event::PollFlags::IN,
        )];
        let limit = rustix::event::Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut fds, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => continue,
            ready => assert_eq!(ready, Ok(1), "{} of {READS} were told", done.len()),
        }
        wakeup.read().unwrap();
        disk.reap(false, &mut done).unwrap();
    }
    assert!(done.iter().all(|(_, result)| result.is_ok()));
}
