//! Names of sandboxes: symbolic links, so that finding one by its name reads no file and a name can be
//! taken only once.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::Path;

use rustix::fs::FlockOperation;

use super::spec::{NameError, check_name};
use super::{SandboxDir, StateError, StateRoot, io_error};

/// A name could not be given to a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("the name '{name}' is taken by sandbox {id}")]
    Taken { name: String, id: String },
    #[error(transparent)]
    State(#[from] StateError),
}

impl StateRoot {
    /// The directory of links.
    #[must_use]
    pub fn names_dir(&self) -> &Path {
        &self.names
    }

    /// Gives a name to a sandbox, whose directory exists.
    ///
    /// # Errors
    /// Another sandbox has it, or it cannot be a name.
    pub fn claim_name(&self, name: &str, dir: &SandboxDir) -> Result<(), ClaimError> {
        check_name(name)?;
        let _lock = self.lock_names()?;
        if let Some(owner) = self.named(name) {
            if owner.id() == dir.id() {
                return Ok(());
            }
            return Err(ClaimError::Taken {
                name: name.to_owned(),
                id: owner.id().to_owned(),
            });
        }
        let link = self.names.join(name);
        // A link to a directory that is gone belongs to nobody.
        let _ = fs::remove_file(&link);
        symlink(Path::new("../sandboxes").join(dir.id()), &link)
            .map_err(io_error("make the link", &link))?;
        Ok(())
    }

    /// Takes away the name of a sandbox that is gone or going.
    pub fn release_name(&self, name: &str, id: &str) {
        if check_name(name).is_err() {
            return;
        }
        let Ok(_lock) = self.lock_names() else { return };
        let link = self.names.join(name);
        if fs::read_link(&link).is_ok_and(|target| target.file_name().is_some_and(|f| f == id)) {
            let _ = fs::remove_file(&link);
        }
    }

    /// The sandbox with exactly this name. Reads no file.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<SandboxDir> {
        check_name(name).ok()?;
        let target = fs::read_link(self.names.join(name)).ok()?;
        let path = self.sandboxes.join(target.file_name()?);
        path.is_dir().then(|| SandboxDir::existing(&path))
    }

    /// The sandbox with exactly this id.
    #[must_use]
    pub fn with_id(&self, id: &str) -> Option<SandboxDir> {
        let path = self.sandboxes.join(id);
        (super::is_id(id) && path.is_dir()).then(|| SandboxDir::existing(&path))
    }

    /// Every name that leads to a sandbox, with its id.
    #[must_use]
    pub fn names(&self) -> Vec<(String, String)> {
        let Ok(entries) = fs::read_dir(&self.names) else {
            return Vec::new();
        };
        let mut names: Vec<(String, String)> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let id = self.named(&name)?.id().to_owned();
                Some((name, id))
            })
            .collect();
        names.sort();
        names
    }

    fn lock_names(&self) -> Result<File, StateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.names)
            .map_err(io_error("make the directory", &self.names))?;
        let path = self.names.with_added_extension("lock");
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open the lock", &path))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(io_error("lock", &path))?;
        Ok(lock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_one_sandbox_until_that_is_gone() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (one, _lock) = root.create().unwrap();
        let (two, _lock) = root.create().unwrap();
        root.claim_name("web", &one).unwrap();
        root.claim_name("web", &one).unwrap();
        let error = root.claim_name("web", &two).unwrap_err();
        assert!(error.to_string().contains(one.id()), "{error}");
        assert_eq!(root.named("web").unwrap().id(), one.id());
        assert_eq!(root.names(), [("web".to_owned(), one.id().to_owned())]);
        assert!(root.named("../sandboxes").is_none());

        // Two's end does not take one's name; one's own does, even if nobody released it.
        root.release_name("web", two.id());
        assert!(root.named("web").is_some());
        one.remove().unwrap();
        assert!(root.named("web").is_none() && root.names().is_empty());
        root.claim_name("web", &two).unwrap();
        root.release_name("web", two.id());
        assert!(root.named("web").is_none());
    }
}
