//! The device: moves bytes between the two queues of port 0 and the hub.
use std::io;
use std::os::fd::RawFd;

use super::ConsoleConfig;
use super::hub::{ConsoleHandle, Hub};
use crate::memory::GuestRam;
use crate::virtio::chain::{self, Again, Chain, Outcome};
use crate::virtio::device::{DeviceError, DeviceIo, HostEvent, VirtioDevice};

/// Console device (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Linux fills the receive queue with a page of its RAM per entry.
const QUEUE_SIZES: [u16; 2] = [16, 64];
/// VIRTIO_RING_F_INDIRECT_DESC and VIRTIO_RING_F_EVENT_IDX.
const FEATURES: u64 = 1 << 28 | 1 << 29;

const HUB: u16 = 0;
const AGAIN: u16 = 1;

/// Most bytes taken from one write, however long its buffers. Linux writes a page at most.
pub(super) const MAX_WRITE: u32 = 64 << 10;
const CHUNK: usize = 1024;

pub struct Console {
    hub: ConsoleHandle,
    hub_fd: RawFd,
    chain: Chain,
    again: Again,
}

impl Console {
    pub fn new(config: ConsoleConfig) -> io::Result<Self> {
        let hub = ConsoleHandle::new(config)?;
        let hub_fd = hub.lock().fd();
        Ok(Self {
            hub,
            hub_fd,
            chain: Chain::new(),
            again: Again::new()?,
        })
    }

    /// The machine's side, which outlives the device.
    pub fn handle(&self) -> ConsoleHandle {
        self.hub.clone()
    }

    /// Takes what the guest wrote.
    fn transmit(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let mut hub = self.hub.lock();
        let result = chain::serve(io, TRANSMIT, &mut self.chain, |mem, chain| {
            take(mem, chain, &mut hub)
        });
        hub.pump();
        if result? {
            self.again.ask();
        }
        Ok(())
    }

    /// Gives the guest what was typed, as far as it has buffers for it.
    fn receive(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let mut hub = self.hub.lock();
        if hub.input.is_empty() {
            return Ok(());
        }
        let result = chain::serve(io, RECEIVE, &mut self.chain, |mem, chain| {
            give(mem, chain, &mut hub)
        });
        hub.update_clients();
        if result? {
            self.again.ask();
        }
        Ok(())
    }
}

fn take(mem: &GuestRam, chain: &Chain, hub: &mut Hub) -> Result<Outcome, DeviceError> {
    let len = chain.readable_len().min(MAX_WRITE);
    hub.stats.truncated_bytes += u64::from(chain.readable_len() - len);
    let mut chunk = [0; CHUNK];
    let mut at = 0;
    while at < len {
        let wanted = usize::try_from(len - at).map_or(CHUNK, |left| left.min(CHUNK));
        let part = chunk.get_mut(..wanted).unwrap_or_default();
        let got = chain
            .read(mem, at, part)
            .map_err(|e| chain::bad_queue(TRANSMIT, &e))?;
        hub.push(part.get(..got).unwrap_or_default());
        match u32::try_from(got) {
            Ok(got) if got > 0 => at += got,
            _ => break,
        }
    }
    Ok(Outcome::Used(0))
}

fn give(mem: &GuestRam, chain: &Chain, hub: &mut Hub) -> Result<Outcome, DeviceError> {
    if hub.input.is_empty() {
        return Ok(Outcome::PutBack);
    }
    let (first, second) = hub.input.as_slices();
    let outside = |e| chain::bad_queue(RECEIVE, &e);
    let mut given = chain.write(mem, 0, first).map_err(outside)?;
    if given == first.len() {
        let offset = u32::try_from(given).unwrap_or(u32::MAX);
        given += chain.write(mem, offset, second).map_err(outside)?;
    }
    hub.input.drain(..given);
    Ok(Outcome::Used(u32::try_from(given).unwrap_or(u32::MAX)))
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "console"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    /// Without SIZE, MULTIPORT and EMERG_WRITE no field is valid (§5.3.4).
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, io: &mut DeviceIo<'_>, _features: u64) -> Result<(), DeviceError> {
        self.transmit(io)?;
        self.receive(io)
    }

    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        match queue {
            TRANSMIT => self.transmit(io),
            _ => self.receive(io),
        }
    }

    fn host_events(&self) -> Vec<HostEvent> {
        let event = |fd, token| HostEvent { fd, token };
        vec![event(self.hub_fd, HUB), event(self.again.fd(), AGAIN)]
    }

    fn host_ready(&mut self, io: Option<&mut DeviceIo<'_>>, token: u16) -> Result<(), DeviceError> {
        if token == HUB {
            self.hub.lock().serve();
        } else {
            self.again.clear();
        }
        let Some(io) = io else {
            return Ok(());
        };
        if token == AGAIN {
            self.transmit(io)?;
        }
        self.receive(io)
    }

    fn reset(&mut self) {
        self.again.clear();
        // What was typed was meant for the driver that went.
        let mut hub = self.hub.lock();
        hub.input.clear();
        hub.update_clients();
    }
}
