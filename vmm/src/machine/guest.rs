//! A built guest: its vCPUs, devices and the handles the API reaches them by.
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::backend::layers;
use crate::kvm::{GuestBus, VcpuError, VcpuThread, Vm};
use crate::legacy::SerialRegisters;
use crate::log_warn;
use crate::memory::changes::Changes;
use crate::memory::discard::{AnonymousPages, GuestPages};
use crate::memory::handled::Faults;
use crate::memory::template::{self, TemplatePages, Zeroed};
use crate::memory::working_set::WorkingSet;
use crate::memory::{GuestRam, MemoryError};
use crate::snapshot::Saved;
use crate::virtio::balloon::BalloonHandle;
use crate::virtio::blk;
use crate::virtio::console::ConsoleHandle;
use crate::virtio::mmio::lock;

use super::events::DeviceEvents;
use super::faults::Watching;

/// How long the vCPUs may take to leave guest mode. It does so at once, unless the host is
/// in deep trouble.
pub(super) const PAUSE_WITHIN: Duration = Duration::from_secs(5);

/// What the machine keeps of a drive.
pub(super) struct DriveHandle {
    pub(super) control: blk::Control,
    pub(super) stats: Arc<blk::Stats>,
    pub(super) read_only: bool,
    /// Of a layered drive.
    pub(super) layers: Option<layers::Handle>,
}

/// Guest RAM and what it is made of.
pub(super) struct GuestMemory {
    pub(super) ram: Arc<GuestRam>,
    /// The memory file that RAM is a private view of, if the guest was restored.
    pub(super) template: Option<File>,
    /// If another process brings its pages in.
    pub(super) faults: Option<Arc<Faults>>,
    /// What ends the guest when that process has ended.
    pub(super) watching: Option<Watching>,
    /// What the balloon took.
    pub(super) zeroed: Zeroed,
    /// What was written since the last snapshot. Shared with whoever still writes one.
    pub(super) changes: Arc<Mutex<Changes>>,
}

impl GuestMemory {
    pub(super) fn booted(ram: Arc<GuestRam>) -> Self {
        let zeroed = Zeroed::default();
        Self {
            ram,
            template: None,
            faults: None,
            watching: None,
            changes: Arc::new(Mutex::new(Changes::new(zeroed.clone()))),
            zeroed,
        }
    }

    pub(super) fn restored(ram: Arc<GuestRam>, template: File) -> Self {
        Self {
            template: Some(template),
            ..Self::booted(ram)
        }
    }

    /// Missing pages are somebody else's to bring: anonymous ones, or such of a template.
    pub(super) fn handled(
        ram: Arc<GuestRam>,
        template: Option<File>,
        faults: Arc<Faults>,
    ) -> Result<Self, MemoryError> {
        let zeroed = Zeroed::default();
        let changes = Changes::beside(zeroed.clone(), &faults).map_err(MemoryError::Watch)?;
        Ok(Self {
            ram,
            template,
            faults: Some(faults),
            watching: None,
            zeroed,
            changes: Arc::new(Mutex::new(changes)),
        })
    }

    /// The faults that must be waited for before all of RAM can be read.
    pub(super) fn incomplete(&self) -> Option<&Arc<Faults>> {
        self.faults.as_ref().filter(|faults| !faults.is_complete())
    }

    /// Whether it was loaded, and can be made what it was then.
    pub(super) fn can_go_back(&self) -> bool {
        self.template.is_some()
    }

    /// Watches changes from now on.
    pub(super) fn watch(&self) -> Result<(), MemoryError> {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.watch(&self.ram).map_err(MemoryError::Watch)
    }

    /// Drops what the guest has changed since it was loaded; `false`: it was not loaded.
    pub(super) fn go_back(&self) -> Result<bool, MemoryError> {
        let Some(template) = &self.template else {
            return Ok(false);
        };
        template::go_back(&self.ram, template, &self.zeroed, self.faults.as_deref())
            .map_err(MemoryError::GoBack)?;
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.forget();
        Ok(true)
    }

    /// How its pages are given back.
    pub(super) fn pages(&self) -> Box<dyn GuestPages> {
        let zeroed = self.zeroed.clone();
        if self.template.is_some() {
            return Box::new(TemplatePages::new(zeroed));
        }
        let hook = Box::new(move |range| zeroed.insert(range));
        Box::new(AnonymousPages::with_hook(hook))
    }
}

pub(super) struct Guest {
    pub(super) vm: Vm,
    /// Registered with KVM, read by nobody.
    pub(super) _swallowed: Vec<EventFd>,
    pub(super) vcpus: Vec<VcpuThread>,
    pub(super) bus: Arc<GuestBus>,
    pub(super) devices: Vec<DeviceEvents>,
    pub(super) drives: BTreeMap<String, DriveHandle>,
    pub(super) balloon: Option<BalloonHandle>,
    pub(super) console: ConsoleHandle,
    pub(super) serial: SerialRegisters,
    pub(super) memory: GuestMemory,
    /// What it was loaded from, if it was.
    pub(super) origin: Option<Origin>,
}

/// A snapshot to go back to.
pub(super) struct Origin {
    pub(super) saved: Saved,
    pub(super) working_set: WorkingSet,
}

impl Guest {
    pub(super) fn resume_vcpus(&self) {
        self.vcpus.iter().for_each(VcpuThread::resume);
    }

    /// Stops all vCPUs; on failure those that stopped run again.
    pub(super) fn pause_vcpus(&self) -> Result<(), VcpuError> {
        self.vcpus.iter().for_each(VcpuThread::request_pause);
        let deadline = Instant::now() + PAUSE_WITHIN;
        let stopped = self
            .vcpus
            .iter()
            .try_for_each(|vcpu| vcpu.wait_paused(deadline));
        if stopped.is_err() {
            self.resume_vcpus();
        }
        stopped
    }

    /// Nothing is in flight afterwards, as long as no vCPU runs.
    pub(super) fn drain_devices(&self) {
        for device in &self.devices {
            lock(&device.transport).drain();
        }
    }

    /// Makes what was written to layered drives durable; a raw one has it in the page cache.
    pub(super) fn close_drives(&self) {
        for (id, drive) in &self.drives {
            let closed = drive.layers.as_ref().map_or(Ok(()), layers::Handle::close);
            if let Err(error) = closed {
                log_warn!("drive {id:?}: what was not flushed may be lost: {error}");
            }
        }
    }

    /// Looks at what drivers queued while nobody looked.
    pub(super) fn resume_devices(&self) {
        for device in &self.devices {
            lock(&device.transport).resume();
        }
    }
}
