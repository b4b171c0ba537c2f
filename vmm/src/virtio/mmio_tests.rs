use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::memory::allocate;
use crate::virtio::device::RestoreError;
use crate::virtio::testing::CountingLine;

/// What a device was told, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Activate(u64),
    Kick(usize),
    Drain,
    Reset,
}

#[derive(Default)]
struct Recorder {
    calls: Arc<Mutex<Vec<Call>>>,
    /// Kicks from now on are answered with an error.
    broken: Arc<AtomicUsize>,
}

const OFFERED: u64 = 1 << 5 | 1 << 29;

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "recorder"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&mut self, io: &mut DeviceIo<'_>, features: u64) -> Result<(), DeviceError> {
        for queue in io.queues.iter().filter(|queue| queue.ready()) {
            assert!(queue.is_valid(io.mem), "active with a bad queue");
        }
        self.calls.lock().unwrap().push(Call::Activate(features));
        Ok(())
    }
    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        assert!(io.queues[queue].ready());
        self.calls.lock().unwrap().push(Call::Kick(queue));
        if self.broken.load(Ordering::Relaxed) > 0 {
            return Err(DeviceError::BadQueue {
                queue,
                what: "test".into(),
            });
        }
        Ok(())
    }
    fn drain(&mut self, _: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.calls.lock().unwrap().push(Call::Drain);
        Ok(())
    }
    fn reset(&mut self) {
        self.calls.lock().unwrap().push(Call::Reset);
    }
}

struct Driver {
    transport: Transport,
    calls: Arc<Mutex<Vec<Call>>>,
    broken: Arc<AtomicUsize>,
}

impl Driver {
    fn new() -> Self {
        let device = Recorder::default();
        let (calls, broken) = (Arc::clone(&device.calls), Arc::clone(&device.broken));
        let irq = Interrupt::new(Arc::new(CountingLine::default()));
        let ram = Arc::new(allocate(32).unwrap());
        Self {
            transport: Transport::new(Box::new(device), ram, irq).unwrap(),
            calls,
            broken,
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// §3.1.1 up to FEATURES_OK.
    fn negotiate(&mut self) {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        self.write(register::DRIVER_FEATURES_SEL, 1);
        self.write(register::DRIVER_FEATURES, 1);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn add_queue(&mut self, index: u32) {
        let at = 0x10_0000 + index * 0x1_0000;
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_NUM, 8);
        self.write(register::QUEUE_DESC_LOW, at);
        self.write(register::QUEUE_DRIVER_LOW, at + 0x1000);
        self.write(register::QUEUE_DEVICE_LOW, at + 0x2000);
        self.write(register::QUEUE_READY, 1);
    }

    fn start(&mut self) {
        self.negotiate();
        self.add_queue(0);
        self.add_queue(1);
        self.write(register::STATUS, RUNNING);
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn a_driver_that_keeps_the_order_gets_its_device() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(register::MAGIC), 0x7472_6976);
    assert_eq!(driver.read(register::VERSION), 2);
    assert_eq!(driver.read(register::DEVICE_ID), 42);
    driver.start();
    assert_eq!(driver.read(register::STATUS), RUNNING);
    driver.write(register::QUEUE_NOTIFY, 1);
    assert_eq!(driver.calls(), [Call::Activate(VERSION_1), Call::Kick(1)]);
    driver.write(register::STATUS, 0);
    assert_eq!(driver.read(register::STATUS), 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    assert_eq!(driver.calls(), [Call::Drain, Call::Reset]);
    driver.start();
    assert_eq!(driver.calls(), [Call::Activate(VERSION_1)]);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut driver = Driver::new();
    driver.write(register::STATUS, ACKNOWLEDGE);
    driver.write(register::STATUS, ACKNOWLEDGE | DRIVER);
    driver.write(register::DRIVER_FEATURES_SEL, 1);
    driver.write(register::DRIVER_FEATURES, 1);
    driver.write(register::DRIVER_FEATURES_SEL, 0);
    driver.write(register::DRIVER_FEATURES, 1 << 6);
    driver.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(driver.read(register::STATUS), ACKNOWLEDGE | DRIVER);
    // Without VERSION_1 neither.
    driver.write(register::DRIVER_FEATURES, 1 << 5);
    driver.write(register::DRIVER_FEATURES_SEL, 1);
    driver.write(register::DRIVER_FEATURES, 0);
    driver.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(driver.read(register::STATUS), ACKNOWLEDGE | DRIVER);
}

/// CVE-2026-5747 of a peer: the size of a working queue was changed.
#[test]
fn queue_registers_do_not_move_after_activation() {
    let mut driver = Driver::new();
    driver.start();
    let before: Vec<_> = driver.transport.queues.iter().map(Queue::state).collect();
    for queue in 0..3 {
        driver.write(register::QUEUE_SEL, queue);
        for at in (0x38..0xb0).step_by(4) {
            if at != register::QUEUE_NOTIFY && at != register::STATUS {
                driver.write(at, 0xdead_0000 | at as u32);
                driver.write(at, 0);
                driver.write(at, 1);
            }
        }
    }
    let after: Vec<_> = driver.transport.queues.iter().map(Queue::state).collect();
    assert_eq!(before, after);
}

#[test]
fn a_queue_that_is_not_in_ram_makes_the_device_need_a_reset() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.add_queue(0);
    driver.write(register::QUEUE_SEL, 1);
    driver.write(register::QUEUE_NUM, 8);
    driver.write(register::QUEUE_DESC_HIGH, 0x7fff_ffff);
    driver.write(register::QUEUE_READY, 1);
    driver.write(register::STATUS, RUNNING);
    assert_ne!(driver.read(register::STATUS) & NEEDS_RESET, 0);
    driver.write(register::QUEUE_NOTIFY, 0);
    assert_eq!(driver.calls(), []);
    driver.start();
    assert_eq!(driver.read(register::STATUS), RUNNING);
}

#[test]
fn a_bad_request_is_reported_once_and_silences_the_device() {
    let mut driver = Driver::new();
    driver.start();
    let generation = driver.read(register::CONFIG_GENERATION);
    driver.broken.store(1, Ordering::Relaxed);
    driver.write(register::QUEUE_NOTIFY, 0);
    driver.write(register::QUEUE_NOTIFY, 0);
    assert_eq!(driver.calls(), [Call::Activate(VERSION_1), Call::Kick(0)]);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 2);
    assert_ne!(driver.read(register::CONFIG_GENERATION), generation);
    driver.write(register::INTERRUPT_ACK, 2);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn kicks_of_queues_that_do_not_exist_or_are_not_ready_are_ignored() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.add_queue(0);
    driver.write(register::STATUS, RUNNING);
    for queue in [1, 2, 65535, u32::MAX] {
        driver.write(register::QUEUE_NOTIFY, queue);
    }
    assert_eq!(driver.calls(), [Call::Activate(VERSION_1)]);
}

proptest! {
    /// Every register in every status, with any width: the recorder itself asserts that it is
    /// never active with a bad queue and never kicked for one that is not ready.
    #[test]
    fn any_sequence_of_accesses_is_survived(
        accesses in prop::collection::vec(
            (
                prop_oneof![4 => (0u64..0x42).prop_map(|r| r * 4), 1 => 0u64..0x1000],
                prop_oneof![
                    3 => Just(0u32), 3 => 0u32..16, 2 => Just(0x10_0000u32), 1 => any::<u32>(),
                    2 => prop_oneof![
                        Just(ACKNOWLEDGE), Just(ACKNOWLEDGE | DRIVER),
                        Just(ACKNOWLEDGE | DRIVER | FEATURES_OK), Just(RUNNING),
                    ],
                ],
                prop_oneof![6 => Just(4usize), 1 => prop_oneof![Just(1usize), Just(2), Just(8)]],
                any::<bool>(),
            ),
            0..200,
        ),
        start_first in any::<bool>(),
    ) {
        let mut driver = Driver::new();
        if start_first {
            driver.start();
        }
        for (offset, value, width, is_write) in accesses {
            let offset = offset.min(0x1000 - width as u64);
            let mut data = u64::from(value).to_le_bytes();
            if is_write {
                driver.transport.write(offset, &data[..width]);
            } else {
                driver.transport.read(offset, &mut data[..width]);
            }
        }
        driver.write(register::STATUS, 0);
        driver.calls();
        driver.start();
        prop_assert_eq!(driver.read(register::STATUS), RUNNING);
        prop_assert_eq!(driver.calls(), [Call::Activate(VERSION_1)]);
    }
}

/// A drive-like device whose configuration space is a number that its host end changes.
struct Sized(u32);

impl VirtioDevice for Sized {
    fn device_type(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "sized"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.0.to_le_bytes()) {
            *to = from;
        }
    }
    fn activate(&mut self, _: &mut DeviceIo<'_>, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn queue_notified(&mut self, _: &mut DeviceIo<'_>, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    fn host_ready(&mut self, io: Option<&mut DeviceIo<'_>>, token: u16) -> Result<(), DeviceError> {
        self.0 = token.into();
        if let Some(io) = io {
            io.irq.config_changed();
        }
        Ok(())
    }
    fn reset(&mut self) {}
}

/// What the driver would read at the moment of each interrupt: size and generation.
struct Reader {
    page: RegisterPage,
    seen: Mutex<Vec<(u32, u32)>>,
}

impl Reader {
    fn read(&self, at: u64) -> u32 {
        u32::from_le(self.page.word(at).unwrap().load(Ordering::Acquire))
    }
}

impl crate::virtio::device::InterruptLine for Reader {
    fn trigger(&self) -> std::io::Result<()> {
        let now = (
            self.read(register::CONFIG),
            self.read(register::CONFIG_GENERATION),
        );
        self.seen.lock().unwrap().push(now);
        Ok(())
    }
}

#[test]
fn the_page_shows_a_change_before_the_interrupt_tells_of_it() {
    let page = crate::memory::registers::register_pages(1).unwrap()[0];
    let reader = Arc::new(Reader {
        page,
        seen: Mutex::default(),
    });
    let status = page.word(register::INTERRUPT_STATUS).unwrap();
    let irq = Interrupt::with_register(reader.clone(), status);
    let ram = Arc::new(allocate(32).unwrap());
    let mut transport = Transport::new(Box::new(Sized(1)), ram, irq).unwrap();
    transport.show_in(page);
    assert_eq!(reader.read(register::CONFIG), 1);

    // No driver yet: it finds the new size, and is not interrupted.
    transport.host_ready(2);
    assert_eq!(reader.read(register::CONFIG), 2);
    assert!(reader.seen.lock().unwrap().is_empty());

    let mut write = |at: u64, value: u32| transport.write(at, &value.to_le_bytes());
    write(register::STATUS, ACKNOWLEDGE | DRIVER);
    write(register::DRIVER_FEATURES_SEL, 1);
    write(register::DRIVER_FEATURES, 1);
    let agreed = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    write(register::STATUS, agreed);
    write(register::STATUS, agreed | DRIVER_OK);
    assert_eq!(reader.read(register::STATUS), agreed | DRIVER_OK);

    transport.host_ready(3);
    assert_eq!(*reader.seen.lock().unwrap(), [(3, 1)]);
    assert_eq!(reader.read(register::INTERRUPT_STATUS) & 2, 2);
}

fn copy_of(driver: &Driver, state: &TransportState) -> Result<Driver, RestoreError> {
    let mut copy = Driver::new();
    copy.transport.mem = Arc::clone(&driver.transport.mem);
    copy.transport.restore(state)?;
    Ok(copy)
}

#[test]
fn a_restored_device_is_where_its_original_was() {
    let mut driver = Driver::new();
    let fresh = driver.transport.save();
    driver.start();
    driver.transport.queues[1].set_next_avail(65535);
    driver.transport.irq.used_ring();
    driver.calls();
    let state = driver.transport.save();
    let mut copy = copy_of(&driver, &state).unwrap();
    assert_eq!(copy.transport.save(), state);
    assert_eq!(copy.read(register::STATUS), RUNNING);
    assert_eq!(copy.read(register::INTERRUPT_STATUS), 1);
    assert_eq!(copy.calls(), [], "no driver activated it");
    copy.transport.resume();
    assert_eq!(copy.calls(), [Call::Kick(0), Call::Kick(1)]);
    copy.write(register::STATUS, 0);
    assert_eq!(copy.calls(), [Call::Drain, Call::Reset]);
    assert_eq!(copy.transport.save(), fresh);
}

#[test]
fn states_that_no_driver_brings_about_are_refused() {
    let mut driver = Driver::new();
    driver.start();
    let good = driver.transport.save();
    let spoil: [fn(&mut TransportState); 9] = [
        |s| s.device_type = 2,
        |s| s.status = DRIVER_OK,
        |s| s.status |= 1 << 9,
        |s| s.driver_features = 1 << 6 | VERSION_1,
        |s| s.driver_features = 0,
        |s| s.queues.truncate(1),
        |s| s.queues[0].max_size = 1024,
        |s| s.queues[0].desc_table = 1 << 40,
        |s| s.device = crate::virtio::device::DeviceState::Block { capacity: 1 },
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        assert!(copy_of(&driver, &state).is_err(), "spoilt in way {number}");
    }
}

proptest! {
    /// Any numbers: refused, or a device that keeps its promises to drivers.
    #[test]
    fn hostile_states_harm_nobody(
        status: u32, features: u64, sel: u32,
        queue in (any::<u16>(), any::<u16>(), any::<u16>(), any::<bool>(), any::<[u64; 3]>()),
        writes in prop::collection::vec((0u64..0x200, any::<u32>()), 0..20),
    ) {
        let mut driver = Driver::new();
        driver.start();
        let mut state = driver.transport.save();
        state.status = status & 0xff;
        state.driver_features = features & OFFERED | VERSION_1;
        state.queue_sel = sel;
        let (next_avail, next_used, size, ready, [desc, avail, used]) = queue;
        let first = &mut state.queues[0];
        (first.next_avail, first.next_used) = (next_avail, next_used);
        first.size = size;
        first.ready = ready;
        (first.desc_table, first.avail_ring, first.used_ring) = (desc, avail, used);
        if let Ok(mut copy) = copy_of(&driver, &state) {
            // The recorder asserts that its queues are ready and valid.
            copy.transport.resume();
            for (register, value) in writes {
                copy.write(register, value);
            }
            copy.transport.drain();
        }
    }
}
