//! Connections that have not sent their request yet. Each takes a thread; so when threads run short, the
//! oldest of them make room.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// So many of the newest are left alone: their request may be on its way.
const SPARED: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Silent {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    next: u64,
    /// By age.
    connections: BTreeMap<u64, Arc<OwnedFd>>,
}

/// Takes its connection off the list when dropped.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    silent: &'a Silent,
    number: u64,
}

impl Silent {
    /// Until the entry is dropped, this connection may be shut down at any moment.
    pub(super) fn enter(&self, connection: &Arc<OwnedFd>) -> Entry<'_> {
        let mut known = self.known();
        let number = known.next;
        known.next = number.wrapping_add(1);
        known.connections.insert(number, Arc::clone(connection));
        Entry {
            silent: self,
            number,
        }
    }

    /// Shuts the oldest down, if there are many. Whoever waits for its request sees its end.
    pub(super) fn make_room(&self) {
        let mut known = self.known();
        if known.connections.len() > SPARED
            && let Some((_, oldest)) = known.connections.pop_first()
        {
            let _ = rustix::net::shutdown(&oldest, rustix::net::Shutdown::Both);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.silent.known().connections.remove(&self.number);
    }
}
