//! Packets for the guest.
use std::io;

use super::connection::Event;
use super::muxer::{Id, Next};
use super::packet::{HEADER_LEN_U32, Header};
use super::{RX, Vsock};
use crate::backend::unix::IoVecs;
use crate::memory::GuestRam;
use crate::virtio::chain::{self, Budget, Chain, bad_queue};
use crate::virtio::device::{DeviceError, DeviceIo};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

/// Most receive buffers filled by one read of a host's socket. Linux's are 4 KiB.
const BATCH: usize = 32;

impl Vsock {
    /// Gives the guest what it is owed, while it offers buffers; `true`: a queue's length was
    /// done and more is left.
    pub(super) fn fill_rx(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        if !self.muxer.has_outgoing() {
            return Ok(false);
        }
        let Some(queue) = io.queues.get_mut(RX).filter(|queue| queue.ready()) else {
            return Ok(false);
        };
        let mut budget = Budget::new(queue, RX);
        let mut used = false;
        let result = self.fill(io.mem, queue, &mut budget, &mut used);
        if used {
            chain::notify(io.mem, queue, RX, io.irq)?;
        }
        result
    }

    fn fill(
        &mut self,
        mem: &GuestRam,
        queue: &mut Queue,
        budget: &mut Budget,
        used: &mut bool,
    ) -> Result<bool, DeviceError> {
        while self.muxer.has_outgoing() {
            if budget.is_spent() {
                return Ok(true);
            }
            if !self.take_chain(mem, queue, budget, 0)? {
                // Ask for a kick, unless buffers came meanwhile.
                let more = queue
                    .enable_notification(mem)
                    .map_err(|e| bad_queue(RX, &e))?;
                if more {
                    continue;
                }
                return Ok(false);
            }
            match self.muxer.next_packet() {
                Some(Next::Control(header)) => {
                    let chain = self.rx_chains.first();
                    put(mem, queue, chain, &header)?;
                    *used = true;
                }
                Some(Next::Data { id, limit }) => {
                    *used |= self.fill_data(mem, queue, budget, id, limit)?;
                    self.host.settle(id, &mut self.muxer);
                }
                None => queue.go_to_previous_position(),
            }
        }
        Ok(false)
    }

    /// Loads the next receive chain into place `index`; `false`: there is none.
    fn take_chain(
        &mut self,
        mem: &GuestRam,
        queue: &mut Queue,
        budget: &mut Budget,
        index: usize,
    ) -> Result<bool, DeviceError> {
        if self.rx_chains.len() <= index {
            self.rx_chains.push(Chain::new());
        }
        let Some(chain) = self.rx_chains.get_mut(index) else {
            return Ok(false);
        };
        if !budget.next(mem, queue, chain)? {
            return Ok(false);
        }
        if chain.writable_len() <= HEADER_LEN_U32 {
            return Err(bad_queue(RX, &"a receive buffer without room for data"));
        }
        Ok(true)
    }

    /// Reads up to `limit` bytes of the host's socket into as many receive buffers as the last
    /// read filled, the first of which is loaded. Returns whether any was used.
    fn fill_data(
        &mut self,
        mem: &GuestRam,
        queue: &mut Queue,
        budget: &mut Budget,
        id: Id,
        limit: u32,
    ) -> Result<bool, DeviceError> {
        if let Some(used) = self.fill_early(mem, queue, id, limit)? {
            return Ok(used);
        }
        let limit = limit as usize;
        let batch = self.host.batch(id);
        let mut data = IoVecs::new(&mut self.spare);
        let mut loaded = 0;
        loop {
            if let Some(chain) = self.rx_chains.get(loaded) {
                let room = limit - data.len();
                data.push(mem, chain.writable(), HEADER_LEN_U32, room);
            }
            loaded += 1;
            if loaded >= batch || data.len() >= limit {
                break;
            }
            match self.take_chain(mem, queue, budget, loaded) {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    data.recycle(&mut self.spare);
                    return Err(e);
                }
            }
        }
        let asked = data.len();
        let got = self.host.recv(id, &data);
        data.recycle(&mut self.spare);

        let filled = self.after_read(id, asked, loaded, got);
        let mut left = filled;
        let mut chains = 0;
        while left > 0 {
            let Some(chain) = self.rx_chains.get(chains) else {
                break;
            };
            let len = left.min(chain.writable_len() - HEADER_LEN_U32);
            if let Some(header) = self.muxer.data_header(id, len) {
                put(mem, queue, Some(chain), &header)?;
            }
            left -= len;
            chains += 1;
        }
        for _ in chains..loaded {
            queue.go_to_previous_position();
        }
        self.muxer.schedule(id);
        Ok(chains > 0)
    }

    /// Sends what came behind the `CONNECT` line; `None`: nothing did.
    fn fill_early(
        &mut self,
        mem: &GuestRam,
        queue: &mut Queue,
        id: Id,
        limit: u32,
    ) -> Result<Option<bool>, DeviceError> {
        let mut bytes = self.host.take_early(id);
        let (Some(chain), false) = (self.rx_chains.first(), bytes.is_empty()) else {
            return Ok(None);
        };
        let room = limit.min(chain.writable_len() - HEADER_LEN_U32) as usize;
        let rest = bytes.split_off(room.min(bytes.len()));
        chain
            .write(mem, HEADER_LEN_U32, &bytes)
            .map_err(|e| bad_queue(RX, &e))?;
        let len = u32::try_from(bytes.len()).unwrap_or(limit);
        if let Some(header) = self.muxer.data_header(id, len) {
            put(mem, queue, Some(chain), &header)?;
        }
        self.host.keep_early(id, rest);
        self.muxer.schedule(id);
        Ok(Some(true))
    }

    /// Draws the conclusions of a read; returns how many bytes there are.
    fn after_read(&mut self, id: Id, asked: usize, loaded: usize, got: io::Result<usize>) -> u32 {
        match got {
            Ok(0) => {
                self.muxer.set_readable(id, false);
                let event = self.host.end_of_stream(id);
                self.muxer.apply(id, event, self.host.now());
                0
            }
            Ok(len) => {
                let full = len == asked;
                if full {
                    self.host.set_batch(id, (loaded * 2).min(BATCH));
                } else {
                    self.host.set_batch(id, 1.max(loaded / 2));
                    // A short read emptied the socket: the next byte is a new edge. Not so if
                    // its end was announced already.
                    let ending = self.host.is_ending(id);
                    self.muxer.set_readable(id, ending);
                }
                u32::try_from(len).unwrap_or(0)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.muxer.set_readable(id, false);
                0
            }
            Err(_) => {
                self.muxer.set_readable(id, false);
                self.muxer.apply(id, Event::HostGone, self.host.now());
                0
            }
        }
    }
}

/// Writes `header` to the start of `chain` and gives the chain back with the packet's bytes.
fn put(
    mem: &GuestRam,
    queue: &mut Queue,
    chain: Option<&Chain>,
    header: &Header,
) -> Result<(), DeviceError> {
    let Some(chain) = chain else { return Ok(()) };
    chain
        .write(mem, 0, &header.to_bytes())
        .map_err(|e| bad_queue(RX, &e))?;
    chain::add_used(mem, queue, RX, chain.head(), HEADER_LEN_U32 + header.len)
}
