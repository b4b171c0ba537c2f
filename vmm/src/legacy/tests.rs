//! Every register of these devices, and any access a guest may make.
use std::io::{self, Read};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::bus::BusDevice;
use crate::virtio::device::InterruptLine;

#[derive(Default)]
struct Log(Mutex<Vec<MachineEvent>>);

impl Log {
    fn take(&self) -> Vec<MachineEvent> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

fn events() -> (Arc<Log>, MachineEvents) {
    let log = Arc::new(Log::default());
    let sink = log.clone();
    (
        log,
        Arc::new(move |event| sink.0.lock().unwrap().push(event)),
    )
}

#[derive(Default)]
struct Count(AtomicU32);

impl InterruptLine for Count {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn s5_powers_off_and_other_sleep_types_do_nothing() {
    let (log, sink) = events();
    let mut registers = SleepRegisters::new(sink);
    for value in 0..=u8::MAX {
        registers.write(sleep::SLEEP_CONTROL, &[value]);
        let s5 = value & 0x20 != 0 && (value >> 2) & 7 == 5;
        assert_eq!(log.take(), vec![MachineEvent::PowerOff; usize::from(s5)]);
    }
    registers.write(sleep::SLEEP_STATUS, &[0x80]);
    assert_eq!(log.take(), []);
    let mut status = [0xff];
    registers.read(sleep::SLEEP_STATUS, &mut status);
    assert_eq!(status, [0], "WAK_STS is never set");
}

#[test]
fn both_resets_reset() {
    let (log, sink) = events();
    let mut registers = SleepRegisters::new(sink.clone());
    registers.write(sleep::RESET, &[0]);
    registers.write(sleep::RESET, &[sleep::RESET_VALUE]);
    assert_eq!(log.take(), [MachineEvent::Reset]);

    let mut i8042 = ResetController::new(sink);
    i8042.write(4, &[0xaa]);
    i8042.write(0, &[0xfe]);
    assert_eq!(log.take(), []);
    i8042.write(4, &[0xfe]);
    assert_eq!(log.take(), [MachineEvent::Reset]);
    let mut status = [0xff];
    i8042.read(4, &mut status);
    assert_eq!(
        status,
        [0],
        "input buffer empty, so the guest may send its command"
    );
}

#[test]
fn pvpanic_names_what_it_knows_and_reports_it() {
    let (log, sink) = events();
    let mut pvpanic = PvPanic::new(sink);
    let mut known = [0xff];
    pvpanic.read(0, &mut known);
    assert_eq!(known, [3]);
    pvpanic.write(0, &[1]);
    assert_eq!(log.take(), [MachineEvent::Panicked]);
    pvpanic.write(0, &[2]);
    assert_eq!(log.take(), [MachineEvent::CrashLoaded]);
    pvpanic.write(0, &[0xfc]);
    assert_eq!(log.take(), []);
}

#[test]
fn the_boot_marker_counts_once() {
    let (log, sink) = events();
    let mut marker = BootMarker::new(sink);
    marker.write(0, &[1]);
    marker.write(1, &[123]);
    assert_eq!(log.take(), []);
    marker.write(0, &[123]);
    marker.write(0, &[123]);
    assert_eq!(log.take(), [MachineEvent::BootMarker]);
}

#[test]
fn serial_output_reaches_the_sink_and_the_tail() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let output = file.reopen().unwrap().into();
    let mut serial = Serial::new(Arc::new(Count::default()), Some(output), u64::MAX).unwrap();
    for byte in b"early\nprintk\n" {
        serial.write(0, &[*byte]);
    }
    let mut got = String::new();
    file.read_to_string(&mut got).unwrap();
    assert_eq!(got, "early\nprintk\n");
    assert_eq!(serial.tail(1), b"printk\n");
}

#[test]
fn serial_input_is_bounded_and_interrupts() {
    let line = Arc::new(Count::default());
    let mut serial = Serial::new(line.clone(), None, 0).unwrap();
    serial.write(1, &[1]);
    let interrupts = line.0.load(Ordering::Relaxed);
    let input = serial.input();
    assert_eq!(input.offer(&[b'x'; 100]), 64);
    assert_eq!(input.offer(b"y"), 0);
    assert_eq!(line.0.load(Ordering::Relaxed), interrupts + 1);
    let mut byte = [0];
    serial.read(0, &mut byte);
    assert_eq!(byte, [b'x']);
    assert_eq!(input.offer(b"yz"), 1);
}

/// A peer's bug: serial output buffered without bound. Nobody reads the pipe; the guest
/// goes on, and what is kept stays as large as it was.
#[test]
fn serial_flood_neither_blocks_nor_grows() {
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    let mut serial = Serial::new(Arc::new(Count::default()), Some(writer), u64::MAX).unwrap();
    for at in 0..1_000_000_u32 {
        serial.write(0, &[if at % 64 == 63 { b'\n' } else { b'.' }]);
    }
    assert!(serial.tail(usize::MAX).len() <= 64 << 10);
    // Loopback and a guest that does not read: the FIFO is the bound.
    serial.write(4, &[0x10]);
    for _ in 0..100_000 {
        serial.write(0, b".");
    }
    let mut held = 0;
    loop {
        let mut status = [0];
        serial.read(5, &mut status);
        if status[0] & 1 == 0 {
            break;
        }
        serial.read(0, &mut status);
        held += 1;
    }
    assert_eq!(held, 64);
}

proptest! {
    #[test]
    fn no_access_panics(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..10, any::<u64>()],
             prop::collection::vec(any::<u8>(), 0..9)),
            0..64,
        ),
    ) {
        let (_, sink) = events();
        let mut devices: Vec<Box<dyn BusDevice>> = vec![
            Box::new(SleepRegisters::new(sink.clone())),
            Box::new(ResetController::new(sink.clone())),
            Box::new(PvPanic::new(sink.clone())),
            Box::new(BootMarker::new(sink)),
            Box::new(Serial::new(Arc::new(Count::default()), None, 0).unwrap()),
        ];
        for (write, offset, mut data) in accesses {
            for device in &mut devices {
                if write {
                    device.write(offset, &data);
                } else {
                    device.read(offset, &mut data);
                }
            }
        }
    }
}
