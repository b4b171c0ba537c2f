//! What watches over a guest whose pages another process brings in.
//!
//! A page that does not come makes whoever needs it wait: also the thread of the event loop, when a device
//! needs it. So this is a thread of its own, which touches no guest RAM. It ends the guest when the handler
//! has ended, and when a page was given as broken (UFFDIO_POISON): in order if the event loop can, else at once.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::ending::Ending;
use super::events::{Notice, Notifier};
use crate::api::{Reply, Request};
use crate::backend::page_handler::{PageHandler, Woke};
use crate::log_error;
use crate::memory::handled::{Faults, Region};
use crate::memory::template::Zeroed;
use crate::memory::{GuestRam, MemoryError, broken};

/// How long the event loop may take to end in order.
const GRACE: Duration = Duration::from_secs(1);

/// Ends the process as `Stop` does, when the event loop cannot.
pub(super) type EndNow = Arc<dyn Fn(&Ending) + Send + Sync>;

/// Watches until it is dropped.
#[derive(Debug)]
pub(super) struct Watching(Arc<OwnedFd>);

impl Drop for Watching {
    fn drop(&mut self) {
        broken::forget();
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

/// Begins to watch. One guest can be watched at a time.
pub(super) fn watch(
    handler: PageHandler,
    regions: Vec<Region>,
    notifier: Notifier,
    end_now: EndNow,
) -> io::Result<Watching> {
    let ranges: Vec<_> = regions
        .iter()
        .map(|region| region.base_host_virt_addr..region.base_host_virt_addr + region.size)
        .collect();
    let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let watching = Watching(Arc::clone(&over));
    let broken = broken::watch(&ranges)?;
    std::thread::Builder::new()
        .name("page-faults".into())
        .stack_size(128 << 10)
        .spawn(move || {
            let Some(why) = wait(&handler, &regions, broken, over.as_fd()) else {
                return;
            };
            log_error!("{why}");
            let ending = Ending::NoPages(why);
            notifier.send(Notice::Ending(ending.clone()));
            std::thread::sleep(GRACE);
            end_now(&ending);
        })?;
    Ok(watching)
}

/// Returns why the guest cannot go on; `None` if there is no guest to watch any more.
fn wait(
    handler: &PageHandler,
    regions: &[Region],
    broken: BorrowedFd<'_>,
    over: BorrowedFd<'_>,
) -> Option<String> {
    let why = match handler.wait(&[over, broken]) {
        Ok(Woke::Other(0)) => return None,
        Ok(Woke::Ended) => "the page-fault handler has ended, and the guest's pages with it".into(),
        Ok(Woke::HungUp) => {
            "the page-fault handler has closed its socket, and the guest's pages are gone with it"
                .into()
        }
        Ok(Woke::Other(_)) => {
            let address = broken::address();
            let region = regions
                .iter()
                .find(|region| address.wrapping_sub(region.base_host_virt_addr) < region.size);
            let offset = region.map_or(0, |region| {
                region.offset + (address - region.base_host_virt_addr)
            });
            format!(
                "the page-fault handler cannot give the page at {:#x} of the memory file",
                offset & !0xfff
            )
        }
        Err(error) => format!("the page-fault handler cannot be watched: {error}"),
    };
    Some(why)
}

/// A call that waited until RAM was complete.
pub(super) struct Completed {
    pub(super) request: Request,
    pub(super) reply: Reply,
    pub(super) outcome: Result<(), MemoryError>,
}

impl std::fmt::Debug for Completed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completed")
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}

/// Has every page of `memory` brought in, and sends `request` back to the event loop then. The guest may run.
pub(super) fn complete_for(
    request: Request,
    reply: Reply,
    faults: Arc<Faults>,
    ram: Arc<GuestRam>,
    zeroed: Zeroed,
    notifier: Notifier,
) -> io::Result<()> {
    let complete = move || {
        let outcome = faults.complete(&ram, &zeroed);
        notifier.send(Notice::Completed(Box::new(Completed {
            request,
            reply,
            outcome,
        })));
    };
    std::thread::Builder::new()
        .name("complete-ram".into())
        .spawn(complete)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::events::Notices;
    use super::*;

    #[test]
    fn the_end_of_a_handler_whose_guest_was_not_built_is_nobodys() {
        let (notifier, notices) = Notices::new().unwrap();
        let end_now: EndNow = Arc::new(|_| panic!("the process is not ended"));
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..2).map(|_| UnixStream::pair().unwrap()).unzip();
        let mut watching = ours.into_iter().map(|socket| {
            let handler = PageHandler::from_fd(socket.into()).unwrap();
            watch(handler, Vec::new(), notifier.clone(), Arc::clone(&end_now)).unwrap()
        });
        drop(watching.next());
        let second = watching.next();
        let mut theirs = theirs.into_iter();
        // It was dropped already, if nobody watches it any more.
        drop(theirs.next());
        assert!(notices.next().is_none());
        drop(second);
    }
}
