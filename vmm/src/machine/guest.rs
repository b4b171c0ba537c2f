//! A built guest: its vCPUs, devices and the handles the API reaches them by.
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::kvm::{GuestBus, VcpuError, VcpuThread, Vm};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk;
use crate::virtio::console::ConsoleHandle;
use crate::virtio::device::{DeviceError, DeviceIo};
use crate::virtio::mmio::{Transport, lock};

use super::events::DeviceEvents;

/// How long a vCPU may take to leave guest mode. It does so at once, unless the host is
/// in deep trouble.
const PAUSE_WITHIN: Duration = Duration::from_secs(5);

pub struct Guest {
    /// Keeps the VM's descriptor open, and with it memory slots and irqfds.
    pub(super) _vm: Vm,
    pub(super) vcpus: Vec<VcpuThread>,
    pub(super) bus: Arc<GuestBus>,
    pub(super) devices: Vec<DeviceEvents>,
    pub(super) drives: BTreeMap<String, blk::Control>,
    pub(super) balloon: Option<Arc<Mutex<Transport>>>,
    pub(super) console: ConsoleHandle,
}

impl Guest {
    pub fn resume_vcpus(&self) {
        self.vcpus.iter().for_each(VcpuThread::resume);
    }

    /// Stops all vCPUs; on failure those that stopped run again.
    pub fn pause_vcpus(&self) -> Result<(), VcpuError> {
        self.vcpus.iter().for_each(VcpuThread::request_pause);
        let stopped = self
            .vcpus
            .iter()
            .try_for_each(|vcpu| vcpu.wait_paused(PAUSE_WITHIN));
        if stopped.is_err() {
            self.resume_vcpus();
        }
        stopped
    }

    /// Nothing is in flight afterwards, as long as no vCPU runs.
    pub fn drain_devices(&self) {
        for device in &self.devices {
            lock(&device.transport).drain();
        }
    }

    /// Looks at what drivers queued while nobody looked.
    pub fn resume_devices(&self) {
        for device in &self.devices {
            lock(&device.transport).resume();
        }
    }

    /// Calls a method of the balloon; `None` if there is none, or it needs a reset.
    pub fn with_balloon<R>(
        &self,
        call: impl FnOnce(&mut Balloon, Option<&mut DeviceIo<'_>>) -> Result<R, DeviceError>,
    ) -> Option<R> {
        let transport = self.balloon.as_ref()?;
        lock(transport).with(call)
    }
}
