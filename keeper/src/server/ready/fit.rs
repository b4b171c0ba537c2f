//! What a VMM that waits is prepared for.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use belljar_store::SnapshotId;

use crate::server::Surroundings;
use crate::v1;

/// What was restored last, and by which programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) id: SnapshotId,
    pub(super) vcpus: u32,
    pub(super) programs: v1::Programs,
}

/// What a VMM is prepared for, and what it is: it serves only what has all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fit {
    pub(super) target: Target,
    memory: FileState,
    /// What is brought in then.
    set: Option<FileState>,
    supervisor: FileState,
    vmm: FileState,
}

/// Which file, in which state: another one, or one that was replaced, differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileState {
    device: u64,
    inode: u64,
    bytes: u64,
    written: (i64, i64),
}

impl From<&Metadata> for FileState {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            written: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// Memory of a guest, and the recording of what it writes first, if there is one.
pub(super) type Needs<'a> = (&'a File, Option<&'a File>);

impl Fit {
    /// The programs' paths are a client's: looking there may take any time.
    pub(super) fn of(
        target: &Target,
        (memory, set): Needs<'_>,
        system: &dyn Surroundings,
    ) -> io::Result<Self> {
        let programs = &target.programs;
        let set = set.map(|set| Ok::<_, io::Error>((&set.metadata()?).into()));
        Ok(Self {
            set: set.transpose()?,
            memory: (&memory.metadata()?).into(),
            supervisor: (&system.look(Path::new(&programs.supervisor))?).into(),
            vmm: (&system.look(Path::new(&programs.vmm))?).into(),
            target: target.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::surroundings::Undisturbed;

    #[test]
    fn another_file_or_program_does_not_fit() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, name).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let target = Target {
            id: SnapshotId([1; 16]),
            vcpus: 1,
            programs: v1::Programs {
                supervisor: path("supervisor"),
                vmm: path("vmm"),
            },
        };
        let memory = File::open(path("memory")).unwrap();
        let set = File::open(path("set")).unwrap();
        let fit = |set| Fit::of(&target, (&memory, set), &Undisturbed).unwrap();
        let first = fit(None);
        assert_eq!(first, fit(None));
        assert_ne!(first, fit(Some(&set)));
        let other = File::open(path("other")).unwrap();
        assert_ne!(
            first,
            Fit::of(&target, (&other, None), &Undisturbed).unwrap()
        );
        // A program of the same name, in the place of the other one.
        std::fs::rename(path("new"), &target.programs.vmm).unwrap();
        assert_ne!(first, fit(None));
        std::fs::remove_file(&target.programs.vmm).unwrap();
        assert!(Fit::of(&target, (&memory, None), &Undisturbed).is_err());
    }
}
