//! Layered drives: what a snapshot freezes, what clones write to, what can be merged under a guest.
use std::fs::{self, File};
use std::path::Path;

use belljar_layers::{Stack, View, merge};

use super::failing::with_eio;
use super::process::{Vmm, has_kvm};
use super::{PAUSE, RESUME, kernel, wait_for};

const SIZE: u64 = 1 << 20;

fn open(dir: &Path, name: &str) -> (File, String) {
    let mut options = File::options();
    let file = options.read(true).write(true).open(dir.join(name));
    (file.unwrap(), name.to_owned())
}

fn stack(dir: &Path, layers: &[&str]) -> Stack<File> {
    let (base, _) = open(dir, "base");
    let layers = layers.iter().map(|name| open(dir, name)).collect();
    Stack::open((base, "base"), layers, true).unwrap()
}

fn empty(dir: &Path, name: &str) {
    File::create(dir.join(name)).unwrap();
}

/// The layers of the one drive, as the VMM tells them.
fn layers(vmm: &Vmm) -> String {
    let config = vmm.call("GET", "/vm/config", "").body;
    let found = config.split_once(r#""layers":"#);
    let (_, rest) = found.unwrap_or_else(|| panic!("no layers: {config}"));
    rest.split_once(']').unwrap().0.to_owned() + "]"
}

fn create(next: &str, state: &str) -> String {
    format!(
        r#"{{"snapshot_path": "{state}", "mem_file_path": "{state}.ram", "next_layers": {{"disk": "{next}"}}}}"#
    )
}

fn load(state: &str, layers: &str) -> String {
    format!(
        r#"{{"snapshot_path": "{state}", "mem_backend": {{"backend_type": "File", "backend_path": "{state}.ram"}},
            "resume_vm": true, "drive_overrides": [{{"drive_id": "disk", "layers": [{layers}]}}]}}"#
    )
}

#[test]
fn a_snapshot_freezes_a_layer_and_clones_have_their_own() {
    if !has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    File::create(dir.join("base"))
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    for name in ["one", "two", "three", "clone"] {
        empty(dir, name);
    }
    // What a guest would have written before.
    let mut disk = stack(dir, &["one"]);
    disk.write(&[1; 4096], 4096).unwrap();
    disk.close().unwrap();
    drop(disk);

    fs::write(dir.join("kernel"), kernel()).unwrap();
    let vmm = Vmm::start(dir, &[]);
    run(&vmm, dir, 1);
    vmm.patch(PAUSE);

    // A next layer that cannot be, or for a drive that is not there, changes nothing.
    let refused = |body: &str, says: &str| {
        let answer = vmm.call("PUT", "/snapshot/create", body);
        assert!(answer.refused().contains(says), "{answer:?}: {says}");
    };
    refused(&create("base", "s"), "in use");
    refused(&create("kernel", "s"), "no usable disk layer");
    refused(&create("missing", "s"), "missing");
    refused(&create("one", "s"), "one");
    refused(&create("two", "s").replace("disk", "other"), "other");
    assert!(!dir.join("s").exists());
    assert_eq!(layers(&vmm), r#"["one"]"#);

    vmm.put("/snapshot/create", &create("two", "first"));
    assert_eq!(layers(&vmm), r#"["one","two"]"#);
    vmm.put("/snapshot/create", &create("three", "second"));
    assert_eq!(layers(&vmm), r#"["one","two","three"]"#);
    vmm.patch(RESUME);

    // Without a layer of its own a restored guest is refused, and the same call can be made again.
    let clone = Vmm::start(dir, &[]);
    let without = load("first", r#""one""#);
    let answer = clone.call("PUT", "/snapshot/load", &without);
    assert!(answer.refused().contains("in use"), "{answer:?}");
    let answer = clone.call("PUT", "/snapshot/load", &load("first", r#""one", "three""#));
    assert!(answer.refused().contains("in use"), "{answer:?}");
    clone.put("/snapshot/load", &load("first", r#""one", "clone""#));
    assert_eq!(layers(&clone), r#"["one","clone"]"#);

    // Two layers become one under the running guest.
    let view = View::open(vec![open(dir, "one"), open(dir, "two")]).unwrap();
    empty(dir, "merged");
    merge(&view, open(dir, "merged").0, "merged", &mut |_| Ok(())).unwrap();
    let merged = |path: &str| {
        let merged = format!(r#"{{"path_on_host": "{path}"}}"#);
        format!(r#"{{"drive_id": "disk", "merged_layers": {merged}}}"#)
    };
    // One without their clusters cannot take their place.
    empty(dir, "wrong");
    let wrong = open(dir, "wrong").0;
    let builder = belljar_layers::Builder::new(wrong, "wrong", SIZE, view.id(), view.parent());
    builder.unwrap().finish().unwrap();
    let answer = vmm.call("PATCH", "/drives/disk", &merged("wrong"));
    assert!(answer.refused().contains("same clusters"), "{answer:?}");
    vmm.patch(("/drives/disk", &merged("merged")));
    assert_eq!(layers(&vmm), r#"["merged","three"]"#);
    let other = r#"{"drive_id": "disk", "path_on_host": "base"}"#;
    let answer = vmm.call("PATCH", "/drives/disk", other);
    assert!(answer.refused().contains("merged_layers"), "{answer:?}");
    wait_for(&dir.join("out"), 100);

    // Of a paused guest alone the top layer is frozen, and all files may become others.
    for name in ["four", "five", "six"] {
        empty(dir, name);
    }
    let base = File::create(dir.join("image")).unwrap();
    base.set_len(SIZE).unwrap();
    let next = r#"{"drive_id": "disk", "next_layer": "four"}"#;
    let others = r#"{"drive_id": "disk", "path_on_host": "image", "layers": ["five"]}"#;
    for change in [next, others] {
        let answer = vmm.call("PATCH", "/drives/disk", change);
        assert!(answer.refused().contains("is running"), "{answer:?}");
    }
    vmm.patch(PAUSE);
    vmm.patch(("/drives/disk", next));
    assert_eq!(layers(&vmm), r#"["merged","three","four"]"#);
    let (three, _) = open(dir, "three");
    let head = belljar_layers::head(&three, "three").unwrap();
    assert_eq!(head.state, belljar_layers::State::Frozen);
    File::create(dir.join("large"))
        .unwrap()
        .set_len(2 * SIZE)
        .unwrap();
    let large = others.replace("image", "large").replace("five", "six");
    let answer = vmm.call("PATCH", "/drives/disk", &large);
    assert!(answer.refused().contains("2097152 bytes"), "{answer:?}");
    let answer = vmm.call("PATCH", "/drives/disk", &others.replace("five", "clone"));
    assert!(answer.refused().contains("in use"), "{answer:?}");
    assert_eq!(layers(&vmm), r#"["merged","three","four"]"#);
    vmm.patch(("/drives/disk", others));
    assert_eq!(layers(&vmm), r#"["five"]"#);
    let config = vmm.call("GET", "/vm/config", "").body;
    assert!(config.contains(r#""path_on_host":"image""#), "{config}");
    vmm.patch(RESUME);
    vmm.kill();
    clone.kill();
    // Also when nobody else has it open.
    let again = Vmm::start(dir, &[]);
    let answer = again.call("PUT", "/snapshot/load", &without);
    assert!(answer.refused().contains("it is frozen"), "{answer:?}");
    again.kill();

    let mut bytes = [0; 4096];
    stack(dir, &["merged", "three", "four"])
        .read(&mut bytes, 4096)
        .unwrap();
    assert_eq!(bytes, [1; 4096]);
}

/// Has a guest run from `kernel`, whose disk is the layer `one` over `base`; returns when it has said something.
fn run(vmm: &Vmm, dir: &Path, vcpus: u32) {
    let machine = format!(r#"{{"vcpu_count": {vcpus}, "mem_size_mib": 64}}"#);
    vmm.put("/machine-config", &machine);
    vmm.put("/boot-source", r#"{"kernel_image_path": "kernel"}"#);
    vmm.put(
        "/drives/disk",
        r#"{"drive_id": "disk", "path_on_host": "base", "is_root_device": false,
            "format": "layers", "layers": ["one"], "io_engine": "Async"}"#,
    );
    vmm.put("/serial", r#"{"serial_out_path": "out"}"#);
    vmm.put("/actions", r#"{"action_type": "InstanceStart"}"#);
    wait_for(&dir.join("out"), 100);
}

/// A VMM whose guest has the layers `one` and, made for it, `two`.
fn with_two_layers(dir: &Path, change: impl FnOnce(&mut std::process::Command)) -> Vmm {
    let base = File::create(dir.join("base")).unwrap();
    base.set_len(SIZE).unwrap();
    empty(dir, "one");
    let mut disk = stack(dir, &["one"]);
    disk.write(&[1; 4096], 4096).unwrap();
    disk.close().unwrap();
    drop(disk);
    let below = belljar_layers::head(&open(dir, "one").0, "one").unwrap();
    empty(dir, "two");
    belljar_layers::create(&open(dir, "two").0, "two", SIZE, below.id).unwrap();
    fs::write(dir.join("kernel"), kernel()).unwrap();
    let vmm = Vmm::start_as(dir, &[], change);
    run(&vmm, dir, 2);
    vmm
}

/// It is frozen when the guest runs on, and before anything is taken from the guest.
#[test]
fn a_layer_is_frozen_behind_the_guest_and_what_fails_then_is_told() {
    if !has_kvm() {
        return;
    }
    let create = |vmm: &Vmm, state: &str| {
        let body = create("two", state);
        let body = body.replacen('{', r#"{"resume_vm": true, "#, 1);
        vmm.call("PUT", "/snapshot/create", &body)
    };
    let state = |dir: &Path| {
        let head = belljar_layers::head(&open(dir, "one").0, "one");
        head.unwrap().state
    };
    let place = tempfile::tempdir().unwrap();
    let dir = place.path();
    let syncs = [libc::SYS_fsync, libc::SYS_fdatasync];
    let vmm = with_two_layers(dir, |command| with_eio(command, &syncs));
    let refused = create(&vmm, "s");
    let why = refused.refused();
    assert!(why.contains("Input/output error"), "{refused:?}");
    assert!(!dir.join("s").exists() && !dir.join("s.ram").exists());
    assert_eq!(layers(&vmm), r#"["one"]"#);
    assert_ne!(state(dir), belljar_layers::State::Frozen);
    wait_for(&dir.join("out"), 100);
    vmm.kill();

    let place = tempfile::tempdir().unwrap();
    let dir = place.path();
    let vmm = with_two_layers(dir, |_| {});
    let taken = create(&vmm, "s");
    assert!(taken.body.contains("layers_us"), "{taken:?}");
    assert_eq!(layers(&vmm), r#"["one","two"]"#);
    assert_eq!(state(dir), belljar_layers::State::Frozen);
    wait_for(&dir.join("out"), 100);
}
