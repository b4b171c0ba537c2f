//! virtio over MMIO (virtio 1.2 §4.2): the register window of one device, and the status
//! machine that decides which register may be written when.
//!
//! Queue registers can be set only between FEATURES_OK and DRIVER_OK, and a queue works only
//! after it was found valid: a driver that moves a queue under a working device was the way
//! out of a peer's sandbox.
mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::device::{DeviceError, DeviceIo, HostEvent, Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::log::Level;
use crate::memory::GuestRam;
use crate::memory::registers::RegisterPage;

pub use self::state::TransportState;

/// Register offsets (§4.2.2).
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_LEN_HIGH: u64 = 0xb4;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Bytes of configuration space that the guest can read without an exit; all our devices
/// have less.
const CONFIG_SHOWN: usize = 256;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "BELL".
const VENDOR: u32 = 0x4c4c_4542;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// A device behind its registers. Lock it for every use; see [`lock`].
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    mem: Arc<GuestRam>,
    queues: Vec<Queue>,
    irq: Interrupt,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    /// Where the guest reads the registers without an exit.
    page: Option<RegisterPage>,
    /// `ConfigGeneration` of the configuration space in `page`.
    shown_generation: u32,
}

/// Locks a transport. A poisoned lock means that another thread has panicked and the process
/// is going down; this thread need not follow.
pub fn lock(transport: &Mutex<Transport>) -> MutexGuard<'_, Transport> {
    transport.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Transport {
    /// `None` if the device names a queue size that is no power of two.
    pub fn new(device: Box<dyn VirtioDevice>, mem: Arc<GuestRam>, irq: Interrupt) -> Option<Self> {
        let queues: Result<Vec<_>, _> = device
            .queue_sizes()
            .iter()
            .map(|max| Queue::new(*max))
            .collect();
        Some(Self {
            device,
            mem,
            queues: queues.ok()?,
            irq,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            page: None,
            shown_generation: 0,
        })
    }

    /// From now on the guest reads the registers from `page`, whose `InterruptStatus` the
    /// interrupt writes itself.
    pub fn show_in(&mut self, page: RegisterPage) {
        use register as r;
        self.page = Some(page);
        for constant in [r::MAGIC, r::VERSION, r::DEVICE_ID, r::VENDOR_ID] {
            page.set(constant, self.read_register(constant));
        }
        page.set(r::SHM_LEN_LOW, u32::MAX);
        page.set(r::SHM_LEN_HIGH, u32::MAX);
        self.show_config(page);
        self.show_registers(page);
    }

    fn show_registers(&self, page: RegisterPage) {
        use register as r;
        for changing in [
            r::DEVICE_FEATURES,
            r::QUEUE_NUM_MAX,
            r::QUEUE_READY,
            r::STATUS,
        ] {
            page.set(changing, self.read_register(changing));
        }
    }

    fn show_config(&mut self, page: RegisterPage) {
        let mut config = [0; CONFIG_SHOWN];
        self.device.read_config(0, &mut config);
        page.set_bytes(register::CONFIG, &config);
        self.shown_generation = self.irq.config_generation();
        page.set(register::CONFIG_GENERATION, self.shown_generation);
    }

    /// The device may have changed its configuration space.
    fn refresh_config(&mut self) {
        if let Some(page) = self.page
            && self.shown_generation != self.irq.config_generation()
        {
            self.show_config(page);
            page.set(register::STATUS, self.status);
            // Only now: a driver that reads earlier would take the old one for the news.
            self.irq.tell_config();
        }
    }

    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Queues whose kicks go through an event fd; those of the others are register writes.
    pub fn polled_queues(&self) -> Vec<u32> {
        let queues = 0..self.queues.len();
        queues
            .filter(|queue| !self.device.kicked_synchronously(*queue))
            .map(|queue| queue as u32)
            .collect()
    }

    pub fn host_events(&self) -> Vec<HostEvent> {
        self.device.host_events()
    }

    /// Calls into the device with what it needs while it is active (`None` while it is not).
    fn with_device(
        &mut self,
        call: impl FnOnce(&mut dyn VirtioDevice, Option<&mut DeviceIo<'_>>) -> Result<(), DeviceError>,
    ) {
        let active = self.is_active();
        let mut io = DeviceIo {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irq,
        };
        if let Err(error) = call(self.device.as_mut(), active.then_some(&mut io)) {
            self.fail(&error);
        }
        self.refresh_config();
        // A change before the driver is there is no news, but is what it reads when it comes.
        if let (false, Some(page)) = (active, self.page) {
            self.show_config(page);
        }
    }

    /// The driver kicked `queue`.
    pub fn kicked(&mut self, queue: usize) {
        if !self.queues.get(queue).is_some_and(QueueT::ready) {
            return;
        }
        self.while_active(|device, io| device.queue_notified(io, queue));
    }

    /// A host descriptor of the device is readable.
    pub fn host_ready(&mut self, token: u16) {
        self.with_device(|device, io| device.host_ready(io, token));
    }

    /// Before pause: nothing of the device is in flight afterwards.
    pub fn drain(&mut self) {
        if self.status & DRIVER_OK == 0 {
            return;
        }
        // Also of a device that needs a reset: it may have requests in flight all the same.
        let mut io = DeviceIo {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irq,
        };
        if let Err(error) = self.device.drain(&mut io)
            && self.is_active()
        {
            self.fail(&error);
        }
        self.refresh_config();
    }

    /// After pause: whatever the driver put into its queues meanwhile is looked at.
    pub fn resume(&mut self) {
        for queue in 0..self.queues.len() {
            self.kicked(queue);
        }
    }

    fn is_active(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    fn while_active(
        &mut self,
        call: impl FnOnce(&mut dyn VirtioDevice, &mut DeviceIo<'_>) -> Result<(), DeviceError>,
    ) {
        self.with_device(|device, io| io.map_or(Ok(()), |io| call(device, io)));
    }

    /// §2.1.2: the device is in a state from which only a reset helps.
    fn fail(&mut self, error: &DeviceError) {
        crate::log_limited!(
            Level::Warn,
            "{}: needs a reset: {error}",
            self.device.name()
        );
        self.status |= NEEDS_RESET;
        if self.status & DRIVER_OK != 0 {
            self.irq.config_changed();
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue, if its registers may be written now.
    fn queue_mut(&mut self) -> Option<&mut Queue> {
        let configuring =
            self.status & (FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED) == FEATURES_OK;
        if !configuring {
            return None;
        }
        self.queues.get_mut(self.queue_sel as usize)
    }

    fn read_register(&self, offset: u64) -> u32 {
        use register as r;
        match offset {
            r::MAGIC => MAGIC,
            r::VERSION => VERSION,
            r::DEVICE_ID => self.device.device_type(),
            r::VENDOR_ID => VENDOR,
            r::DEVICE_FEATURES => word(self.offered(), self.device_features_sel),
            r::QUEUE_NUM_MAX => self.queue().map_or(0, |q| u32::from(q.max_size())),
            r::QUEUE_READY => self.queue().map_or(0, |q| u32::from(q.ready())),
            r::INTERRUPT_STATUS => self.irq.status(),
            r::STATUS => self.status,
            // There are no shared memory regions: their length is all ones (§4.2.2).
            r::SHM_LEN_LOW | r::SHM_LEN_HIGH => u32::MAX,
            r::CONFIG_GENERATION => self.irq.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        use register as r;
        match offset {
            r::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            r::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            r::DRIVER_FEATURES => self.set_driver_features(value),
            r::QUEUE_SEL => self.queue_sel = value,
            r::QUEUE_NUM => {
                let Some(queue) = self.queue_mut() else {
                    return;
                };
                // A size that is no power of two or too large is ignored by the queue, and
                // what is read back tells the driver.
                queue.set_size(u16::try_from(value).unwrap_or(0));
            }
            r::QUEUE_READY => {
                let Some(queue) = self.queue_mut() else {
                    return;
                };
                queue.set_ready(value == 1);
            }
            r::QUEUE_DESC_LOW => self.set_address(|q| q.set_desc_table_address(Some(value), None)),
            r::QUEUE_DESC_HIGH => self.set_address(|q| q.set_desc_table_address(None, Some(value))),
            r::QUEUE_DRIVER_LOW => {
                self.set_address(|q| q.set_avail_ring_address(Some(value), None));
            }
            r::QUEUE_DRIVER_HIGH => {
                self.set_address(|q| q.set_avail_ring_address(None, Some(value)));
            }
            r::QUEUE_DEVICE_LOW => self.set_address(|q| q.set_used_ring_address(Some(value), None)),
            r::QUEUE_DEVICE_HIGH => {
                self.set_address(|q| q.set_used_ring_address(None, Some(value)));
            }
            // Normally an ioeventfd takes these.
            r::QUEUE_NOTIFY => self.kicked(value as usize),
            r::INTERRUPT_ACK => self.irq.acknowledge(value),
            r::STATUS => self.set_status(value),
            _ => {}
        }
    }

    fn set_address(&mut self, set: impl FnOnce(&mut Queue)) {
        // Addresses of a queue that is ready do not move.
        if let Some(queue) = self.queue_mut().filter(|queue| !queue.ready()) {
            set(queue);
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features =
            self.driver_features & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }

    /// §3.1.1: bits are added one after the other; zero is a reset.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        let added = value & known & !self.status;
        if self.status & !value & known != 0 || self.status & FAILED != 0 {
            // A bit was taken away without a reset, or the driver has given up.
            return;
        }
        let was = self.status;
        for bit in [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK] {
            if added & bit == 0 || self.status & before(bit) != before(bit) {
                continue;
            }
            match bit {
                FEATURES_OK => self.accept_features(),
                DRIVER_OK => self.activate(),
                other => self.status |= other,
            }
        }
        self.status |= added & FAILED;
        if added & FAILED != 0 {
            crate::log_limited!(
                Level::Warn,
                "{}: the driver gave up in status {was:#x}",
                self.device.name()
            );
        }
    }

    /// FEATURES_OK reads back only if the driver's choice is acceptable (§2.2.1).
    fn accept_features(&mut self) {
        let chosen = self.driver_features;
        if chosen & !self.offered() == 0 && chosen & VERSION_1 != 0 {
            self.status |= FEATURES_OK;
        }
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for index in 0..self.queues.len() {
            let Some(queue) = self.queues.get_mut(index) else {
                continue;
            };
            queue.set_event_idx(event_idx);
            if queue.ready() && !queue.is_valid(&*self.mem) {
                self.fail(&DeviceError::BadQueue {
                    queue: index,
                    what: "its rings are not in RAM, not aligned, or of a bad size".into(),
                });
                return;
            }
        }
        self.status |= DRIVER_OK;
        let features = self.driver_features;
        self.while_active(|device, io| device.activate(io, features));
    }

    fn reset(&mut self) {
        self.drain();
        if self.status & DRIVER_OK != 0 {
            self.device.reset();
        }
        self.queues.iter_mut().for_each(QueueT::reset);
        self.irq.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
    }
}

/// The status bits that must be there before `bit` may be set.
fn before(bit: u32) -> u32 {
    match bit {
        DRIVER => ACKNOWLEDGE,
        FEATURES_OK => ACKNOWLEDGE | DRIVER,
        DRIVER_OK => ACKNOWLEDGE | DRIVER | FEATURES_OK,
        _ => 0,
    }
}

fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

impl BusDevice for Transport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            data.fill(0);
            self.device.read_config(offset, data);
            return;
        }
        // Registers are read and written as aligned 32-bit words (§4.2.2.2).
        match <&mut [u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => {
                *data = self.read_register(offset).to_le_bytes();
            }
            Ok(data) => data.fill(0),
            Err(_) => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            // §3.1.1: configuration is not touched before the driver has said what it can do.
            if self.status & DRIVER != 0 && self.status & (NEEDS_RESET | FAILED) == 0 {
                self.device.write_config(offset, data);
                if let Some(page) = self.page {
                    self.show_config(page);
                }
            }
            return;
        }
        if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
            if let Some(page) = self.page {
                self.show_registers(page);
            }
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
