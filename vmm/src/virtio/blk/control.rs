//! Changing a drive's medium while its guest runs, from any thread. The device carries the
//! order out on the event loop, so that the API never waits for a device.
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::disk::{Disk, FileId};
use crate::backend::file::{DiskError, RawFile};
use crate::backend::uring::UringFile;
use crate::config::IoEngine;
use crate::virtio::chain::Again;

/// Opens `file` as a raw disk. `name` is what errors call it: a path or `fd:NAME`.
///
/// # Errors
/// See [`RawFile::new`].
pub fn open_disk(
    file: File,
    name: &str,
    read_only: bool,
    engine: IoEngine,
) -> Result<Box<dyn Disk>, DiskError> {
    let raw = RawFile::new(file, name, read_only)?;
    Ok(match engine {
        IoEngine::Sync => Box::new(raw),
        IoEngine::Async => Box::new(UringFile::new(raw)),
    })
}

/// What the device shall do.
pub(super) enum Order {
    Replace(Box<dyn Disk>),
    /// The file behind the disk may have a new size.
    Rescan,
}

struct Shared {
    order: Option<Order>,
    /// The current or ordered medium.
    file: Option<FileId>,
}

/// A handle to one drive.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Mutex<Shared>>,
    again: Arc<Again>,
    read_only: bool,
    engine: IoEngine,
}

impl Control {
    pub(super) fn new(
        again: Arc<Again>,
        read_only: bool,
        engine: IoEngine,
        file: Option<FileId>,
    ) -> Self {
        Self {
            shared: Arc::new(Mutex::new(Shared { order: None, file })),
            again,
            read_only,
            engine,
        }
    }

    /// Puts `file` behind the drive; the guest is told to look at the size. The same file
    /// again means that it was resized.
    ///
    /// # Errors
    /// The file cannot be a disk (see [`RawFile::new`]); the old one stays.
    pub fn replace(&self, file: File, name: &str) -> Result<(), DiskError> {
        let id = FileId::of(&file).map_err(|source| DiskError::Io {
            disk: name.to_owned(),
            what: "look at its kind",
            source,
        })?;
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.file == Some(id) {
            shared.rescan();
        } else {
            let disk = open_disk(file, name, self.read_only, self.engine)?;
            shared.order = Some(Order::Replace(disk));
            shared.file = Some(id);
        }
        self.again.ask();
        Ok(())
    }

    /// The present or ordered medium, if it is a file.
    pub fn file(&self) -> Option<FileId> {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .file
    }

    /// The file behind the drive was resized: the guest is told, if the new size is usable.
    pub fn rescan(&self) {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .rescan();
        self.again.ask();
    }

    pub(super) fn take(&self) -> Option<Order> {
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .order
            .take()
    }
}

impl Shared {
    fn rescan(&mut self) {
        match &mut self.order {
            // Not yet in place: its size is measured again.
            Some(Order::Replace(disk)) => {
                let _ = disk.rescan();
            }
            order => *order = Some(Order::Rescan),
        }
    }
}
