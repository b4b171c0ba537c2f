//! Watching files of a guest, for longer than any connection lasts.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use belljar_protocol::client::watch::{WatchReader, unwatch};
use belljar_protocol::v1::{self, error::Code, watch_event::What};

use crate::again;
use crate::guest::{self, GuestError};
use crate::registry::Found;

/// What to watch.
#[derive(Debug, Clone, Default)]
pub struct WatchSpec {
    /// A directory or file of the guest.
    pub path: Vec<u8>,
    /// Whose rights count; empty: root's.
    pub user: String,
    pub recursive: bool,
    /// How long the guest keeps events without a reader; zero: a minute.
    pub keep: Duration,
}

/// Where a watch goes on: its id and the number of the next event wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub id: u64,
    pub next: u64,
}

/// Reads a watch. A connection that breaks is made again; what may have been missed is an overflow.
#[derive(Debug)]
pub struct Watcher {
    found: Found,
    spec: WatchSpec,
    reader: Option<WatchReader<UnixStream>>,
    cursor: Cursor,
    directories: u64,
    /// The guest knows nothing of the watch any more.
    lost: bool,
    gone: bool,
}

impl Watcher {
    /// Begins a watch. What happens from the return on is told.
    ///
    /// # Errors
    /// The sandbox does not run, or the path cannot be watched.
    pub fn start(found: Found, spec: WatchSpec) -> Result<Self, GuestError> {
        let mut watcher = Self::new(found, spec, Cursor { id: 0, next: 0 });
        watcher.connect()?;
        Ok(watcher)
    }

    /// Goes on with an earlier watch. Is that not kept any more, a new one of the same path is begun, and an
    /// overflow told first.
    ///
    /// # Errors
    /// As [`Watcher::start`].
    pub fn resume(found: Found, spec: WatchSpec, cursor: Cursor) -> Result<Self, GuestError> {
        let mut watcher = Self::new(found, spec, cursor);
        watcher.connect()?;
        Ok(watcher)
    }

    fn new(found: Found, spec: WatchSpec, cursor: Cursor) -> Self {
        Self {
            found,
            spec,
            reader: None,
            cursor,
            directories: 0,
            lost: false,
            gone: false,
        }
    }

    /// Where it will go on.
    #[must_use]
    pub const fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Directories watched when it was begun.
    #[must_use]
    pub const fn directories(&self) -> u64 {
        self.directories
    }

    /// Waits for the next event. `None`: what was watched is gone.
    ///
    /// # Errors
    /// The sandbox does not run any more, or cannot be reached again.
    pub fn next_event(&mut self) -> Result<Option<v1::WatchEvent>, GuestError> {
        loop {
            if std::mem::take(&mut self.lost) {
                return Ok(Some(overflow(
                    "the guest has forgotten the watch: a new one is begun",
                )));
            }
            if self.gone {
                return Ok(None);
            }
            let Some(reader) = &mut self.reader else {
                thread::sleep(again::PAUSE);
                self.connect()?;
                continue;
            };
            match reader.next(None) {
                Ok(Some(event)) => {
                    self.cursor.next = event.sequence.saturating_add(1);
                    self.gone = matches!(event.what, Some(What::Gone(_)));
                    return Ok(Some(event));
                }
                Ok(None) => self.reader = None,
                Err(error) if again::is_cut(&error) => self.reader = None,
                Err(source) => {
                    let id = self.found.called();
                    return Err(GuestError::Call { id, source });
                }
            }
        }
    }

    /// Ends the watch in the guest, which would otherwise keep it for a while.
    pub fn end(mut self) {
        self.reader = None;
        let id = self.cursor.id;
        let _ = guest::call(&self.found, Some(guest::soon()), |stream, deadline| {
            unwatch(stream, id, deadline)
        });
    }

    fn connect(&mut self) -> Result<(), GuestError> {
        let started = self.try_connect();
        let started = match started {
            // The worker was replaced, or nobody came for too long.
            Err(error) if self.cursor.id != 0 && is_unknown(&error) => {
                self.cursor = Cursor { id: 0, next: 0 };
                self.lost = true;
                self.try_connect()
            }
            other => other,
        };
        match started {
            Ok(reader) => {
                self.reader = Some(reader);
                Ok(())
            }
            // It was removed while nobody looked.
            Err(error) if self.lost && matches!(error.refusal(), Some((Code::System, _))) => {
                self.gone = true;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn try_connect(&mut self) -> Result<WatchReader<UnixStream>, GuestError> {
        let call = v1::Watch {
            path: self.spec.path.clone(),
            user: self.spec.user.clone(),
            recursive: self.spec.recursive,
            id: self.cursor.id,
            from: self.cursor.next,
            no_follow: false,
            keep_ms: u64::try_from(self.spec.keep.as_millis()).unwrap_or(u64::MAX),
        };
        // Many directories take their time.
        let reader = again::call(&self.found, None, |stream, _| {
            WatchReader::start(stream, call.clone(), None)
        })?;
        let started = reader.started();
        self.directories = started.directories;
        self.cursor.id = started.id;
        if self.cursor.next == 0 {
            self.cursor.next = started.next;
        }
        Ok(reader)
    }
}

fn is_unknown(error: &GuestError) -> bool {
    matches!(error.refusal(), Some((Code::NotFound, _)))
}

fn overflow(reason: &str) -> v1::WatchEvent {
    v1::WatchEvent {
        sequence: 0,
        what: Some(What::Overflow(v1::Overflow {
            reason: reason.to_owned(),
        })),
        is_directory: false,
    }
}
