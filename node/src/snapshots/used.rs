//! Files that a sandbox uses and that are not in its snapshots: what is at their paths now must be what the guest
//! sees. A file can be replaced by another one of its name while it is open.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;

use belljar_keeper::v1::BaseFile;

use super::SnapshotError;
use super::error::io_failed;
use super::saved::{INITRAMFS, KERNEL, base_files};
use crate::state::spec::SandboxSpec;

/// The files of a sandbox whose VMM has this pid, by the name of a base image.
///
/// # Errors
/// One cannot be read, or another one has its name.
pub(super) fn used_files(
    id: &str,
    spec: &SandboxSpec,
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
        let (device, inode) = (metadata.dev(), metadata.ino());
        // These were read once.
        let is_read_at_boot = name == KERNEL || name == INITRAMFS;
        if !is_read_at_boot && !open.contains(&(device, inode)) {
            return Err(replaced("another file is there now".to_owned()));
        }
        let file = BaseFile {
            path: path.to_string_lossy().into_owned(),
            device,
            inode,
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
        let used = || used_files("box", &spec, std::process::id());
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
}
