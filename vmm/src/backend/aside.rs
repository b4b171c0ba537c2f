//! Files that appear whole or not at all: written beside their place, then renamed into it.
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file under way. Dropped before [`Aside::commit`] it leaves nothing behind.
#[derive(Debug)]
pub struct Aside {
    file: File,
    /// Where it is and where it shall be; `None`: it was handed over and stays where it is.
    place: Option<(PathBuf, PathBuf)>,
}

impl Aside {
    /// A new file that will be `path`, in the same directory. Only its owner can read it.
    pub fn create(path: &Path) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mut hidden = OsString::from(".");
        // Names have 255 bytes at most; of this one the number alone must be left.
        hidden.push(name.to_string_lossy().chars().take(32).collect::<String>());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        hidden.push(format!(".{}-{number}", std::process::id()));
        let temporary = path.with_file_name(hidden);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        Ok(Self {
            file,
            place: Some((temporary, path.to_owned())),
        })
    }

    /// An empty file that was handed over.
    pub fn given(file: File) -> Self {
        Self { file, place: None }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes what was written durable, before it gets its name. What becomes of a file that was handed
    /// over is up to whoever did.
    pub fn sync(&self) -> io::Result<()> {
        if self.place.is_none() {
            return Ok(());
        }
        self.file.sync_data()
    }

    /// Takes its name from the file that has it, durably, until that is put back by dropping what is returned.
    pub fn withdraw(&self) -> io::Result<Withdrawn> {
        let Some((temporary, path)) = &self.place else {
            return Ok(Withdrawn(None));
        };
        let mut before = temporary.clone().into_os_string();
        before.push("-before");
        let before = PathBuf::from(before);
        match std::fs::rename(path, &before) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Withdrawn(None)),
            Err(error) => return Err(error),
        }
        sync_folder_of(path);
        Ok(Withdrawn(Some((before, path.clone()))))
    }

    /// Gives the file its name; whatever had it keeps its contents for those who have it open.
    /// Call [`Aside::sync`] first.
    pub fn commit(&mut self) -> io::Result<()> {
        let Some((temporary, path)) = &self.place else {
            return Ok(());
        };
        std::fs::rename(temporary, path)?;
        sync_folder_of(path);
        self.place = None;
        Ok(())
    }
}

/// Makes names last. A directory that cannot be opened or synced (some file systems) has them all the same.
fn sync_folder_of(path: &Path) {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    if let Ok(directory) = File::open(parent.unwrap_or(Path::new("."))) {
        let _ = directory.sync_all();
    }
}

/// A file whose name another one is to get. Dropped before [`Withdrawn::forget`] it has its name again.
#[derive(Debug)]
pub struct Withdrawn(Option<(PathBuf, PathBuf)>);

impl Withdrawn {
    /// Removes it for good.
    pub fn forget(mut self) {
        if let Some((before, _)) = self.0.take() {
            let _ = std::fs::remove_file(before);
        }
    }
}

impl Drop for Withdrawn {
    fn drop(&mut self) {
        if let Some((before, path)) = &self.0 {
            let _ = std::fs::rename(before, path);
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.place {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_file_appears_whole_and_replaces_without_touching() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapshot");
        std::fs::write(&path, "old").unwrap();
        let mut reader = File::open(&path).unwrap();
        let mut aside = Aside::create(&path).unwrap();
        aside.file().write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        aside.sync().unwrap();
        aside.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(io::read_to_string(&mut reader).unwrap(), "old");
        assert_eq!(names(directory.path()), ["snapshot"]);
    }

    #[test]
    fn what_is_replaced_is_away_until_it_is_put_back_or_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let mut aside = Aside::create(&path).unwrap();
        // There is nothing yet.
        drop(aside.withdraw().unwrap());
        aside.commit().unwrap();
        std::fs::write(&path, "old").unwrap();
        let mut aside = Aside::create(&path).unwrap();
        let before = aside.withdraw().unwrap();
        assert!(!path.exists(), "a crash now leaves no old state");
        drop(before);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        aside.withdraw().unwrap().forget();
        assert!(!path.exists());
        aside.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert_eq!(names(directory.path()), ["state"]);
    }

    #[test]
    fn one_that_failed_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s".repeat(250));
        drop(Aside::create(&path).unwrap());
        assert!(names(directory.path()).is_empty());
        assert!(Aside::create(&directory.path().join("none/s")).is_err());
        assert!(Aside::create(directory.path()).is_err());
    }
}
