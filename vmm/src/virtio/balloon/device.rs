//! The device: takes page numbers and ranges from the queues.
use std::io;

use virtio_queue::QueueT;

use super::handle::{BalloonHandle, Shared};
use super::pages::{self, MAX_PFNS, PAGE_SHIFT};
use super::queues::{F_DEFLATE_ON_OOM, F_HINTING, F_REPORTING, F_STATS, Role};
use crate::config::Balloon as Config;
use crate::memory::GuestRam;
use crate::memory::discard::{DiscardError, GuestPages};
use crate::virtio::chain::{self, Budget, Chain, Outcome};
use crate::virtio::device::{
    DeviceError, DeviceIo, DeviceState, HostEvent, RestoreError, VirtioDevice,
};

/// Memory balloon device (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 5;
/// VIRTIO_RING_F_INDIRECT_DESC. Without EVENT_IDX every request is kicked; see
/// `kicked_synchronously`.
const F_INDIRECT: u64 = 1 << 28;

const WAKE: u16 = 0;
const TIMER: u16 = 1;

/// Most ranges taken from one report or hint (Linux: 32 and 1), which bounds the system
/// calls of one call.
pub(super) const MAX_RANGES: usize = 64;
/// Most bytes of statistics: 64 of them, of 10 bytes each (§5.5.6.3). Linux 6.12 has 16.
const MAX_STATS: usize = 640;
const STAT_LEN: usize = 10;

/// Configuration space (§5.5.4): num_pages, actual, free_page_hint_cmd_id, poison_val.
const CONFIG_LEN: usize = 16;
const ACTUAL: u64 = 4;

pub struct Balloon {
    handle: BalloonHandle,
    pages: Box<dyn GuestPages>,
    offered: u64,
    agreed: u64,
    queue_sizes: Vec<u16>,
    chain: Chain,
    /// The guest's statistics buffer, kept until it is asked for the next ones.
    stats_head: Option<u16>,
    /// Queues with requests left over from a call whose budget was spent, by bit.
    unfinished: u8,
}

impl Balloon {
    /// `pages` gives guest RAM back to the host.
    pub fn new(config: &Config, pages: Box<dyn GuestPages>) -> io::Result<Self> {
        let mut offered = F_INDIRECT;
        for (wanted, bit) in [
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.stats_polling_interval_s > 0, F_STATS),
            (config.free_page_hinting, F_HINTING),
            (config.free_page_reporting, F_REPORTING),
        ] {
            if wanted {
                offered |= bit;
            }
        }
        Ok(Self {
            handle: BalloonHandle::new(config)?,
            pages,
            offered,
            agreed: 0,
            queue_sizes: Role::of(offered).map(Role::queue_size).collect(),
            chain: Chain::new(),
            stats_head: None,
            unfinished: 0,
        })
    }

    /// The machine's side, which outlives the device.
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    fn serve(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        let Some(role) = Role::at(self.agreed, queue) else {
            return Ok(());
        };
        if role == Role::Stats {
            return self.take_stats(io, queue);
        }
        let handle = self.handle.clone();
        let mut shared = handle.lock();
        let pages = self.pages.as_mut();
        let result = chain::serve(io, queue, &mut self.chain, |mem, chain| {
            match role {
                Role::Inflate => inflate(mem, chain, pages, &mut shared, queue)?,
                Role::Hinting => hint(mem, chain, pages, &mut shared, queue)?,
                Role::Reporting => {
                    let given = discard_ranges(mem, chain, pages, &mut shared);
                    shared.counters.reported_bytes += given;
                }
                // Without MUST_TELL_HOST the driver may use the pages already.
                Role::Deflate | Role::Stats => {}
            }
            Ok(Outcome::Used(0))
        });
        if std::mem::take(&mut shared.changed) {
            io.irq.config_changed();
        }
        drop(shared);
        if result? {
            self.unfinished |= 1 << queue;
            self.handle.wake().ask();
        }
        Ok(())
    }

    /// Reads the statistics and keeps their buffer: giving it back asks for new ones.
    fn take_stats(&mut self, io: &mut DeviceIo<'_>, index: usize) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(index) else {
            return Ok(());
        };
        let mut budget = Budget::new(queue, index);
        let mut surplus = false;
        while budget.next(io.mem, queue, &mut self.chain)? {
            let mut data = [0; MAX_STATS];
            let len = self
                .chain
                .read(io.mem, 0, &mut data)
                .map_err(|e| chain::bad_queue(index, &e))?;
            let mut shared = self.handle.lock();
            for stat in data.get(..len).unwrap_or_default().chunks_exact(STAT_LEN) {
                if let Some((tag, value)) = stat.split_first_chunk()
                    && let Ok(value) = value.try_into()
                {
                    // Unknown tags are for newer hosts.
                    let _ = shared
                        .guest
                        .set(u16::from_le_bytes(*tag), u64::from_le_bytes(value));
                }
            }
            drop(shared);
            // The driver has one buffer (§5.5.6.3); of more, the newest is kept.
            if let Some(head) = self.stats_head.replace(self.chain.head()) {
                chain::add_used(io.mem, queue, index, head, 0)?;
                surplus = true;
            }
        }
        if surplus {
            chain::notify(io.mem, queue, index, io.irq)?;
        }
        Ok(())
    }

    fn ask_for_stats(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let Some(index) = Role::Stats.index(self.agreed) else {
            return Ok(());
        };
        if let (Some(queue), Some(head)) = (io.queues.get_mut(index), self.stats_head.take()) {
            chain::add_used(io.mem, queue, index, head, 0)?;
            chain::notify(io.mem, queue, index, io.irq)?;
        }
        Ok(())
    }
}

/// Gives back the pages whose numbers the request lists (§5.5.6.1).
fn inflate(
    mem: &GuestRam,
    chain: &Chain,
    pages: &mut dyn GuestPages,
    shared: &mut Shared,
    queue: usize,
) -> Result<(), DeviceError> {
    const PFN_LEN: usize = 4;
    let mut data = [0; MAX_PFNS * PFN_LEN];
    let len = chain
        .read(mem, 0, &mut data)
        .map_err(|e| chain::bad_queue(queue, &e))?;
    let surplus = usize::try_from(chain.readable_len()).map_or(0, |all| all - len) / PFN_LEN;
    shared.counters.ignored_ranges += surplus as u64;

    let mut pfns = [0; MAX_PFNS];
    let (listed, _) = data.get(..len).unwrap_or_default().as_chunks();
    for (pfn, bytes) in pfns.iter_mut().zip(listed) {
        *pfn = u32::from_le_bytes(*bytes);
    }
    let pfns = pfns.get_mut(..listed.len()).unwrap_or_default();
    pages::runs(pfns, |run| {
        let given = match pages.discard(mem, run.clone()) {
            Err(DiscardError::OutsideRam { .. }) => {
                // Some of it may be RAM: page by page.
                let page = 1 << PAGE_SHIFT;
                run.step_by(page)
                    .map(|start| count(&pages.discard(mem, start..start + page as u64), shared))
                    .sum()
            }
            result => count(&result, shared),
        };
        shared.counters.inflated_bytes += given;
    });
    Ok(())
}

/// A command id, or pages of a free list (§5.5.6.5).
fn hint(
    mem: &GuestRam,
    chain: &Chain,
    pages: &mut dyn GuestPages,
    shared: &mut Shared,
    queue: usize,
) -> Result<(), DeviceError> {
    let mut id = [0; 4];
    let len = chain
        .read(mem, 0, &mut id)
        .map_err(|e| chain::bad_queue(queue, &e))?;
    if len == id.len() {
        shared.changed |= shared.hinting.heard(u32::from_le_bytes(id));
    }
    if shared.hinting.is_running() {
        let given = discard_ranges(mem, chain, pages, shared);
        shared.counters.hinted_bytes += given;
    } else if !chain.writable().is_empty() {
        shared.counters.ignored_ranges += 1;
    }
    Ok(())
}

/// Gives back the request's writable buffers; returns the number of bytes.
fn discard_ranges(
    mem: &GuestRam,
    chain: &Chain,
    pages: &mut dyn GuestPages,
    shared: &mut Shared,
) -> u64 {
    let ranges = chain.writable();
    shared.counters.ignored_ranges += ranges.len().saturating_sub(MAX_RANGES) as u64;
    let mut given = 0;
    for range in ranges.iter().take(MAX_RANGES) {
        let start = range.addr.0;
        let end = start.saturating_add(u64::from(range.len));
        given += count(&pages.discard(mem, start..end), shared);
    }
    given
}

fn count(result: &Result<u64, DiscardError>, shared: &mut Shared) -> u64 {
    match result {
        Ok(given) => return *given,
        Err(DiscardError::OutsideRam { .. }) => shared.counters.ignored_ranges += 1,
        Err(DiscardError::Madvise { .. }) => shared.counters.failed_ranges += 1,
    }
    0
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "balloon"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = self.handle.lock();
        let fields = [
            shared.target_pages,
            shared.actual_pages,
            shared.hinting.host_cmd,
            0,
        ];
        let mut space = [0; CONFIG_LEN];
        for (bytes, field) in space.as_chunks_mut().0.iter_mut().zip(fields) {
            *bytes = field.to_le_bytes();
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = space.get(start..).unwrap_or_default();
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(rest) {
            *byte = *value;
        }
    }

    /// Only `actual` is the driver's, and only whole (§5.5.6.2).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, data.try_into()) {
            self.handle.lock().actual_pages = u32::from_le_bytes(bytes);
        }
    }

    /// Linux puts a hinted block on the list from which it takes blocks back under memory
    /// pressure only *after* its kick. So a block given back to the host within the kick is
    /// free for certain; through an ioeventfd it might be in use again.
    fn kicked_synchronously(&self, queue: usize) -> bool {
        // Which number the hinting queue has depends on what the driver will agree to.
        let first = Role::Deflate as usize + 1;
        self.offered & F_HINTING != 0 && queue >= first
    }

    fn activate(&mut self, io: &mut DeviceIo<'_>, features: u64) -> Result<(), DeviceError> {
        self.agreed = features;
        // Drivers fill the statistics queue before DRIVER_OK.
        for queue in 0..io.queues.len() {
            self.serve(io, queue)?;
        }
        Ok(())
    }

    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        self.serve(io, queue)
    }

    fn host_events(&self) -> Vec<HostEvent> {
        let event = |fd, token| HostEvent { fd, token };
        vec![
            event(self.handle.wake().fd(), WAKE),
            event(self.handle.timer_fd(), TIMER),
        ]
    }

    fn host_ready(&mut self, io: Option<&mut DeviceIo<'_>>, token: u16) -> Result<(), DeviceError> {
        if token == TIMER {
            self.handle.take_tick();
            return io.map_or(Ok(()), |io| self.ask_for_stats(io));
        }
        self.handle.wake().clear();
        // A driver that is not there yet reads configuration space when it comes.
        let changed = std::mem::take(&mut self.handle.lock().changed);
        let Some(io) = io else {
            return Ok(());
        };
        if changed {
            io.irq.config_changed();
        }
        let unfinished = std::mem::take(&mut self.unfinished);
        for queue in 0..io.queues.len() {
            if unfinished >> queue & 1 == 1 {
                self.serve(io, queue)?;
            }
        }
        Ok(())
    }

    /// Puts the statistics buffer back into the queue; it is read again after the pause.
    fn drain(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let index = Role::Stats.index(self.agreed);
        let queue = index.and_then(|index| io.queues.get_mut(index));
        // It is always the last that was taken.
        if let (Some(queue), Some(_)) = (queue, self.stats_head.take()) {
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        self.handle.lock().save()
    }

    fn restore(
        &mut self,
        io: Option<&mut DeviceIo<'_>>,
        features: u64,
        state: &DeviceState,
    ) -> Result<(), RestoreError> {
        if !self.handle.lock().restore(state) {
            return Err(RestoreError::Invalid(format!("{state:?}")));
        }
        if io.is_some() {
            self.agreed = features;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.agreed = 0;
        self.stats_head = None;
        self.unfinished = 0;
        let mut shared = self.handle.lock();
        shared.actual_pages = 0;
        shared.guest = Default::default();
        shared.hinting.host_cmd = super::handle::CMD_STOP;
        shared.hinting.guest_cmd = None;
    }
}
