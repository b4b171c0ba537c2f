//! Guests that stand still for a capture, or will in a moment. What nobody waits for is not done meanwhile: on a
//! machine with few processors it would have the one that lets the guest go on.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::locked;

/// Whoever has a guest stand still for longer is not waited for, nor are many in turn.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often whoever waits looks whether it still may.
const LOOK: Duration = Duration::from_millis(5);

/// Whether any guest stands still.
#[derive(Debug, Default)]
pub(crate) struct Quiet {
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Now {
    guests: usize,
    /// Since when there is always one.
    since: Option<Instant>,
}

/// A guest that stands still until this is dropped.
#[derive(Debug)]
pub(super) struct Still(Arc<Quiet>);

impl Still {
    pub(super) fn begin(quiet: &Arc<Quiet>) -> Self {
        let mut now = locked(&quiet.now);
        if now.guests == 0 {
            now.since = Some(Instant::now());
        }
        now.guests += 1;
        drop(now);
        Self(Arc::clone(quiet))
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        locked(&self.0.now).guests -= 1;
        self.0.changed.notify_all();
    }
}

impl Quiet {
    /// Returns when no guest stands still, or has for too long; asks now and then whether it may go on.
    ///
    /// # Errors
    /// What `may` says.
    pub(super) fn wait(&self, mut may: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let began = Instant::now();
        let mut now = locked(&self.now);
        loop {
            may()?;
            let since = now.since.filter(|_| now.guests > 0);
            if since.is_none_or(|since| since.min(began).elapsed() >= PATIENCE) {
                return Ok(());
            }
            let waited = self.changed.wait_timeout(now, LOOK);
            now = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn it_is_waited_for_guests_that_stand_still_but_not_for_ever() {
        let quiet = Arc::new(Quiet::default());
        let wait = || {
            let began = Instant::now();
            quiet.wait(|| Ok(())).unwrap();
            began.elapsed()
        };
        assert!(wait() < PATIENCE);
        // Of two the last one counts.
        let (one, other) = (Still::begin(&quiet), Still::begin(&quiet));
        drop(other);
        let asked = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                quiet.wait(|| {
                    asked.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            });
            while asked.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            assert!(!waits.is_finished());
            drop(one);
            waits.join().unwrap().unwrap();
        });
        // Whoever is stopped itself has nobody wait long.
        let began = Instant::now();
        let still = Still::begin(&quiet);
        wait();
        assert!(began.elapsed() >= PATIENCE);
        // Nor do others have that begin after it.
        let next = Still::begin(&quiet);
        drop(still);
        assert!(wait() < PATIENCE);
        drop(next);
        assert_eq!(locked(&quiet.now).guests, 0);
    }

    #[test]
    fn who_may_not_go_on_does_not_wait() {
        let quiet = Arc::new(Quiet::default());
        let _still = Still::begin(&quiet);
        let mut left = 3;
        let waited = quiet.wait(|| {
            left -= 1;
            match left {
                0 => Err(io::Error::other("somebody else needs it")),
                _ => Ok(()),
            }
        });
        assert!(waited.is_err());
        assert_eq!(left, 0);
    }
}
