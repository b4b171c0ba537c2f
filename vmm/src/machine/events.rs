//! What the event loop polls: the machine's own descriptors, and those of every device.
use std::cell::Cell;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ending::Ending;
use super::faults::Completed;
use crate::kvm::Fault;
use crate::legacy::MachineEvent;
use crate::virtio::mmio::{Transport, lock};

/// From vCPU threads to the event loop.
#[derive(Debug)]
pub(super) enum Notice {
    Event(MachineEvent),
    Fault(Fault),
    Ending(Ending),
    /// Guest RAM is complete, or cannot be completed; for the call that waited for it.
    Completed(Box<Completed>),
}

/// The sending end of the notices. What a guest tells is passed on the first time only: it can
/// write these registers for ever, on all its vCPUs, and nothing it says twice means more.
#[derive(Clone)]
pub(super) struct Notifier {
    queue: Arc<Mutex<Sender<Notice>>>,
    waker: Arc<EventFd>,
    /// Guest's events that were sent, by bit.
    told: Arc<AtomicU32>,
}

impl Notifier {
    pub(super) fn send(&self, notice: Notice) {
        if let Notice::Event(event) = notice {
            let bit = 1 << event as u32;
            if self.told.fetch_or(bit, Ordering::AcqRel) & bit != 0 {
                return;
            }
        }
        let queue = self
            .queue
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // Fails only when the event loop has ended, and then nobody needs the notice.
        let _ = queue.send(notice);
        let _ = self.waker.write(1);
    }
}

/// The receiving end.
pub(super) struct Notices {
    queue: Receiver<Notice>,
    waker: Arc<EventFd>,
}

impl Notices {
    pub(super) fn new() -> std::io::Result<(Notifier, Self)> {
        let (sender, queue) = channel();
        let waker = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let notifier = Notifier {
            queue: Arc::new(Mutex::new(sender)),
            waker: Arc::clone(&waker),
            told: Arc::default(),
        };
        Ok((notifier, Self { queue, waker }))
    }

    pub(super) fn next(&self) -> Option<Notice> {
        let _ = self.waker.read();
        self.queue.try_recv().ok()
    }

    pub(super) fn fd(&self) -> RawFd {
        self.waker.as_raw_fd()
    }
}

/// What woke the event loop beside devices; read and cleared by the loop itself.
#[derive(Clone, Default)]
pub(super) struct Woken {
    pub(super) commands: Rc<Cell<bool>>,
    pub(super) notices: Rc<Cell<bool>>,
    pub(super) signals: Rc<Cell<bool>>,
}

/// A subscriber of the event manager.
pub(super) enum Subscriber {
    /// Descriptors whose readers are in the loop: the flags say which is ready.
    Control {
        sources: Vec<(RawFd, Rc<Cell<bool>>)>,
    },
    Device(DeviceEvents),
}

/// The queues and host descriptors of one device.
#[derive(Clone)]
pub(super) struct DeviceEvents {
    pub(super) transport: Arc<Mutex<Transport>>,
    /// Queues, each with what KVM signals when the driver kicks it.
    pub(super) kicks: Arc<[(u32, EventFd)]>,
}

/// Event data from here on are tokens of host descriptors, below are queues.
const HOST_TOKENS: u32 = 1 << 16;

impl Subscriber {
    fn device_event(device: &DeviceEvents, data: u32) {
        let mut transport = lock(&device.transport);
        match data.checked_sub(HOST_TOKENS) {
            Some(token) => transport.host_ready(token as u16),
            None => transport.kicked(data as usize),
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = match self {
            Self::Control { sources } => sources.iter().zip(0..).try_for_each(|((fd, _), data)| {
                ops.add(Events::with_data_raw(*fd, data, EventSet::IN))
            }),
            Self::Device(device) => {
                // Edge-triggered kicks are never read: KVM signals each, and a read would
                // cost a system call a kick.
                let kicks = device.kicks.iter().map(|(queue, fd)| {
                    Events::with_data(fd, *queue, EventSet::IN | EventSet::EDGE_TRIGGERED)
                });
                let host = lock(&device.transport).host_events();
                let host = host.iter().map(|event| {
                    let data = HOST_TOKENS + u32::from(event.token);
                    Events::with_data_raw(event.fd, data, EventSet::IN)
                });
                kicks.chain(host).try_for_each(|events| ops.add(events))
            }
        };
        if let Err(error) = added {
            crate::log_error!("a descriptor cannot be polled: {error:?}");
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        match self {
            Self::Control { sources } => {
                if let Some((_, ready)) = sources.get(events.data() as usize) {
                    ready.set(true);
                }
            }
            Self::Device(device) => Self::device_event(device, events.data()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_repeats_itself_fills_no_queue() {
        let (notifier, notices) = Notices::new().unwrap();
        for _ in 0..10_000 {
            for event in [
                MachineEvent::CrashLoaded,
                MachineEvent::Panicked,
                MachineEvent::Reset,
            ] {
                notifier.clone().send(Notice::Event(event));
            }
        }
        notifier.send(Notice::Fault(Fault::TripleFault));
        let mut got = Vec::new();
        while let Some(notice) = notices.next() {
            got.push(format!("{notice:?}"));
        }
        assert_eq!(
            got,
            [
                "Event(CrashLoaded)",
                "Event(Panicked)",
                "Event(Reset)",
                "Fault(TripleFault)"
            ]
        );
    }
}
