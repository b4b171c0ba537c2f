//! Making and restoring sandboxes where the file system is full, or cannot be written: on real ones, in a mount
//! namespace of their own.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::small_disk::{Ballast, in_a_namespace, mount, mount_small};
use super::{NewDisk, Shape, create_with};
use crate::layered::Layered;
use crate::snapshots::{Disk, Saved, Source};
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, SandboxDir, StateRoot, failing};
use crate::{leftovers, lifecycle, registry};

const MIB: u64 = 1 << 20;

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
        working_set: None,
        records: None,
        ready: Default::default(),
        saved: Saved::parse(record.as_bytes()).unwrap(),
        snapshot: None,
        machine: None,
        disk: Some(Disk::Image(disk)),
        base_images: Default::default(),
        hot: true,
    }
}

fn disk(dir: &SandboxDir) -> Vec<u8> {
    match Layered::of(dir).unwrap() {
        None => std::fs::read(dir.file(state::DISK)).unwrap(),
        Some(disk) => {
            assert!(!dir.file(state::DISK).exists());
            assert_eq!(disk.layers.len(), 1);
            std::fs::read(dir.file(&disk.base)).unwrap()
        }
    }
}

fn files(dir: &SandboxDir) -> usize {
    std::fs::read_dir(dir.path()).unwrap().count()
}

#[test]
fn what_does_not_fit_leaves_all_as_it_was() {
    if !in_a_namespace("sandbox::faults::what_does_not_fit_leaves_all_as_it_was") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    mount_small(8, place.path());
    let root = StateRoot::at(place.path()).unwrap();
    let old = |dir: &SandboxDir| {
        std::fs::write(dir.file(state::DISK), b"old").unwrap();
        Ok(())
    };
    let (dir, lock) = create_with(&root, &spec("first"), old).unwrap();
    let source = source();
    {
        let _ballast = Ballast::leaving(root.dir(), MIB);
        // A reset, which copies before it stops anything.
        let before = files(&dir);
        for shape in [Shape::Raw, Shape::Layers] {
            let error = source.prepare(&dir, true, shape).unwrap_err().to_string();
            assert!(
                error.contains("disk") && error.contains("No space"),
                "{error}"
            );
            assert_eq!(files(&dir), before);
            assert_eq!(disk(&dir), b"old");
        }
        // A restore: nothing is left of it, and its name is free.
        let fill = |dir: &SandboxDir| source.fill(dir, Life::Persistent);
        let error = create_with(&root, &spec("second"), fill).unwrap_err();
        assert!(error.to_string().contains("No space"), "{error}");
        assert_eq!(root.list().unwrap().len(), 1);
    }
    {
        let _ballast = Ballast::leaving(root.dir(), 0);
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
    for shape in [Shape::Raw, Shape::Layers] {
        let error = source.prepare(&dir, true, shape).unwrap_err().to_string();
        assert!(error.contains("Read-only file system"), "{error}");
    }
    assert!(
        source.install(&dir, &NewDisk::Raw, true).is_err(),
        "there is nothing to put in its place"
    );
    assert_eq!(disk(&dir), b"old");
    mount(&["-o", "remount,rw"], place.path());

    // Where there is room, both go well.
    let fill = |dir: &SandboxDir| source.fill(dir, Life::Persistent);
    let (second, _lock) = create_with(&root, &spec("second"), fill).unwrap();
    assert!(disk(&second) == vec![0x5a; 2 << 20]);
    for shape in [Shape::Raw, Shape::Layers] {
        let before = disk(&dir);
        let new = source.prepare(&dir, true, shape).unwrap();
        assert!(disk(&dir) == before, "it is only beside the old one");
        source.install(&dir, &new, true).unwrap();
        assert!(disk(&dir) == vec![0x5a; 2 << 20]);
    }
}

const KILLED_AFTER: &str = "KILLED_AFTER_STEPS";
const KILLED_IN: &str = "KILLED_IN";
const NOT_KILLED: i32 = 42;

#[test]
#[ignore = "the next test starts it: it is killed"]
fn who_restores() {
    let number = std::env::var(KILLED_AFTER).unwrap().parse().unwrap();
    let root = StateRoot::at(Path::new(&std::env::var(KILLED_IN).unwrap())).unwrap();
    failing::die_after(number);
    let fill = |dir: &SandboxDir| source().fill(dir, Life::Persistent);
    create_with(&root, &spec("one"), fill).unwrap();
    std::process::exit(NOT_KILLED);
}

#[test]
fn whoever_is_killed_while_it_restores_leaves_a_whole_sandbox_or_what_is_cleaned_up() {
    let (mut halves, mut wholes) = (0, 0);
    for number in 0.. {
        assert!(number < 100, "it never comes to its end");
        let place = tempfile::tempdir().unwrap();
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::faults::who_restores", "--ignored"])
            .env(KILLED_AFTER, number.to_string())
            .env(KILLED_IN, place.path())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        let root = StateRoot::at(place.path()).unwrap();
        for listed in registry::list(&root).unwrap() {
            if leftovers::clean(&listed).unwrap() {
                halves += 1;
            } else {
                // The record of what it is comes last.
                wholes += 1;
                let dir = listed.found.dir();
                assert!(disk(dir) == vec![0x5a; 2 << 20], "after {number} steps");
                assert!(registry::find(&root, "one").is_ok());
                lifecycle::remove(&listed.found, true).unwrap();
            }
        }
        assert!(registry::list(&root).unwrap().is_empty());
        // Its name is free.
        let fill = |dir: &SandboxDir| source().fill(dir, Life::Persistent);
        let (dir, _lock) = create_with(&root, &spec("one"), fill).unwrap();
        assert!(disk(&dir) == vec![0x5a; 2 << 20]);
        if ended.code() == Some(NOT_KILLED) {
            break;
        }
        assert_eq!(ended.signal(), Some(9), "after {number} steps");
    }
    assert!(halves >= 9 && wholes >= 2, "{halves} {wholes}");
}
