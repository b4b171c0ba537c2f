//! A sandbox's writable disk as layers over a base image ([disk-layers.md](../../docs/disk-layers.md)).
//!
//! `disk.json` names the files, all in the sandbox's directory. It is replaced as a whole, after the files that it
//! names are there and before those that it no longer names go; so a crash at any point leaves one disk or the
//! other. Base image and frozen layers are shared with other sandboxes by hard links: nobody writes them.
//!
//! A snapshot first writes down the layer that will be on top, then has the VMM freeze the one before. What was
//! cut off in between is seen by the header of that one: if it is not frozen, the layer over it is empty. The next
//! snapshot takes it, and before the next start it goes.

use std::fs::{File, Permissions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use belljar_layers::{self as layers, LayerId, MAX_LAYERS, State, View};
use rustix::fs::{AtFlags, CWD};
use serde::{Deserialize, Serialize};

use crate::disk::copy_into;
use crate::state::{self, SandboxDir, StateError};

/// Version of the record that this program writes. Fields are only added within a version.
const VERSION: u32 = 1;
/// From so many layers on those that are frozen become one.
const MERGE_FROM: usize = 6;
/// Extensions of the files, which are called `disk-NUMBER`.
const BASE: &str = "base";
const LAYER: &str = "layer";
/// Files of one disk that was ever made have smaller numbers than this.
const NUMBERS: u32 = 1 << 30;

/// The files of a disk could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("the sandbox's disk: {0}")]
    Layers(#[from] layers::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{}: {why}", path.display())]
    Record { path: PathBuf, why: String },
    #[error("the sandbox's disk has {MAX_LAYERS} layers, and they could not be merged: {0}")]
    Full(String),
}

fn io_failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayersError + use<> {
    let path = path.to_path_buf();
    move |source| LayersError::Io { what, path, source }
}

/// Why there is no merged layer.
#[derive(Debug, thiserror::Error)]
enum NotMerged {
    #[error(transparent)]
    Files(#[from] LayersError),
    /// By the VMM.
    #[error("{0}")]
    Refused(String),
}

impl From<layers::Error> for NotMerged {
    fn from(error: layers::Error) -> Self {
        Self::Files(error.into())
    }
}

/// Whether a disk of so many bytes can have layers; a larger one is one raw file.
#[must_use]
pub fn fits(bytes: u64) -> bool {
    bytes > 0 && bytes <= layers::MAX_SIZE && bytes.is_multiple_of(layers::CLUSTER)
}

/// The files of a disk, by name, lowest layer first (`disk.json`). The last one is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layered {
    version: u32,
    pub base: String,
    pub layers: Vec<String>,
}

/// A base image and layers over it, open for reading.
#[derive(Debug)]
pub struct Files {
    pub base: File,
    /// Lowest first.
    pub layers: Vec<File>,
}

impl Layered {
    /// As it is written down; `None`: the disk is one raw file, or there is none.
    ///
    /// # Errors
    /// The record cannot be read, or names what cannot be.
    pub fn of(dir: &SandboxDir) -> Result<Option<Self>, LayersError> {
        let record: Option<Self> = dir.read_record(state::DISK_RECORD)?;
        let wrong = |why: String| LayersError::Record {
            path: dir.file(state::DISK_RECORD),
            why,
        };
        if let Some(of) = &record {
            if of.version != VERSION {
                let why = format!(
                    "it has version {}, this program reads {VERSION}",
                    of.version
                );
                return Err(wrong(why));
            }
            if !(1..=MAX_LAYERS).contains(&of.layers.len()) {
                return Err(wrong(format!("it names {} layers", of.layers.len())));
            }
            if let Some(name) = of.names().find(|name| number_of(name).is_none()) {
                return Err(wrong(format!(
                    "it names '{name}', which is no file of a disk"
                )));
            }
        }
        Ok(record)
    }

    /// The same without a layer that a snapshot which came to nothing has left on top. For whoever starts a VMM.
    ///
    /// # Errors
    /// A file cannot be read, or the record not be written.
    pub fn settled(dir: &SandboxDir, durably: bool) -> Result<Option<Self>, LayersError> {
        let Some(mut of) = Self::of(dir)? else {
            return Ok(None);
        };
        if of.has_spare(dir)?
            && let Some(top) = of.layers.pop()
        {
            check_empty(dir, &top)?;
            of.record(dir, durably)?;
            let _ = std::fs::remove_file(dir.file(&top));
        }
        Ok(Some(of))
    }

    /// Makes the files of a disk that begins as an image with frozen layers over it, beside those that there are.
    /// They become the sandbox's by [`Layered::install`].
    ///
    /// # Errors
    /// A file cannot be made; none is left then.
    pub fn make(
        dir: &SandboxDir,
        base: &File,
        frozen: &[File],
        durably: bool,
    ) -> Result<Self, LayersError> {
        let mut made = Vec::new();
        let done = make_files(dir, base, frozen, durably, &mut made);
        if done.is_err() {
            for name in &made {
                let _ = std::fs::remove_file(dir.file(name));
            }
        }
        done?;
        let base = made.remove(0);
        Ok(Self {
            version: VERSION,
            base,
            layers: made,
        })
    }

    /// Makes this the sandbox's disk; the files of the one before go.
    ///
    /// # Errors
    /// A file is not there any more, or the record cannot be written: the disk is the one before. If it was written,
    /// and only cannot be made durable, it is this one; the files of both are there.
    pub fn install(&self, dir: &SandboxDir, durably: bool) -> Result<(), LayersError> {
        self.open(dir)?;
        self.record(dir, durably)?;
        let _ = std::fs::remove_file(dir.file(state::DISK));
        self.sweep(dir);
        Ok(())
    }

    /// Removes files of disks that are not this one's. For whoever keeps others from making any.
    pub fn sweep(&self, dir: &SandboxDir) {
        for entry in std::fs::read_dir(dir.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().into_string().unwrap_or_default();
            if number_of(&name).is_some() && !self.names().any(|own| *own == name) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Removes files that were made, and will not be installed. If they were all the same, as far as the record
    /// tells, they stay.
    pub fn discard(&self, dir: &SandboxDir) {
        for name in self.names().filter(|name| !may_be_named(dir, name)) {
            let _ = std::fs::remove_file(dir.file(name));
        }
    }

    /// Opens all, for reading. They are what they are now, whatever becomes of their names.
    ///
    /// # Errors
    /// One is not there.
    pub fn open(&self, dir: &SandboxDir) -> Result<Files, LayersError> {
        let layers = self.layers.iter().map(|name| open(dir, name));
        Ok(Files {
            base: open(dir, &self.base)?,
            layers: layers.collect::<Result<_, _>>()?,
        })
    }

    /// Opens what a snapshot is of, and sees to the layer that will be written when the present top is frozen: made
    /// and written down. Returns its name. For whoever keeps others from taking a snapshot.
    ///
    /// # Errors
    /// There are too many, or it cannot be made; nothing has changed then. Or it cannot be made durable: then it is
    /// made and written down, for whoever comes next.
    pub fn next(
        &mut self,
        dir: &SandboxDir,
        durably: bool,
    ) -> Result<(Files, String), LayersError> {
        let mut files = self.open(dir)?;
        if self.has_spare(dir)? {
            // Not removed and made anew: the VMM may yet get to what it was asked, and use it.
            files.layers.pop();
            return Ok((files, self.layers.last().cloned().unwrap_or_default()));
        }
        let Some(top) = self
            .layers
            .last()
            .filter(|_| self.layers.len() < MAX_LAYERS)
        else {
            return Err(LayersError::Layers(layers::Error::TooMany));
        };
        let below = head(dir, top)?;
        let name = empty_layer(dir, below.size, below.id)?;
        self.layers.push(name.clone());
        if let Err(error) = self.record(dir, durably) {
            if !may_be_named(dir, &name) {
                self.layers.pop();
                let _ = std::fs::remove_file(dir.file(&name));
            }
            return Err(error);
        }
        Ok((files, name))
    }

    /// Whether the top layer is one that a snapshot wrote down, and that the VMM does not use yet.
    fn has_spare(&self, dir: &SandboxDir) -> Result<bool, LayersError> {
        match self.layers.as_slice() {
            [.., below, _] => Ok(head(dir, below)?.state != State::Frozen),
            _ => Ok(false),
        }
    }

    /// If there are many layers, puts one in the place of the newest frozen ones: of as many as are not large beside
    /// those over them, so that what is large is not written again each time. `tell` has the VMM that runs use it,
    /// given its name. If that cannot be, all is as it was.
    ///
    /// # Errors
    /// No more layers are possible, and they cannot be merged.
    pub fn merge(
        &mut self,
        dir: &SandboxDir,
        durably: bool,
        mut tell: impl FnMut(&str) -> Result<(), String>,
    ) -> Result<(), LayersError> {
        if self.layers.len() < MERGE_FROM || self.has_spare(dir)? {
            return Ok(());
        }
        let frozen = self.layers.len().saturating_sub(1);
        let first = worth_merging(&self.sizes(dir, frozen));
        let merged = match self.merge_frozen(dir, durably, first..frozen, &mut tell) {
            // Whoever merged before may have been cut off between telling the VMM and writing it down: then the VMM
            // has one for several that are written down here. One for all can take the place of whatever it has.
            Err(NotMerged::Refused(_)) if first > 0 => {
                self.merge_frozen(dir, durably, 0..frozen, &mut tell)
            }
            merged => merged,
        };
        match merged {
            Err(why) if self.layers.len() >= MAX_LAYERS => Err(LayersError::Full(why.to_string())),
            _ => Ok(()),
        }
    }

    /// Bytes on the host's disk of the lowest `count` layers.
    fn sizes(&self, dir: &SandboxDir, count: usize) -> Vec<u64> {
        let frozen = self.layers.iter().take(count);
        let of = frozen.map(|name| std::fs::metadata(dir.file(name)));
        of.map(|of| of.map_or(0, |of| of.blocks().saturating_mul(512)))
            .collect()
    }

    fn merge_frozen(
        &mut self,
        dir: &SandboxDir,
        durably: bool,
        range: Range<usize>,
        tell: &mut impl FnMut(&str) -> Result<(), String>,
    ) -> Result<(), NotMerged> {
        let frozen = self.layers.get(range.clone()).unwrap_or_default();
        let opened = frozen
            .iter()
            .map(|name| Ok((open(dir, name)?, name.clone())));
        let view = View::open(opened.collect::<Result<_, LayersError>>()?)?;
        let (file, name) = new_file(dir, LAYER)?;
        let merged = layers::merge(&view, file, &name, &mut |_| Ok(()))
            .map_err(LayersError::from)
            // Before the VMM uses it: after a crash either record can be opened.
            .and_then(|_| sync_dir(dir, durably))
            .map_err(NotMerged::from)
            .and_then(|()| tell(&name).map_err(NotMerged::Refused));
        if let Err(error) = merged {
            let _ = std::fs::remove_file(dir.file(&name));
            return Err(error);
        }
        let mut new = self.clone();
        let old: Vec<String> = new.layers.splice(range, [name]).collect();
        // If this fails both are there, and hold the same; see `merge`.
        new.record(dir, durably)?;
        *self = new;
        for name in old {
            let _ = std::fs::remove_file(dir.file(&name));
        }
        Ok(())
    }

    /// Bytes of the host's disk that it takes; what it shares with others is not counted.
    #[must_use]
    pub fn used(&self, dir: &SandboxDir) -> u64 {
        let used = self.names().map(|name| {
            let of = std::fs::metadata(dir.file(name)).ok();
            let own = of.filter(|of| of.nlink() == 1);
            own.map_or(0, |of| of.blocks().saturating_mul(512))
        });
        used.sum()
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.base).chain(&self.layers)
    }

    fn record(&self, dir: &SandboxDir, durably: bool) -> Result<(), LayersError> {
        if durably {
            // The names of new files, before the record that needs them.
            sync_dir(dir, true)?;
            return Ok(dir.write_record_durably(state::DISK_RECORD, self)?);
        }
        Ok(dir.write_record(state::DISK_RECORD, self)?)
    }
}

impl Files {
    /// Has the system write out what the top layer's file holds, so that freezing it has little to do. Only a
    /// freeze makes sure; so what fails here is no failure.
    pub fn write_out(&self) {
        if let Some(top) = self.layers.last() {
            let _ = top.sync_data();
        }
    }
}

/// From which of these layers on to merge, by their sizes, lowest first: two at the least.
fn worth_merging(sizes: &[u64]) -> usize {
    let mut first = sizes.len().saturating_sub(2);
    let mut sum: u64 = sizes.iter().skip(first).sum();
    while let Some((below, size)) = first
        .checked_sub(1)
        .and_then(|below| Some((below, *sizes.get(below)?)))
        && size <= sum
    {
        first = below;
        sum = sum.saturating_add(size);
    }
    first
}

/// `None`: no file of a disk is called so.
fn number_of(name: &str) -> Option<u32> {
    let (number, extension) = name.strip_prefix("disk-")?.split_once('.')?;
    let plain = number.bytes().all(|byte| byte.is_ascii_digit());
    (plain && (extension == BASE || extension == LAYER))
        .then(|| number.parse().ok())
        .flatten()
}

/// Whether the record may name that file: it does, or cannot be read. One that could not be written durably may have
/// been written.
fn may_be_named(dir: &SandboxDir, name: &str) -> bool {
    let record: Result<Option<Layered>, _> = dir.read_record(state::DISK_RECORD);
    match record {
        Ok(record) => record.is_some_and(|of| of.names().any(|named| named == name)),
        Err(_) => true,
    }
}

fn open(dir: &SandboxDir, name: &str) -> Result<File, LayersError> {
    let path = dir.file(name);
    File::open(&path).map_err(io_failed("open", &path))
}

fn head(dir: &SandboxDir, name: &str) -> Result<layers::Head, LayersError> {
    Ok(layers::head(&open(dir, name)?, name)?)
}

/// A layer over one that is not frozen never had anything written to it.
fn check_empty(dir: &SandboxDir, name: &str) -> Result<(), LayersError> {
    // One that was not made to its end is as empty.
    let path = dir.file(name);
    match std::fs::metadata(&path) {
        Ok(file) if file.len() > 0 => {}
        _ => return Ok(()),
    }
    let view = View::open(vec![(open(dir, name)?, name.to_owned())])?;
    if view.extents().next().is_none() {
        return Ok(());
    }
    Err(LayersError::Record {
        path,
        why: "it holds something, and the layer below it is not frozen".to_owned(),
    })
}

fn sync_dir(dir: &SandboxDir, durably: bool) -> Result<(), LayersError> {
    if !durably {
        return Ok(());
    }
    let synced = File::open(dir.path()).and_then(|dir| dir.sync_all());
    synced.map_err(io_failed("write back", dir.path()))
}

/// Has `make` make a file under a name that no other one has.
fn new_name<T>(
    dir: &SandboxDir,
    extension: &str,
    make: impl Fn(&Path) -> io::Result<T>,
) -> Result<(T, String), LayersError> {
    let taken = std::fs::read_dir(dir.path())
        .into_iter()
        .flatten()
        .flatten();
    let taken = taken.filter_map(|entry| number_of(entry.file_name().to_str()?));
    let first = taken.max().map_or(0, |number| number.saturating_add(1));
    for number in first..NUMBERS {
        let name = format!("disk-{number}.{extension}");
        let path = dir.file(&name);
        #[cfg(test)]
        state::failing::step();
        match make(&path) {
            Ok(made) => return Ok((made, name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(io_failed("make the file", &path)(error));
            }
        }
    }
    Err(LayersError::Record {
        path: dir.path().to_path_buf(),
        why: "there are no more names for files of its disk".to_owned(),
    })
}

fn create_new(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn new_file(dir: &SandboxDir, extension: &str) -> Result<(File, String), LayersError> {
    new_name(dir, extension, create_new)
}

/// An empty layer, whose file is durable.
fn empty_layer(dir: &SandboxDir, size: u64, parent: LayerId) -> Result<String, LayersError> {
    let (file, name) = new_file(dir, LAYER)?;
    match layers::create(&file, &name, size, parent) {
        Ok(_) => Ok(name),
        Err(error) => {
            let _ = std::fs::remove_file(dir.file(&name));
            Err(error.into())
        }
    }
}

/// Base image first, then all layers; `made` has the names, whatever fails.
fn make_files(
    dir: &SandboxDir,
    base: &File,
    frozen: &[File],
    durably: bool,
    made: &mut Vec<String>,
) -> Result<(), LayersError> {
    let size = base.metadata().map_err(io_failed("look at", dir.path()))?;
    let mut share = |file: &File, extension| {
        let ((), name) = new_name(dir, extension, |path| share(file, path, durably))?;
        made.push(name);
        Ok::<(), LayersError>(())
    };
    share(base, BASE)?;
    let mut below = LayerId::BASE;
    for file in frozen {
        share(file, LAYER)?;
        let head = layers::head(file, "a layer of the parent")?;
        if head.state != State::Frozen {
            let layer = "a layer of the parent".to_owned();
            return Err(layers::Error::NotFrozen { layer }.into());
        }
        below = head.id;
    }
    made.push(empty_layer(dir, size.len(), below)?);
    Ok(())
}

/// Gives a file that nobody writes another name, or copies it where that is not possible.
fn share(file: &File, to: &Path, durably: bool) -> io::Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, &from, CWD, to, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST) => return Err(io::ErrorKind::AlreadyExists.into()),
        // On another file system, of another user, or it has no name any more.
        Err(_) => {
            let copy = create_new(to)?;
            let copied = File::open(from)
                .and_then(|from| copy_into(from, copy.try_clone()?))
                .and_then(|()| copy.set_permissions(Permissions::from_mode(0o400)));
            if let Err(error) = copied {
                let _ = std::fs::remove_file(to);
                return Err(error);
            }
        }
    }
    if durably {
        let synced = File::open(to).and_then(|file| file.sync_all());
        return synced.inspect_err(|_| drop(std::fs::remove_file(to)));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
