//! What watches over a guest whose pages another process brings in.
//!
//! A page that does not come makes whoever needs it wait: also the thread of the event loop, when a device
//! needs it. So this is a thread of its own, which touches no guest RAM. It ends the guest when the handler
//! has ended, and when a page was given as broken (UFFDIO_POISON): in order if the event loop can, else at once.
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

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

/// Watches until the process ends.
pub(super) fn watch(
    handler: PageHandler,
    regions: Vec<Region>,
    notifier: Notifier,
    end_now: EndNow,
) -> io::Result<()> {
    let ranges = regions
        .iter()
        .map(|region| region.base_host_virt_addr..region.base_host_virt_addr + region.size);
    let broken = broken::watch(ranges.collect())?;
    std::thread::Builder::new()
        .name("page-faults".into())
        .stack_size(128 << 10)
        .spawn(move || {
            let why = wait(&handler, &regions, broken);
            log_error!("{why}");
            let ending = Ending::NoPages(why);
            notifier.send(Notice::Ending(ending.clone()));
            std::thread::sleep(GRACE);
            end_now(&ending);
        })?;
    Ok(())
}

/// Returns why the guest cannot go on.
fn wait(handler: &PageHandler, regions: &[Region], broken: BorrowedFd<'_>) -> String {
    match handler.wait(broken) {
        Ok(Woke::Ended) => "the page-fault handler has ended, and the guest's pages with it".into(),
        Ok(Woke::HungUp) => {
            "the page-fault handler has closed its socket, and the guest's pages are gone with it"
                .into()
        }
        Ok(Woke::Other) => {
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
    }
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
        let outcome = faults.complete(&ram, &zeroed.get());
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
