//! Calls that change files and a frozen drive keep out of each other's way: a thread that waits for a
//! frozen file system cannot be killed, and a worker with such a thread could not be replaced.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, error::Code};

use super::super::refusal;

/// Between two looks at the calls that are still under way.
const LOOK: Duration = Duration::from_millis(2);

static FROZEN: AtomicBool = AtomicBool::new(false);
static CHANGING: AtomicUsize = AtomicUsize::new(0);

/// A call that changes files, from its begin to its end.
#[derive(Debug)]
pub(in super::super) struct Change(());

impl Drop for Change {
    fn drop(&mut self) {
        CHANGING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Begins a call that changes files.
pub(in super::super) fn change() -> Result<Change, v1::Error> {
    // Counted first, so that either this call or whoever freezes sees the other.
    CHANGING.fetch_add(1, Ordering::SeqCst);
    let change = Change(());
    if FROZEN.load(Ordering::SeqCst) {
        return Err(refusal(
            Code::Conflict,
            "the guest's file systems are frozen; thaw it first",
        ));
    }
    Ok(change)
}

/// Refuses further changes and waits for those under way.
pub(super) fn begin(deadline: Option<Instant>) -> Result<(), v1::Error> {
    FROZEN.store(true, Ordering::SeqCst);
    while CHANGING.load(Ordering::SeqCst) > 0 {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            end();
            return Err(refusal(
                Code::Deadline,
                "a call that changes files did not end in time",
            ));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Changes are possible again.
pub(super) fn end() {
    FROZEN.store(false, Ordering::SeqCst);
}

/// For a worker that starts while the guest is frozen: it does not know whether the drive is, too.
pub(super) fn assume(frozen: bool) {
    FROZEN.store(frozen, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_drive_refuses_changes_and_waits_for_those_under_way() {
        let soon = || Instant::now().checked_add(Duration::from_millis(20));
        let under_way = change().unwrap();
        assert_eq!(begin(soon()).unwrap_err().code(), Code::Deadline);
        // What failed is undone.
        drop(change().unwrap());
        drop(under_way);
        begin(soon()).unwrap();
        assert_eq!(change().unwrap_err().code(), Code::Conflict);
        end();
        drop(change().unwrap());
        assert_eq!(CHANGING.load(Ordering::SeqCst), 0);
    }
}
