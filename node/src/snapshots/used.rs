//! Files that a sandbox uses and that are not in its snapshots: what is at their paths now must be what the guest
//! sees. A file can be replaced by another one of its name while it is open, or be changed in place.

use std::collections::{BTreeMap, HashSet};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;

use belljar_keeper::changed_ns;
use belljar_keeper::v1::BaseFile;
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::error::io_failed;
use super::saved::{INITRAMFS, KERNEL, base_files};
use crate::registry::Found;
use crate::state::spec::SandboxSpec;
use crate::state::{self, SandboxDir, StateError};

/// The files of a sandbox as they were when its guest was started (`bases.json`), by the name of a base image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Bases {
    files: BTreeMap<String, FileState>,
}

/// Which file, in which state: another one, or a changed one, differs in one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FileState {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Nanoseconds.
    changed: u64,
}

impl From<&Metadata> for FileState {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            changed: changed_ns(metadata),
        }
    }
}

impl Bases {
    /// Writes them down, before they are opened for a guest.
    pub(crate) fn note(dir: &SandboxDir, spec: &SandboxSpec) -> Result<(), StateError> {
        let files = base_files(spec).into_iter();
        // One that is not there is told by who opens it.
        let files = files
            .filter_map(|(name, path)| Some((name, (&std::fs::metadata(path).ok()?).into())))
            .collect();
        dir.write_record(state::BASES, &Self { files })
    }
}

/// The files of a sandbox whose VMM has this pid, by the name of a base image.
///
/// # Errors
/// One cannot be read, another one has its name, or it was changed since the guest was started.
pub(super) fn used_files(
    found: &Found,
    spec: &SandboxSpec,
    vmm: u32,
) -> Result<BTreeMap<String, BaseFile>, SnapshotError> {
    // A guest that an earlier version has started has no record.
    let bases: Bases = found.dir().read_record(state::BASES)?.unwrap_or_default();
    files(&found.called(), spec, &bases, vmm)
}

fn files(
    id: &str,
    spec: &SandboxSpec,
    bases: &Bases,
    vmm: u32,
) -> Result<BTreeMap<String, BaseFile>, SnapshotError> {
    let open = open_files(vmm).map_err(io_failed("tell which files the VMM has open"))?;
    let mut used = BTreeMap::new();
    for (name, path) in base_files(spec) {
        let replaced = |why: String| SnapshotError::Replaced {
            id: id.to_owned(),
            path: path.display().to_string(),
            why,
        };
        let metadata = std::fs::metadata(&path).map_err(|error| replaced(error.to_string()))?;
        let now = FileState::from(&metadata);
        // These were read once.
        let is_read_at_boot = name == KERNEL || name == INITRAMFS;
        if !is_read_at_boot && !open.contains(&(now.device, now.inode)) {
            return Err(replaced("another file is there now".to_owned()));
        }
        match bases.files.get(&name) {
            Some(then) if (then.device, then.inode) != (now.device, now.inode) => {
                return Err(replaced("another file is there now".to_owned()));
            }
            Some(then) if *then != now => {
                let why = "the file was written to, moved, linked or given other rights since the guest was started";
                return Err(replaced(why.to_owned()));
            }
            _ => {}
        }
        let file = BaseFile {
            path: path.to_string_lossy().into_owned(),
            device: now.device,
            inode: now.inode,
            bytes: now.bytes,
            changed: now.changed,
        };
        used.insert(name, file);
    }
    Ok(used)
}

/// Device and inode of all that a process has open.
fn open_files(pid: u32) -> io::Result<HashSet<(u64, u64)>> {
    let mut open = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        match std::fs::metadata(entry?.path()) {
            Ok(metadata) => drop(open.insert((metadata.dev(), metadata.ino()))),
            // Closed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::spec::DriveRecord;
    use std::fs::File;

    #[test]
    fn a_file_that_was_replaced_moved_or_closed_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        std::fs::write(&image, b"image").unwrap();
        std::fs::write(&data, b"data").unwrap();
        let spec = SandboxSpec {
            image: Some(image.clone()),
            // Not open: it was read when the guest was booted.
            kernel: Some(data.clone()),
            drives: vec![DriveRecord {
                path: data.clone(),
                read_only: true,
                id: Some("tools".to_owned()),
            }],
            ..SandboxSpec::default()
        };
        let bases = Bases::default();
        let used = || files("box", &spec, &bases, std::process::id());
        let why = || used().unwrap_err().to_string();
        let opened = File::open(&image).unwrap();
        assert!(why().contains("data"), "{}", why());
        let _data = File::open(&data).unwrap();
        let files = used().unwrap();
        assert_eq!(files["image"].inode, opened.metadata().unwrap().ino());
        let names: Vec<_> = files.keys().map(String::as_str).collect();
        assert_eq!(names, ["boot:kernel", "image", "tools"]);

        // The same bytes, in another file: nobody knows that they are the same.
        let new = dir.path().join("new");
        std::fs::write(&new, b"image").unwrap();
        std::fs::rename(&new, &image).unwrap();
        assert!(why().contains("another file is there now"), "{}", why());
        let remedy = used().unwrap_err().remedy().unwrap();
        assert!(remedy.contains("put"), "{remedy}");
        std::fs::remove_file(&image).unwrap();
        assert!(why().contains("No such file"), "{}", why());
    }

    #[test]
    fn a_file_that_was_changed_in_place_is_told_though_its_times_were_set_back() {
        let keep = tempfile::tempdir().unwrap();
        let root = crate::state::StateRoot::at(keep.path()).unwrap();
        let (sandbox, _lock) = root.create().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, b"image").unwrap();
        let spec = SandboxSpec {
            kernel: Some(image.clone()),
            ..SandboxSpec::default()
        };
        Bases::note(&sandbox, &spec).unwrap();
        let bases: Bases = sandbox.read_record(state::BASES).unwrap().unwrap();
        let used = || files("box", &spec, &bases, std::process::id());
        let before = &used().unwrap()["boot:kernel"];
        assert_eq!((before.bytes, before.path.is_empty()), (5, false));
        let written = image.metadata().unwrap().modified().unwrap();
        // The clock of a file system has a grain.
        std::thread::sleep(std::time::Duration::from_millis(15));
        let file = File::options().write(true).open(&image).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"other", 0).unwrap();
        file.set_modified(written).unwrap();
        let why = used().unwrap_err().to_string();
        assert!(why.contains("since the guest was started"), "{why}");
        sandbox.forget_last_run().unwrap();
        assert_eq!(sandbox.read_record::<Bases>(state::BASES).unwrap(), None);
    }
}
