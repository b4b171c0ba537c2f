//! The contract between a virtio device and its transport.
//!
//! ```text
//!            features agreed,                 driver writes 0,
//!            DRIVER_OK                        or bad request
//!   idle ───────────────────► active ─────────────────────────► idle / needs reset
//!          activate()          │  ▲           reset()
//!                       drain()│  │ queue_notified(), host_ready()
//!                              ▼  │
//!                             paused (vCPUs stopped, nothing in flight)
//! ```
//!
//! The transport owns the queues and calls exactly one method at a time, under one lock per
//! device, from whichever thread has work (a vCPU for registers, the event loop for kicks
//! and host descriptors). A device never sees KVM: it has guest RAM, its queues, and an
//! [`Interrupt`]. So every device runs in unit tests and fuzzers without a VM.
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;

use crate::memory::GuestRam;

/// Bits of `InterruptStatus` (virtio 1.2 §4.2.2).
const USED_RING: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// What raises the interrupt line of a device (an irqfd in the machine, a counter in tests).
pub trait InterruptLine: Send + Sync {
    fn trigger(&self) -> io::Result<()>;
}

/// The interrupt of one device: `InterruptStatus` and the line. Shared between the transport
/// (which acknowledges) and the device (which raises).
///
/// Where the guest reads its registers without an exit, `InterruptStatus` says *used buffers*
/// all the time: then a driver's acknowledgement of that bit changes nothing and need not reach
/// us either. A driver that looks into its rings for nothing finds nothing; the line is edge-triggered
/// and raised only for a reason.
#[derive(Clone)]
pub struct Interrupt {
    status: Status,
    /// `ConfigGeneration`: changes with configuration space (virtio 1.2 §2.5).
    generation: Arc<AtomicU32>,
    line: Arc<dyn InterruptLine>,
}

#[derive(Clone)]
enum Status {
    /// Read and acknowledged by exits.
    Own(Arc<AtomicU32>),
    /// A register that the guest reads.
    Shared(&'static AtomicU32),
}

impl Interrupt {
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self {
            status: Status::Own(Arc::default()),
            generation: Arc::default(),
            line,
        }
    }

    /// `register` is `InterruptStatus` in a page that the guest reads.
    pub fn with_register(line: Arc<dyn InterruptLine>, register: &'static AtomicU32) -> Self {
        register.store(USED_RING, Ordering::Release);
        Self {
            status: Status::Shared(register),
            ..Self::new(line)
        }
    }

    /// Tells the driver that used buffers wait in some queue. Callers ask
    /// `Queue::needs_notification` first.
    pub fn used_ring(&self) {
        if let Status::Own(status) = &self.status {
            status.fetch_or(USED_RING, Ordering::AcqRel);
        }
        self.trigger();
    }

    /// Tells the driver that configuration space, or the need for a reset, changed. Where the
    /// driver reads it in a page, the transport has to show it there first: it calls
    /// [`Self::tell_config`] then.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Status::Own(_) = self.status {
            self.tell_config();
        }
    }

    /// The second half of [`Self::config_changed`]: the interrupt.
    pub fn tell_config(&self) {
        self.word().fetch_or(CONFIG_CHANGED, Ordering::AcqRel);
        self.trigger();
    }

    /// `InterruptStatus` as the driver reads it.
    pub fn status(&self) -> u32 {
        self.word().load(Ordering::Acquire)
    }

    /// `ConfigGeneration` as the driver reads it; wraps.
    pub fn config_generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// `InterruptACK`: clears `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.word()
            .fetch_and(!bits | self.always_on(), Ordering::AcqRel);
    }

    /// Status and configuration generation, as they were saved.
    pub fn restore(&self, status: u32, generation: u32) {
        let status = status & (USED_RING | CONFIG_CHANGED) | self.always_on();
        self.word().store(status, Ordering::Release);
        self.generation.store(generation, Ordering::Release);
    }

    /// Device reset.
    pub fn reset(&self) {
        self.word().store(self.always_on(), Ordering::Release);
    }

    fn word(&self) -> &AtomicU32 {
        match &self.status {
            Status::Own(status) => status,
            Status::Shared(register) => register,
        }
    }

    fn always_on(&self) -> u32 {
        match self.status {
            Status::Own(_) => 0,
            Status::Shared(_) => USED_RING,
        }
    }

    fn trigger(&self) {
        // An eventfd write fails only when 2^64-1 interrupts are pending, and then the
        // line is raised already.
        let _ = self.line.trigger();
    }
}

/// What a device works with while it is active.
pub struct DeviceIo<'a> {
    pub mem: &'a GuestRam,
    /// As many as `queue_sizes()`; a queue the driver did not enable has `ready() == false`
    /// and must not be popped.
    pub queues: &'a mut [Queue],
    pub irq: &'a Interrupt,
}

/// A host descriptor the event loop polls (level-triggered) for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostEvent {
    /// Open as long as the device lives. Devices with descriptors that come and go (vsock)
    /// own an epoll instance and name only that.
    pub fd: RawFd,
    /// Handed back to `host_ready`.
    pub token: u16,
}

/// The driver broke the rules, or the device cannot go on. The transport logs it, sets
/// DEVICE_NEEDS_RESET (virtio 1.2 §2.1.2) and ignores the device's queues until the driver
/// resets it. A request that merely fails (I/O error, unknown type) is not an error here: it
/// is answered in its own status byte.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("queue {queue}: {what}")]
    BadQueue { queue: usize, what: String },
    #[error("{what}: {source}")]
    Host {
        what: &'static str,
        source: io::Error,
    },
}

/// What a device keeps beside its queues and its configuration, as far as a snapshot has to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceState {
    #[default]
    Nothing,
    Block {
        /// In sectors of 512 bytes, as the driver knows it.
        capacity: u64,
    },
    Balloon {
        target_pages: u32,
        actual_pages: u32,
        hinting_host_cmd: u32,
        hinting_guest_cmd: Option<u32>,
        hinting_acknowledge: bool,
    },
    Vsock {
        /// Of the next connection that the host makes.
        next_host_port: u32,
    },
}

/// Why a device cannot be what it was when it was saved.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("the snapshot's state is not that of such a device: {0}")]
    Invalid(String),
    #[error("the drive has {found} sectors, and the guest knows {known}: give it the same disk")]
    Smaller { found: u64, known: u64 },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// One virtio device. Implementations are `Send`, never block on anything a guest or a
/// peer controls, and do at most a queue's length of work per call.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2 §5): 2 is a block device, 19 a socket device, …
    fn device_type(&self) -> u32;

    /// For logs, metrics and errors: `blk/rootfs`, `vsock`.
    fn name(&self) -> &str;

    /// The maximum size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Offered feature bits. The transport adds VIRTIO_F_VERSION_1 and, where the device has
    /// offered it, handles VIRTIO_RING_F_EVENT_IDX and VIRTIO_RING_F_INDIRECT_DESC in the queues.
    fn features(&self) -> u64;

    /// Reads configuration space. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space; writes to read-only fields are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// DRIVER_OK with `features` agreed. The queues are valid.
    fn activate(&mut self, io: &mut DeviceIo<'_>, features: u64) -> Result<(), DeviceError>;

    /// The driver kicked `queue`, or the machine resumed and asks every queue to be looked at.
    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError>;

    /// Whether a kick of `queue` must be served before the driver goes on, or is too rare for an ioeventfd: then it
    /// takes the exit of the register write.
    fn kicked_synchronously(&self, _queue: usize) -> bool {
        false
    }

    /// Host descriptors to poll from the device's creation on.
    fn host_events(&self) -> Vec<HostEvent> {
        Vec::new()
    }

    /// The descriptor with `token` is readable. `io` is `None` while the device is not
    /// active: then it must make the descriptor unreadable (read it, or keep the event for
    /// later) lest the event loop spin.
    fn host_ready(
        &mut self,
        _io: Option<&mut DeviceIo<'_>>,
        _token: u16,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Finishes or takes back every request in flight: afterwards nothing touches guest RAM
    /// until the next call. Before pause and snapshot.
    fn drain(&mut self, _io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What a snapshot keeps of the device, which is drained.
    fn save(&self) -> DeviceState {
        DeviceState::Nothing
    }

    /// Becomes, before the event loop or a driver has ever called it, the device that was saved.
    /// `io` is there if that one was active, with `features` agreed; the queues stand where they
    /// stood and will be looked at once when the machine resumes.
    fn restore(
        &mut self,
        _io: Option<&mut DeviceIo<'_>>,
        _features: u64,
        state: &DeviceState,
    ) -> Result<(), RestoreError> {
        if *state == DeviceState::Nothing {
            Ok(())
        } else {
            Err(RestoreError::Invalid(format!("{state:?}")))
        }
    }

    /// Back to the state before `activate`. The transport has drained the device, and resets
    /// the queues itself.
    fn reset(&mut self);
}
