//! A drive of layers (`docs/disk-layers.md`): the crate `belljar-layers` says where bytes are, this moves
//! them between there and guest RAM.
//!
//! The stack of layers is shared between the disk, which a device owns, and a [`Handle`], through which
//! the machine freezes the top layer or has merged layers put in. Its lock is held for one call.
mod ring;
mod sync;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use belljar_layers::{Next, Stack};
use rustix::fs::FlockOperation;

use super::disk::Disk;
use super::file::{self, DiskError};
use crate::config::{IoEngine, Source};

/// A layered disk cannot be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    #[error(transparent)]
    File(#[from] DiskError),
    #[error(transparent)]
    Layers(#[from] belljar_layers::Error),
}

type Result<T> = std::result::Result<T, LayersError>;

/// A file and what errors call it: a path or `fd:NAME`.
#[derive(Debug)]
pub struct Named {
    pub file: File,
    pub name: String,
}

impl Named {
    /// Checked and locked; see [`file::take`].
    fn take(self, read_only: bool) -> Result<(Arc<File>, String)> {
        file::take(&self.file, &self.name, read_only)?;
        Ok((Arc::new(self.file), self.name))
    }
}

struct Shared {
    stack: Stack<Arc<File>>,
    /// Counts changes of the files.
    generation: u64,
}

impl Shared {
    /// All files, in the order of a run's numbers.
    fn files(&self) -> Vec<Arc<File>> {
        let layers = self.stack.layers().iter();
        std::iter::once(self.stack.base())
            .chain(layers.map(|layer| layer.medium()))
            .map(Arc::clone)
            .collect()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        unlock(&self.files());
    }
}

/// A ring that goes away, or gets other files, lets go of its files a little later than their owner.
fn unlock(files: &[Arc<File>]) {
    for file in files {
        let _ = rustix::fs::flock(file, FlockOperation::Unlock);
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: belljar_layers::Error) -> io::Error {
    io::Error::other(error)
}

/// Opens a disk: a base image and layers, lowest first. If it is not `read_only` the last one is
/// written; an empty file there becomes a layer.
///
/// # Errors
/// A file cannot be used, is in use, or does not fit.
pub fn open(
    base: Named,
    layers: Vec<Named>,
    read_only: bool,
    engine: IoEngine,
) -> Result<(Box<dyn Disk>, Handle)> {
    let shared = Arc::new(Mutex::new(Shared {
        stack: stack(base, layers, read_only)?,
        generation: 0,
    }));
    let handle = Handle(Arc::clone(&shared));
    let disk = sync::SyncLayers::new(shared);
    Ok(match engine {
        IoEngine::Sync => (Box::new(disk), handle),
        IoEngine::Async => (Box::new(ring::RingLayers::new(disk)), handle),
    })
}

fn stack(base: Named, layers: Vec<Named>, read_only: bool) -> Result<Stack<Arc<File>>> {
    let (base, base_name) = base.take(true)?;
    let top = layers.len().checked_sub(1).filter(|_| !read_only);
    let layers = layers
        .into_iter()
        .enumerate()
        .map(|(index, layer)| layer.take(Some(index) != top))
        .collect::<Result<Vec<_>>>()?;
    Ok(Stack::open((base, &base_name), layers, !read_only)?)
}

/// A checked file for [`Handle::freeze`].
#[derive(Debug)]
pub struct NextLayer(Next<Arc<File>>);

/// What the machine keeps of a layered disk.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<Shared>>);

impl Handle {
    /// Takes the file of the next top layer: empty, or an empty layer over the present top.
    ///
    /// # Errors
    /// It is neither, or in use; the disk has eight layers.
    pub fn next(&self, layer: Named) -> Result<NextLayer> {
        let (file, name) = layer.take(false)?;
        Ok(NextLayer(lock(&self.0).stack.next(file, &name)?))
    }

    /// Freezes the top layer, durably, and writes to `next` from now on. Nothing may be in flight.
    ///
    /// # Errors
    /// The system fails to write; the top is what it was.
    pub fn freeze(&self, next: NextLayer) -> Result<()> {
        let mut shared = lock(&self.0);
        let old = shared.stack.top().map(Arc::clone);
        shared.stack.freeze(next.0)?;
        shared.generation += 1;
        if let Some(old) = old {
            // Others may read it now. It stays ours alone if that fails, which harms nobody's data.
            let _ = rustix::fs::flock(&old, FlockOperation::NonBlockingLockShared);
        }
        Ok(())
    }

    /// Puts a merged layer in the place of those that went into it. Returns how many they were.
    ///
    /// # Errors
    /// It does not hold what they hold.
    pub fn replace_merged(&self, merged: Named) -> Result<usize> {
        let (file, name) = merged.take(true)?;
        let mut shared = lock(&self.0);
        let count = shared.stack.replace_merged(file, &name)?;
        shared.generation += 1;
        Ok(count)
    }

    /// Puts another image of the same size and other layers in the place of all. What was not flushed to the ones
    /// before is lost. Nothing may be in flight.
    ///
    /// # Errors
    /// A file cannot be used, is in use, or does not fit; nothing has changed then.
    pub fn replace(&self, base: Named, layers: Vec<Named>, read_only: bool) -> Result<()> {
        let new = stack(base, layers, read_only)?;
        let mut shared = lock(&self.0);
        let (wanted, found) = (shared.stack.size(), new.size());
        if wanted != found {
            return Err(belljar_layers::Error::Size {
                layer: "the base image".to_owned(),
                found,
                wanted,
            }
            .into());
        }
        let before = shared.files();
        shared.stack = new;
        shared.generation += 1;
        unlock(&before);
        Ok(())
    }

    /// What the layers are called, lowest first.
    pub fn names(&self) -> Vec<Source> {
        let shared = lock(&self.0);
        let names = shared.stack.layers().iter().map(|layer| layer.name());
        // They were parsed once.
        names.filter_map(|name| Source::parse(name).ok()).collect()
    }

    /// Makes all durable, and marks the top layer as whole. Nothing may be in flight.
    ///
    /// # Errors
    /// The system fails to write.
    pub fn close(&self) -> Result<()> {
        Ok(lock(&self.0).stack.close()?)
    }
}

#[cfg(test)]
mod tests;
