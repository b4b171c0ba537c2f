//! Making and restoring sandboxes where the file system is full, or cannot be written: on real ones, in a mount
//! namespace of their own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::create_with;
use crate::snapshots::{Saved, Source};
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, SandboxDir, StateRoot};

const MIB: u64 = 1 << 20;

/// Runs a test of this file again, in such a namespace. `true`: this is that run.
fn in_a_namespace(name: &str) -> bool {
    if std::env::var_os("FAULTS_NAMESPACE").is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let done = command
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("sandbox::faults::{name}"),
            "--nocapture",
        ])
        .env("FAULTS_NAMESPACE", "1")
        .status()
        .expect("util-linux is installed");
    assert!(done.success(), "{name} failed in its namespace");
    false
}

fn mount(arguments: &[&str], path: &Path) {
    let done = Command::new("mount").args(arguments).arg(path).status();
    assert!(done.unwrap().success(), "mount {arguments:?}");
}

/// Takes all space but so much; given back when it is dropped.
struct Ballast(PathBuf);

impl Ballast {
    fn leaving(root: &StateRoot, bytes: u64) -> Self {
        let path = root.dir().join("ballast");
        let free = rustix::fs::statvfs(root.dir()).unwrap();
        let take = (free.f_bavail * free.f_frsize).saturating_sub(bytes);
        let file = File::create(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, take).unwrap();
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn spec(name: &str) -> SandboxSpec {
    SandboxSpec {
        name: Some(name.to_owned()),
        life: Life::Persistent,
        disk: Some(2 * MIB),
        ..SandboxSpec::default()
    }
}

/// A snapshot's disk: 2 MiB, all of them data.
fn source() -> Source {
    let record = r#"{"version": 1, "writer": "0", "sandbox": "0badcafe", "lineage": "0badcafe",
        "generation": 0, "spec": {"version": 1, "created_ms": 1, "life": "owned", "vcpus": 1, "memory": 1}}"#;
    let disk = tempfile::tempfile().unwrap();
    disk.write_all_at(&[0x5a; 2 << 20], 0).unwrap();
    Source {
        handler: None,
        saved: Saved::parse(record.as_bytes()).unwrap(),
        snapshot: None,
        machine: None,
        disk: Some(disk),
        base_images: Default::default(),
        hot: true,
    }
}

fn disk(dir: &SandboxDir) -> Vec<u8> {
    std::fs::read(dir.file(state::DISK)).unwrap()
}

#[test]
fn what_does_not_fit_leaves_all_as_it_was() {
    if !in_a_namespace("what_does_not_fit_leaves_all_as_it_was") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    mount(&["-t", "tmpfs", "-o", "size=8m", "small"], place.path());
    let root = StateRoot::at(place.path()).unwrap();
    let old = |dir: &SandboxDir| {
        std::fs::write(dir.file(state::DISK), b"old").unwrap();
        Ok(())
    };
    let (dir, lock) = create_with(&root, &spec("first"), old).unwrap();
    let source = source();
    {
        let _ballast = Ballast::leaving(&root, MIB);
        // A reset, which copies before it stops anything.
        let error = source.prepare(&dir, true).unwrap_err().to_string();
        assert!(
            error.contains("disk") && error.contains("No space"),
            "{error}"
        );
        assert!(!dir.file(state::NEW_DISK).exists());
        assert_eq!(disk(&dir), b"old");
        // A restore: nothing is left of it, and its name is free.
        let fill = |dir: &SandboxDir| source.fill(dir, Life::Persistent);
        let error = create_with(&root, &spec("second"), fill).unwrap_err();
        assert!(error.to_string().contains("No space"), "{error}");
        assert_eq!(root.list().unwrap().len(), 1);
    }
    {
        let _ballast = Ballast::leaving(&root, 0);
        let other = SandboxSpec {
            vcpus: 7,
            ..spec("first")
        };
        assert!(dir.write_record_durably(state::CONFIG, &other).is_err());
        let read: Option<SandboxSpec> = dir.read_record(state::CONFIG).unwrap();
        assert_eq!(
            read,
            Some(spec("first")),
            "a record is replaced as a whole or not at all"
        );
    }
    // Nothing may be open for writing then.
    drop(lock);
    mount(&["-o", "remount,ro"], place.path());
    let error = source.prepare(&dir, true).unwrap_err().to_string();
    assert!(error.contains("Read-only file system"), "{error}");
    assert!(
        source.install(&dir, true).is_err(),
        "there is nothing to put in its place"
    );
    assert_eq!(disk(&dir), b"old");
    mount(&["-o", "remount,rw"], place.path());

    // Where there is room, both go well.
    let fill = |dir: &SandboxDir| source.fill(dir, Life::Persistent);
    let (second, _lock) = create_with(&root, &spec("second"), fill).unwrap();
    assert!(disk(&second) == vec![0x5a; 2 << 20]);
    source.prepare(&dir, true).unwrap();
    assert_eq!(disk(&dir), b"old", "it is only beside the old one");
    source.install(&dir, true).unwrap();
    assert!(disk(&dir) == vec![0x5a; 2 << 20]);
}
