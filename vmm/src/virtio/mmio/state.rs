//! What a snapshot keeps of a device's registers and queues.
use virtio_queue::{Queue, QueueState, QueueT};

use super::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, DeviceIo, FAILED, FEATURES_OK, NEEDS_RESET, Transport,
    VERSION_1, before,
};
use crate::virtio::device::{DeviceState, RestoreError};

/// A transport and its device, drained, while no vCPU runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransportState {
    /// Device id (virtio 1.2 §5).
    pub device_type: u32,
    pub status: u32,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub driver_features: u64,
    pub queue_sel: u32,
    pub interrupt_status: u32,
    pub config_generation: u32,
    pub queues: Vec<QueueState>,
    pub device: DeviceState,
}

impl Transport {
    /// The state after [`Transport::drain`].
    pub fn save(&self) -> TransportState {
        TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.irq.status(),
            config_generation: self.irq.config_generation(),
            queues: self.queues.iter().map(Queue::state).collect(),
            device: self.device.save(),
        }
    }

    /// Becomes what was saved, whatever it has become since.
    pub fn go_back(&mut self, saved: &TransportState) -> Result<(), RestoreError> {
        self.reset();
        self.restore(saved)
    }

    /// Becomes what was saved. Nothing of `saved` is trusted: it must be a state that a driver
    /// could have brought this very device into.
    pub fn restore(&mut self, saved: &TransportState) -> Result<(), RestoreError> {
        let wrong = |what: String| Err(RestoreError::Invalid(what));
        if saved.device_type != self.device.device_type() {
            return wrong(format!("device type {}", saved.device_type));
        }
        if !is_reachable(saved.status) {
            return wrong(format!("status {:#x}", saved.status));
        }
        let agreed = saved.status & FEATURES_OK != 0;
        let features = saved.driver_features;
        if agreed && (features & !self.offered() != 0 || features & VERSION_1 == 0) {
            let offered = self.offered();
            return wrong(format!(
                "features {features:#x} were agreed, {offered:#x} are offered"
            ));
        }
        self.restore_queues(saved)?;
        self.status = saved.status;
        self.device_features_sel = saved.device_features_sel;
        self.driver_features_sel = saved.driver_features_sel;
        self.driver_features = features;
        self.queue_sel = saved.queue_sel;
        self.irq
            .restore(saved.interrupt_status, saved.config_generation);
        let was_active = self.status & DRIVER_OK != 0;
        let mut io = DeviceIo {
            mem: &self.mem,
            queues: &mut self.queues,
            irq: &self.irq,
        };
        self.device
            .restore(was_active.then_some(&mut io), features, &saved.device)?;
        if let Some(page) = self.page {
            self.show_in(page);
            // The device changed its configuration, of which the driver hears now.
            if self.irq.config_generation() != saved.config_generation {
                self.irq.tell_config();
            }
        }
        Ok(())
    }

    fn restore_queues(&mut self, saved: &TransportState) -> Result<(), RestoreError> {
        if saved.queues.len() != self.queues.len() {
            let count = saved.queues.len();
            return Err(RestoreError::Invalid(format!("{count} queues")));
        }
        let active = saved.status & DRIVER_OK != 0;
        for ((queue, state), index) in self.queues.iter_mut().zip(&saved.queues).zip(0..) {
            let wrong = |what: &str| RestoreError::Invalid(format!("queue {index}: {what}"));
            if state.max_size != queue.max_size() {
                return Err(wrong("another size"));
            }
            let restored =
                Queue::try_from(*state).map_err(|e| wrong(&format!("not a queue: {e}")))?;
            if active && restored.ready() && !restored.is_valid(&*self.mem) {
                return Err(wrong("its rings are not in RAM, or of a bad size"));
            }
            *queue = restored;
        }
        Ok(())
    }
}

/// Whether a driver can bring a device into this status.
fn is_reachable(status: u32) -> bool {
    let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED;
    let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    status & !known == 0
        && steps
            .iter()
            .all(|bit| status & bit == 0 || status & before(*bit) == before(*bit))
}
