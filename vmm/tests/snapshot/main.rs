//! Snapshots of a bare guest, saved by one process and restored by others. The guest needs no
//! kernel, so that these tests run wherever there is a `/dev/kvm`, also one that emulates.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod failing;
mod faults;
mod handler;
mod kept;
mod layers;
#[path = "../../../tests/support/mini_guest.rs"]
mod mini_guest;
mod process;
#[path = "../../../tests/support/small_disk.rs"]
mod small_disk;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use mini_guest::{INCREMENT, MULTIPLIER, check, kernel};
use process::{Vmm, has_kvm};

const MIB: u64 = 64;
/// A VMM whose guest computes; its numbers go to the file `out`.
fn computing(dir: &Path, out: &str) -> Vmm {
    fs::write(dir.join("kernel"), kernel()).unwrap();
    let vmm = Vmm::start(dir, &[]);
    vmm.put(
        "/machine-config",
        &format!(r#"{{"vcpu_count": 2, "mem_size_mib": {MIB}}}"#),
    );
    vmm.put("/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    vmm.put(
        "/drives/disk",
        r#"{"drive_id": "disk", "path_on_host": "disk", "is_root_device": false}"#,
    );
    vmm.put("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#);
    vmm.put("/entropy", "{}");
    vmm.put("/balloon", r#"{"amount_mib": 1, "deflate_on_oom": true}"#);
    vmm.put("/serial", &format!(r#"{{"serial_out_path": "{out}"}}"#));
    vmm.put("/actions", r#"{"action_type": "InstanceStart"}"#);
    vmm
}

fn loading(dir: &Path, out: &str, load: &str) -> Vmm {
    let vmm = Vmm::start(dir, &[]);
    vmm.put("/serial", &format!(r#"{{"serial_out_path": "{out}"}}"#));
    vmm.put("/snapshot/load", load);
    vmm
}

/// Waits until `count` more bytes than now are in the file.
fn wait_for(file: &Path, count: u64) {
    let len = || fs::metadata(file).map_or(0, |m| m.len());
    let wanted = len() + count;
    process::eventually("numbers of the guest", || len() >= wanted);
}

const PAUSE: (&str, &str) = ("/vm", r#"{"state": "Paused"}"#);
const RESUME: (&str, &str) = ("/vm", r#"{"state": "Resumed"}"#);

fn save(vmm: &Vmm, kind: &str, state: &str, ram: &str) {
    vmm.put(
        "/snapshot/create",
        &format!(
            r#"{{"snapshot_type": "{kind}", "snapshot_path": "{state}", "mem_file_path": "{ram}"}}"#
        ),
    );
}

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    dir
}

/// Copies what is no hole in `diff` over `base`.
fn merge(base: &Path, diff: &Path) {
    use rustix::fs::{SeekFrom, seek};
    let diff = File::open(diff).unwrap();
    let base = File::options().write(true).open(base).unwrap();
    let mut at = 0;
    while let Ok(start) = seek(&diff, SeekFrom::Data(at)) {
        at = seek(&diff, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; (at - start) as usize];
        diff.read_exact_at(&mut bytes, start).unwrap();
        base.write_all_at(&bytes, start).unwrap();
    }
}

#[test]
fn a_guest_computes_on_in_other_processes() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let first = computing(dir, "out1");
    wait_for(&dir.join("out1"), 4000);
    let refused = first.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
    );
    assert!(refused.refused().contains("running"), "{refused:?}");
    first.patch(PAUSE);
    save(&first, "Full", "state1", "ram1");
    let ram = fs::metadata(dir.join("ram1")).unwrap();
    assert_eq!(ram.len(), MIB << 20);
    assert!(ram.blocks() * 512 < 4 << 20, "it is not sparse");
    first.kill();

    // The drive's lock and the socket are free again, and found by the paths in the snapshot.
    let load = r#"{"snapshot_path": "state1", "resume_vm": true,
        "mem_backend": {"backend_type": "File", "backend_path": "ram1"}}"#;
    let second = loading(dir, "out2", load);
    wait_for(&dir.join("out2"), 4000);
    let config = second.call("GET", "/vm/config", "").body;
    assert!(config.contains(r#""vcpu_count":2"#), "{config}");
    let again = second.call("PUT", "/snapshot/load", load);
    assert!(again.refused().contains("guest already"), "{again:?}");
    second.patch(PAUSE);
    // Over the very file that RAM is a view of: it is replaced, not changed.
    save(&second, "Diff", "state2", "diff");
    save(&second, "Full", "state2", "ram1");
    save(&second, "Full", "state3", "ram3");
    let cut = fs::metadata(dir.join("out2")).unwrap().len();
    second.patch(RESUME);
    wait_for(&dir.join("out2"), 800);
    second.kill();
    assert!(fs::read(dir.join("ram1")).unwrap() == fs::read(dir.join("ram3")).unwrap());

    // What ran after the snapshot is not in it.
    let third = loading(
        dir,
        "out3",
        r#"{"snapshot_path": "state3", "mem_file_path": "ram3", "clock_realtime": true}"#,
    );
    assert!(third.call("GET", "/", "").body.contains("Paused"));
    third.patch(RESUME);
    wait_for(&dir.join("out3"), 4000);
    third.patch(PAUSE);
    third.kill();
    let second = File::options().write(true).open(dir.join("out2"));
    second.unwrap().set_len(cut).unwrap();
    check(dir, &["out1", "out2", "out3"]);
}

#[test]
fn a_diff_over_its_base_is_the_whole() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let vmm = computing(dir, "out");
    wait_for(&dir.join("out"), 800);
    vmm.patch(PAUSE);
    save(&vmm, "Full", "state", "base");
    vmm.patch(RESUME);
    wait_for(&dir.join("out"), 800);
    vmm.patch(PAUSE);
    save(&vmm, "Diff", "state", "diff");
    save(&vmm, "Full", "state", "whole");
    assert_ne!(
        fs::read(dir.join("base")).unwrap(),
        fs::read(dir.join("whole")).unwrap()
    );
    merge(&dir.join("base"), &dir.join("diff"));
    assert!(fs::read(dir.join("base")).unwrap() == fs::read(dir.join("whole")).unwrap());
}

#[test]
fn a_jailed_vmm_gets_everything_by_descriptor() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let open = |name: &str| {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(name))
            .unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        file
    };
    let first = computing(dir, "out1");
    wait_for(&dir.join("out1"), 800);
    first.patch(PAUSE);
    save(&first, "Full", "state", "ram");
    let full = first.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "fd:gone", "mem_file_path": "ram"}"#,
    );
    assert!(
        full.refused().contains("fd gone") || full.refused().contains("\"gone\""),
        "{full:?}"
    );
    first.kill();
    let files = [open("state"), open("ram"), open("disk")];
    let names = ["state", "ram", "disk"];
    let fds: Vec<String> = names
        .iter()
        .zip(&files)
        .map(|(name, file)| format!("{name}={}", file.as_raw_fd()))
        .collect();
    let fds: Vec<&str> = fds.iter().flat_map(|fd| ["--fd", fd.as_str()]).collect();
    let second = Vmm::start(dir, &fds);
    second.put("/serial", r#"{"serial_out_path": "out2"}"#);
    second.put(
        "/snapshot/load",
        r#"{"snapshot_path": "fd:state", "mem_file_path": "fd:ram", "resume_vm": true,
            "drive_overrides": [{"drive_id": "disk", "path_on_host": "fd:disk"}],
            "vsock_override": {"uds_path": "other.sock"}}"#,
    );
    wait_for(&dir.join("out2"), 800);
    assert!(dir.join("other.sock").exists());
    second.patch(PAUSE);
    check(dir, &["out1", "out2"]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let vmm = computing(dir, "out");
    vmm.patch(PAUSE);
    save(&vmm, "Full", "state", "ram");
    let onto = vmm.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "none/state", "mem_file_path": "ram"}"#,
    );
    assert!(onto.refused().contains("none/state"), "{onto:?}");
    vmm.kill();
    let state = fs::read(dir.join("state")).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    write("cut", &state[..state.len() / 2]);
    write("none", b"");
    let mut other = state.clone();
    other[8] = 77;
    write("version", &other);
    let mut damaged = state;
    damaged[1000] ^= 4;
    write("damaged", &damaged);
    write("small", &[0; 4096]);
    let fresh = Vmm::start(dir, &[]);
    for (load, text) in [
        (
            r#""snapshot_path": "missing", "mem_file_path": "ram""#,
            "missing",
        ),
        (
            r#""snapshot_path": "none", "mem_file_path": "ram""#,
            "not a state file",
        ),
        (
            r#""snapshot_path": "kernel", "mem_file_path": "ram""#,
            "not a state file",
        ),
        (
            r#""snapshot_path": "cut", "mem_file_path": "ram""#,
            "cut off",
        ),
        (
            r#""snapshot_path": "version", "mem_file_path": "ram""#,
            "version 77",
        ),
        (
            r#""snapshot_path": "damaged", "mem_file_path": "ram""#,
            "damaged",
        ),
        (
            r#""snapshot_path": "state", "mem_file_path": "small""#,
            "67108864",
        ),
        (
            r#""snapshot_path": "state", "mem_file_path": "ram",
            "drive_overrides": [{"drive_id": "d", "path_on_host": "disk"}]"#,
            "no drive \"d\"",
        ),
        (
            r#""snapshot_path": "state", "mem_file_path": "ram",
            "drive_overrides": [{"drive_id": "disk", "path_on_host": "tiny"}]"#,
            "sectors",
        ),
    ] {
        write("tiny", &[0; 512]);
        let answer = fresh.call("PUT", "/snapshot/load", &format!("{{{load}}}"));
        let message = answer.refused().replace("\\\"", "\"");
        assert!(message.contains(text), "{message} does not say {text}");
    }
    // After all of that it still takes the right one.
    fresh.put(
        "/snapshot/load",
        r#"{"snapshot_path": "state", "mem_file_path": "ram"}"#,
    );
    fresh.kill();
    let prepared = Vmm::start(dir, &[]);
    prepared.put("/prepare", r#"{"vcpu_count": 1}"#);
    let load = r#"{"snapshot_path": "state", "mem_file_path": "ram"}"#;
    let refused = prepared.call("PUT", "/snapshot/load", load);
    assert!(refused.refused().contains("prepared for 1"), "{refused:?}");
    prepared.kill();
    let ready = Vmm::start(dir, &[]);
    ready.put("/prepare", r#"{"vcpu_count": 2}"#);
    ready.put("/snapshot/load", load);
    ready.kill();
    let expecting = Vmm::start(dir, &[]);
    write("odd", &[0; 4096]);
    let odd = r#"{"vcpu_count": 2, "mem_file_path": "odd"}"#;
    assert!(
        expecting
            .call("PUT", "/prepare", odd)
            .refused()
            .contains("odd")
    );
    expecting.put("/prepare", r#"{"vcpu_count": 2, "mem_file_path": "ram"}"#);
    fs::copy(dir.join("ram"), dir.join("other")).unwrap();
    let other = load.replace("\"ram\"", "\"other\"");
    let refused = expecting.call("PUT", "/snapshot/load", &other);
    assert!(
        refused.refused().contains("another memory file"),
        "{refused:?}"
    );
    let refused = expecting.call("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert!(refused.refused().len() > 10, "{refused:?}");
    expecting.put("/snapshot/load", load);
    expecting.kill();
}

/// Checks that what is in the file is somewhere in the guest's numbers, without a gap; returns where.
fn place_of(dir: &Path, file: &str) -> usize {
    let found = fs::read(dir.join(file)).unwrap();
    let mut number = 0u64;
    let mut expected = Vec::new();
    let begin = &found[..64];
    let mut at = None;
    // Most are among the first.
    for most in [1 << 20, 16 << 20] {
        while expected.len() < most {
            number = number.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
            expected.extend(number.to_le_bytes());
        }
        at = at.or_else(|| expected.windows(64).position(|window| window == begin));
        if at.is_some_and(|at| expected.len() - at >= found.len()) {
            break;
        }
    }
    let at = at.unwrap_or_else(|| panic!("{file} does not begin with the guest's numbers"));
    assert!(expected[at..].starts_with(&found), "{file} goes on wrongly");
    at
}

#[test]
fn increments_are_written_behind_a_guest_that_runs() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let vmm = computing(dir, "out");
    wait_for(&dir.join("out"), 800);
    let mut sizes = Vec::new();
    for (number, kind) in ["Full", "Increment", "Increment"].into_iter().enumerate() {
        let ram = format!("ram{number}");
        let body = format!(
            r#"{{"snapshot_type": "{kind}", "snapshot_path": "state", "mem_file_path": "{ram}",
                "resume_vm": true, "taken": "told"}}"#
        );
        let answer = vmm.call("PUT", "/snapshot/create", &body);
        assert!(answer.body.contains("paused_us"), "{answer:?}");
        let told = fs::metadata(dir.join("told")).unwrap().len();
        assert_eq!(told, number as u64 + 1, "one byte for each");
        sizes.push(fs::metadata(dir.join(&ram)).unwrap().blocks() * 512);
        if number > 0 {
            merge(&dir.join("ram0"), &dir.join(&ram));
        }
        wait_for(&dir.join("out"), 800);
    }
    assert!(sizes[2] < sizes[0] / 2, "{sizes:?}");
    // What fails loses nothing: the disk is full, or as good as.
    let failed = vmm.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_type": "Increment", "snapshot_path": "none/x", "mem_file_path": "y", "resume_vm": true}"#,
    );
    assert!(failed.refused().contains("none/x"), "{failed:?}");
    let failed = vmm.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "x", "mem_file_path": "y", "taken": "told"}"#,
    );
    assert!(failed.refused().contains("resume_vm"), "{failed:?}");
    wait_for(&dir.join("out"), 800);
    vmm.kill();
    let load = r#"{"snapshot_path": "state", "mem_file_path": "ram0", "resume_vm": true}"#;
    let second = loading(dir, "out2", load);
    wait_for(&dir.join("out2"), 4000);
    second.patch(PAUSE);
    assert_eq!(place_of(dir, "out"), 0);
    assert!(place_of(dir, "out2") > 1600);
}

#[test]
fn a_guest_goes_back_in_place_and_knows_what_it_needs() {
    if !has_kvm() {
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let first = computing(dir, "out");
    let booted = first.call("PUT", "/snapshot/reset", "{}");
    assert!(booted.refused().contains("not loaded"), "{booted:?}");
    wait_for(&dir.join("out"), 4000);
    first.patch(PAUSE);
    save(&first, "Full", "state", "ram");
    first.kill();
    let load = r#"{"snapshot_path": "state", "mem_file_path": "ram", "track_dirty_pages": true,
        "resume_vm": true}"#;
    let second = loading(dir, "out1", load);
    wait_for(&dir.join("out1"), 4000);
    second.put("/snapshot/working-set", r#"{"path": "set"}"#);
    let mut begin = 0;
    for name in ["a", "b", "c"] {
        second.put("/snapshot/reset", "{}");
        assert!(second.call("GET", "/", "").body.contains("Paused"));
        let all = fs::read(dir.join("out1")).unwrap();
        fs::write(dir.join(name), &all[begin..]).unwrap();
        begin = all.len();
        check(dir, &["out", name]);
        second.put("/snapshot/reset", r#"{"resume_vm": true}"#);
        wait_for(&dir.join("out1"), 4000);
    }
    second.kill();
    let set = fs::read(dir.join("set")).unwrap();
    assert!(set.len() > 8 && set.starts_with(b"BJWSET1\n"));
    let with_set = r#"{"snapshot_path": "state", "mem_file_path": "ram", "working_set": "set",
        "resume_vm": true}"#;
    let third = loading(dir, "out3", with_set);
    wait_for(&dir.join("out3"), 800);
    third.patch(PAUSE);
    check(dir, &["out", "out3"]);
    third.kill();
    // The same with RAM that was mapped before anybody asked for the guest.
    let ready = Vmm::start(dir, &[]);
    ready.put(
        "/prepare",
        r#"{"vcpu_count": 2, "mem_file_path": "ram", "working_set": "set"}"#,
    );
    ready.put("/serial", r#"{"serial_out_path": "out4"}"#);
    ready.put("/snapshot/load", with_set);
    wait_for(&dir.join("out4"), 800);
    ready.put("/snapshot/reset", "{}");
    let begin = fs::metadata(dir.join("out4")).unwrap().len();
    ready.put("/snapshot/reset", r#"{"resume_vm": true}"#);
    wait_for(&dir.join("out4"), 800);
    ready.patch(PAUSE);
    let all = fs::read(dir.join("out4")).unwrap();
    fs::write(dir.join("out5"), &all[begin as usize..]).unwrap();
    ready.kill();
    check(dir, &["out", "out5"]);
    let wrong = Vmm::start(dir, &[]);
    let refused = wrong.call(
        "PUT",
        "/snapshot/load",
        &with_set.replace("\"set\"", "\"ram\""),
    );
    assert!(refused.refused().contains("no recording"), "{refused:?}");
}
