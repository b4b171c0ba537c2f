//! Between a restore and the moment in which the guest has taken it.
//!
//! A restored guest believes in connections whose other ends stayed with its parent. A transport
//! reset (virtio 1.2 §5.10.6.7) tells it that they are gone. Linux handles that event beside its
//! receive queue, and cuts *every* connection that is there at that moment: one made right after
//! the restore would be cut too. So the device takes nothing from the host and nothing from the
//! guest until the guest gives the event's buffer back, which Linux does after it has acted. Who
//! connects meanwhile waits in the listener's backlog.
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::{EVENT, Vsock};
use crate::memory::GuestRam;
use crate::virtio::chain::{self, Budget, bad_queue};
use crate::virtio::device::{DeviceError, DeviceIo};
use virtio_queue::Queue;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Interlude {
    #[default]
    Over,
    /// The guest has to be told, as soon as it offers a buffer.
    Untold,
    /// It has been told; its available index was this then.
    Told { avail: u16 },
}

impl Interlude {
    pub(super) fn begin() -> Self {
        Self::Untold
    }
}

impl Vsock {
    /// Whether the guest has taken a reset that it was due. When it has, the device begins to
    /// take connections.
    pub(super) fn is_through(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        if self.interlude == Interlude::Over {
            return Ok(true);
        }
        let Some(queue) = io.queues.get_mut(EVENT).filter(|queue| queue.ready()) else {
            // A driver without an event queue cannot be told, and waits for nothing.
            return self.go_on();
        };
        if self.interlude == Interlude::Untold {
            let mut budget = Budget::new(queue, EVENT);
            if budget.next(io.mem, queue, &mut self.tx_chain)? {
                let chain = &self.tx_chain;
                let written = chain
                    .write(io.mem, 0, &TRANSPORT_RESET)
                    .map_err(|e| bad_queue(EVENT, &e))?;
                let len = u32::try_from(written).unwrap_or(0);
                chain::add_used(io.mem, queue, EVENT, chain.head(), len)?;
                // Before the driver hears of it: what it adds from now on is the answer.
                let avail = avail_index(io.mem, queue)?;
                ask_for_kick_after(io.mem, queue, avail)?;
                chain::notify(io.mem, queue, EVENT, io.irq)?;
                self.interlude = Interlude::Told { avail };
            } else {
                ask_for_kick_after(io.mem, queue, queue.next_avail())?;
            }
            return Ok(false);
        }
        let Interlude::Told { avail } = self.interlude else {
            return Ok(false);
        };
        if avail_index(io.mem, queue)? == avail {
            return Ok(false);
        }
        self.go_on()
    }

    fn go_on(&mut self) -> Result<bool, DeviceError> {
        self.interlude = Interlude::Over;
        self.listen()?;
        // Packets the guest has queued since wait for a look.
        self.host.ask_again();
        Ok(true)
    }
}

fn avail_index(mem: &GuestRam, queue: &Queue) -> Result<u16, DeviceError> {
    let index = queue.avail_idx(mem, std::sync::atomic::Ordering::Acquire);
    Ok(index.map_err(|e| bad_queue(EVENT, &e))?.0)
}

/// Has the driver kick when its available index passes `index` (virtio 1.2 §2.7.10), with or
/// without EVENT_IDX. The event queue is never looked at otherwise, so what `avail_event` says
/// is nobody else's.
fn ask_for_kick_after(mem: &GuestRam, queue: &Queue, index: u16) -> Result<(), DeviceError> {
    const RING: u64 = 4;
    const ELEMENT: u64 = 8;
    let used = queue.used_ring();
    let avail_event = used + RING + u64::from(queue.size()) * ELEMENT;
    mem.write_obj(0u16.to_le(), GuestAddress(used))
        .and_then(|()| mem.write_obj(index.to_le(), GuestAddress(avail_event)))
        .map_err(|e| bad_queue(EVENT, &e))
}
