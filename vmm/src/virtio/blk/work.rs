//! The disk of a drive and its requests in flight.
use std::io;

use vm_memory::GuestAddress;

use crate::backend::disk::Disk;
use crate::virtio::chain::Chain;

/// A request whose operation runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    /// Bytes of data the guest gets, if it succeeds.
    pub(super) written: u32,
}

/// What changes from request to request.
pub(super) struct Work {
    pub(super) disk: Box<dyn Disk>,
    pub(super) features: u64,
    pub(super) chain: Chain,
    /// By tag; as long as the disk is deep.
    pub(super) in_flight: Vec<Option<InFlight>>,
    pub(super) free_tags: Vec<u16>,
    pub(super) done: Vec<(u16, io::Result<()>)>,
    /// Bytes moved in the current call.
    pub(super) moved: u64,
}

impl Work {
    pub(super) fn new(disk: Box<dyn Disk>) -> Self {
        let depth = disk.depth();
        Self {
            disk,
            features: 0,
            chain: Chain::new(),
            in_flight: vec![None; usize::from(depth)],
            free_tags: (0..depth).rev().collect(),
            done: Vec::new(),
            moved: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        self.features = 0;
        self.settle();
    }

    /// Waits for what is in flight, and forgets it: the driver's rings are gone or broken.
    pub(super) fn settle(&mut self) {
        if self.is_deep() {
            let _ = self.disk.reap(true, &mut self.done);
            self.done.clear();
            self.in_flight.fill(None);
            self.free_tags.clear();
            self.free_tags.extend((0..self.disk.depth()).rev());
        }
    }

    pub(super) fn is_deep(&self) -> bool {
        !self.in_flight.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        !self.is_deep() || !self.free_tags.is_empty()
    }

    pub(super) fn next_tag(&self) -> u16 {
        self.free_tags.last().copied().unwrap_or(0)
    }

    /// The operation with `next_tag` runs.
    pub(super) fn remember(&mut self, request: InFlight) {
        if let Some(tag) = self.free_tags.pop()
            && let Some(slot) = self.in_flight.get_mut(usize::from(tag))
        {
            *slot = Some(request);
        }
    }

    pub(super) fn forget(&mut self, tag: u16) -> Option<InFlight> {
        let request = self.in_flight.get_mut(usize::from(tag))?.take()?;
        self.free_tags.push(tag);
        Some(request)
    }
}
