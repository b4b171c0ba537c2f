//! Snapshots where the disk is full or cannot be written, and where the VMM is killed on its way: what was there is
//! there, and whatever is there restores.
use std::path::PathBuf;
use std::thread;

use super::failing::with_eio;
use super::small_disk::{Ballast, in_a_namespace, mount, mount_small};
use super::*;

/// A snapshot of that name runs on with the guest's numbers.
#[track_caller]
fn restores(dir: &Path, state: &str, ram: &str) {
    let _ = fs::remove_file(dir.join("again"));
    let load = format!(
        r#"{{"snapshot_path": "{state}", "mem_file_path": "{ram}", "resume_vm": true,
            "vsock_override": {{"uds_path": "again.sock"}},
            "drive_overrides": [{{"drive_id": "disk", "path_on_host": "disk2"}}]}}"#
    );
    let vmm = loading(dir, "again", &load);
    wait_for(&dir.join("again"), 800);
    vmm.kill();
    place_of(dir, "again");
    let _ = fs::remove_file(dir.join("again.sock"));
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn second_disk(dir: &Path) {
    fs::copy(dir.join("disk"), dir.join("disk2")).unwrap();
}

#[test]
fn what_does_not_fit_leaves_what_was_there_and_a_guest_that_goes_on() {
    if !has_kvm()
        || !in_a_namespace(
            "faults::what_does_not_fit_leaves_what_was_there_and_a_guest_that_goes_on",
        )
    {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    second_disk(dir);
    let small = dir.join("small");
    fs::create_dir(&small).unwrap();
    mount_small(16, &small);
    let vmm = computing(dir, "out");
    wait_for(&dir.join("out"), 800);
    let create = |kind: &str, resume: bool| {
        let body = format!(
            r#"{{"snapshot_type": "{kind}", "snapshot_path": "small/state", "mem_file_path": "small/ram", "resume_vm": {resume}}}"#
        );
        vmm.call("PUT", "/snapshot/create", &body)
    };
    let whole = create("Full", true);
    assert!(whole.body.contains("paused_us"), "{whole:?}");
    let content = || ["state", "ram"].map(|name| fs::read(small.join(name)).unwrap());
    let before = content();
    let needed =
        ["state", "ram"].map(|name| fs::metadata(small.join(name)).unwrap().blocks() * 512);
    // Nothing fits; RAM does not; RAM does, and the state does not.
    for (left, kind, resume) in [
        (0, "Full", true),
        (0, "Increment", true),
        (needed[1] / 2, "Full", true),
        (needed[1] / 2, "Full", false),
        (needed[1], "Full", true),
        (needed[1], "Full", false),
        (0, "Diff", false),
    ] {
        let ballast = Ballast::leaving(&small, left);
        if !resume {
            vmm.patch(PAUSE);
        }
        let refused = create(kind, resume);
        assert!(
            refused.refused().contains("No space"),
            "{left}: {refused:?}"
        );
        drop(ballast);
        assert_eq!(names(&small), ["ram", "state"], "{left} {kind} {resume}");
        assert!(content() == before, "{left} {kind} {resume}");
        if !resume {
            vmm.patch(RESUME);
        }
        wait_for(&dir.join("out"), 800);
    }
    mount(&["-o", "remount,ro"], &small);
    let refused = create("Full", true);
    assert!(refused.refused().contains("Read-only"), "{refused:?}");
    mount(&["-o", "remount,rw"], &small);
    restores(dir, "small/state", "small/ram");
    // With room, the next increment has all that the failed ones would have had.
    fs::copy(small.join("ram"), dir.join("base")).unwrap();
    let increment = create("Increment", true);
    assert!(increment.body.contains("paused_us"), "{increment:?}");
    merge(&dir.join("base"), &small.join("ram"));
    vmm.kill();
    restores(dir, "small/state", "base");
}

#[test]
fn what_the_disk_does_not_take_leaves_what_was_there_and_a_guest_that_goes_on() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    second_disk(dir);
    let first = computing(dir, "out");
    wait_for(&dir.join("out"), 800);
    let create = |vmm: &super::Vmm, kind: &str, resume: bool| {
        let body = format!(
            r#"{{"snapshot_type": "{kind}", "snapshot_path": "state", "mem_file_path": "ram", "resume_vm": {resume}}}"#
        );
        vmm.call("PUT", "/snapshot/create", &body)
    };
    let whole = create(&first, "Full", true);
    assert!(whole.body.contains("paused_us"), "{whole:?}");
    first.kill();
    let content = || ["state", "ram"].map(|name| fs::read(dir.join(name)).unwrap());
    let before = content();
    // Bytes cannot be written, cannot be made durable, names cannot be given.
    for (number, calls) in [
        &[libc::SYS_pwrite64][..],
        &[libc::SYS_fsync, libc::SYS_fdatasync],
        &[libc::SYS_rename, libc::SYS_renameat, libc::SYS_renameat2],
    ]
    .into_iter()
    .enumerate()
    {
        let vmm = super::Vmm::start_as(dir, &[], |command| with_eio(command, calls));
        let out = format!("out{number}");
        vmm.put("/serial", &format!(r#"{{"serial_out_path": "{out}"}}"#));
        let load = r#"{"snapshot_path": "state", "mem_file_path": "ram", "resume_vm": true}"#;
        vmm.put("/snapshot/load", load);
        wait_for(&dir.join(&out), 200);
        for (kind, resume) in [("Full", true), ("Diff", false)] {
            if !resume {
                vmm.patch(PAUSE);
            }
            let refused = create(&vmm, kind, resume);
            let why = refused.refused();
            assert!(why.contains("Input/output error"), "{calls:?}: {refused:?}");
            assert!(content() == before, "{calls:?} {kind} {resume}");
            let hidden = names(dir).into_iter().find(|name| name.starts_with('.'));
            assert_eq!(hidden, None, "{calls:?} {kind} {resume}");
            if !resume {
                vmm.patch(RESUME);
            }
            wait_for(&dir.join(&out), 200);
        }
        vmm.kill();
    }
    restores(dir, "state", "ram");
}

/// Until when a VMM that makes a snapshot lives.
type Moment = fn(&Path, &dyn Fn(&str) -> u64) -> bool;

#[test]
fn whenever_a_vmm_is_killed_a_state_that_is_there_has_its_ram() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    second_disk(dir);
    let kept = dir.join("kept");
    fs::create_dir(&kept).unwrap();
    let first = computing(dir, "out");
    wait_for(&dir.join("out"), 800);
    first.patch(PAUSE);
    save(&first, "Full", "state", "ram");
    first.kill();
    let moments: [Moment; 6] = [
        |_, _| true,
        |kept, _| names(kept).iter().any(|name| name.starts_with(".ram")),
        |kept, _| {
            let hidden = |name: &String| -> Option<PathBuf> {
                name.starts_with(".state").then(|| kept.join(name))
            };
            let mut files = names(kept).into_iter().filter_map(|name| hidden(&name));
            files.any(|file| fs::metadata(file).is_ok_and(|is| is.len() > 0))
        },
        |kept, _| names(kept).iter().any(|name| name.ends_with("-before")),
        |_, inode| inode("ram") != 0,
        |_, inode| inode("state") != 0,
    ];
    for (number, moment) in moments.iter().enumerate() {
        let _ = fs::remove_dir_all(&kept);
        fs::create_dir(&kept).unwrap();
        for name in ["state", "ram"] {
            fs::copy(dir.join(name), kept.join(name)).unwrap();
        }
        let inode = |name: &str| fs::metadata(kept.join(name)).map_or(0, |is| is.ino());
        let before = [inode("state"), inode("ram")];
        // 0 as long as it is the one that was there.
        let changed = |name: &str| {
            let now = inode(name);
            if before.contains(&now) { 0 } else { now }
        };
        let _ = fs::remove_file(dir.join("v.sock"));
        let load = r#"{"snapshot_path": "state", "mem_file_path": "ram", "resume_vm": true}"#;
        let out = format!("out{number}");
        let vmm = loading(dir, &out, load);
        wait_for(&dir.join(&out), 80);
        thread::scope(|scope| {
            let create = r#"{"snapshot_path": "kept/state", "mem_file_path": "kept/ram", "resume_vm": true}"#;
            let answer = scope.spawn(|| vmm.try_call("PUT", "/snapshot/create", create));
            while !answer.is_finished() && !moment(&kept, &changed) {
                std::hint::spin_loop();
            }
            vmm.end();
            let _ = answer.join();
        });
        vmm.kill();
        // What has no name yet, or none any more, is nobody's.
        if kept.join("state").exists() {
            restores(dir, "kept/state", "kept/ram");
        }
        assert!(kept.join("ram").exists(), "{number}");
    }
}
