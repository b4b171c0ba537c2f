//! What the keeper takes from the system, as a trait: so that tests can fail any of it, or end the process there.

use std::fs::Metadata;
use std::io;
use std::path::Path;
use std::sync::Arc;

use belljar_store::fs::{Folder, Fs};

/// A moment in the life of a snapshot or a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Point {
    /// A nameless file is about to be made, for a capture or a template.
    MakeFile,
    /// The files of a capture are made and not handed over yet.
    Begun,
    /// A capture has its id, and nobody was told.
    Accepted,
    /// It is durable, and nobody was told.
    Kept,
    /// A template is about to be filled from chunks.
    Fill,
    /// It is whole, and about to be made durable.
    SyncTemplate,
    /// It is durable, and about to get its name.
    NameTemplate,
    /// A snapshot is taken from the list, and its templates are not removed yet.
    Removed,
}

impl Point {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::MakeFile,
        Self::Begun,
        Self::Accepted,
        Self::Kept,
        Self::Fill,
        Self::SyncTemplate,
        Self::NameTemplate,
        Self::Removed,
    ];
}

/// The system, or something that is worse.
pub trait Surroundings: Send + Sync {
    /// The folder of the store.
    ///
    /// # Errors
    /// It cannot be opened.
    fn store(&self, path: &Path) -> io::Result<Arc<dyn Fs>>;

    /// A point is reached.
    ///
    /// # Errors
    /// What comes next has failed like this.
    fn at(&self, point: Point) -> io::Result<()>;

    /// What is at a path that a client has named.
    ///
    /// # Errors
    /// What the system says.
    fn look(&self, path: &Path) -> io::Result<Metadata> {
        std::fs::metadata(path)
    }
}

/// As it is.
#[derive(Debug)]
pub(super) struct Undisturbed;

impl Surroundings for Undisturbed {
    fn store(&self, path: &Path) -> io::Result<Arc<dyn Fs>> {
        Ok(Arc::new(Folder::open(path)?))
    }

    fn at(&self, _point: Point) -> io::Result<()> {
        Ok(())
    }
}
