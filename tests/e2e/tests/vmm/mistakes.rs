//! Mistakes before there is a guest: each is named, changes nothing, and can be mended.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;

use belljar_e2e::vmm::Vmm;
use belljar_e2e::{assets_dir, bin_dir};
use serde_json::{Value, json};

fn refuses(vmm: &Vmm, path: &str, body: &Value, texts: &[&str]) {
    vmm.call("PUT", path, body).refuses(texts);
}

#[test]
fn numbers_fields_and_order() {
    let vmm = Vmm::new();
    for (vcpus, memory, word) in [
        (json!(0), json!(128), "vcpu_count"),
        (json!(33), json!(128), "vcpu_count"),
        (json!(-1), json!(128), "vcpu_count"),
        (json!("two"), json!(128), "vcpu_count"),
        (json!(1), json!(0), "mem_size_mib"),
        (json!(1), json!(31), "mem_size_mib"),
        (json!(1), json!(1u64 << 60), "mem_size_mib"),
        (json!(1), json!(1.5), "mem_size_mib"),
        (json!(1), Value::Null, "mem_size_mib"),
    ] {
        let body = json!({"vcpu_count": vcpus, "mem_size_mib": memory});
        refuses(&vmm, "/machine-config", &body, &[word]);
    }
    let drive = |id: &str, root: bool| json!({"drive_id": id, "path_on_host": "disk", "is_root_device": root});
    refuses(
        &vmm,
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 128, "vcpu_cuont": 2}),
        &["vcpu_cuont"],
    );
    refuses(&vmm, "/machine-config", &json!([1, 2]), &[]);
    vmm.put("/drives/a", &drive("a", true));
    refuses(&vmm, "/drives/b", &drive("b", true), &["root"]);
    refuses(&vmm, "/drives/b", &drive("c", false), &["b"]);
    refuses(&vmm, "/drives/b%2f", &drive("b/", false), &[]);
    refuses(&vmm, "/network-interfaces/eth0", &json!({}), &["network"]);
    refuses(
        &vmm,
        "/vsock",
        &json!({"guest_cid": 2, "uds_path": "v.sock"}),
        &["guest_cid"],
    );
    refuses(
        &vmm,
        "/vsock",
        &json!({"guest_cid": 3, "uds_path": "v".repeat(97)}),
        &["uds_path"],
    );
    refuses(
        &vmm,
        "/balloon",
        &json!({"amount_mib": 128, "deflate_on_oom": true}),
        &["amount_mib"],
    );
    // What needs a guest.
    for (path, body) in [
        ("/vm", json!({"state": "Paused"})),
        ("/drives/a", json!({"drive_id": "a"})),
        ("/balloon/hinting/start", Value::Null),
    ] {
        assert_eq!(vmm.call("PATCH", path, &body).status, 400, "{path}");
    }
    vmm.action("InstanceStart").refuses(&["boot-source"]);
    vmm.action("FlushMetrics").refuses(&["metrics"]);
    // Nothing of that has changed anything.
    let config = vmm.get("/vm/config");
    assert_eq!(config["machine-config"]["vcpu_count"], 1);
    assert_eq!(config["drives"].as_array().unwrap().len(), 1);
    assert_eq!(vmm.get("/")["state"], "Not started");
    vmm.action("Stop").is_done();
    vmm.ends_with(20);
}

#[test]
fn kernels_and_initrds() {
    let vmm = Vmm::new();
    let kernel = fs::read(assets_dir().join("vmlinux")).unwrap();
    let mut foreign = kernel[..8192].to_vec();
    foreign[18] = 0xb7; // AArch64
    let mut beyond = belljar_e2e::files::halting_kernel();
    beyond[72..80].copy_from_slice(&(1u64 << 40).to_le_bytes()); // the segment's place in the file
    let mut endless = belljar_e2e::files::halting_kernel();
    endless[96..104].copy_from_slice(&u64::MAX.to_le_bytes()); // its length in the file
    let mut headers = belljar_e2e::files::halting_kernel();
    headers[32..40].copy_from_slice(&(u64::MAX - 8).to_le_bytes()); // where the segments are told
    let mut outside = belljar_e2e::files::halting_kernel();
    outside[88..96].copy_from_slice(&(64u64 << 30).to_le_bytes()); // where it goes
    for (name, content) in [
        ("empty", &[][..]),
        ("text", b"#!/bin/sh\n"),
        ("head", &kernel[..100]),
        ("truncated", &kernel[..kernel.len() / 2]),
        ("foreign", &foreign),
        ("beyond", &beyond),
        ("endless", &endless),
        ("headers", &headers),
        ("outside", &outside),
    ] {
        vmm.write(name, content);
        vmm.put("/boot-source", &json!({"kernel_image_path": name}));
        vmm.action("InstanceStart").refuses(&[name]);
    }
    for (name, texts) in [("missing", "missing"), (".", "kernel_image_path")] {
        vmm.put("/boot-source", &json!({"kernel_image_path": name}));
        vmm.action("InstanceStart").refuses(&[texts]);
    }
    vmm.write("kernel", &belljar_e2e::files::halting_kernel());
    vmm.file("huge", 1 << 30);
    for initrd in ["missing", "huge", "."] {
        let boot = json!({"kernel_image_path": "kernel", "initrd_path": initrd});
        vmm.put("/boot-source", &boot);
        vmm.action("InstanceStart").refuses(&["initrd"]);
    }
    // All that can be mended.
    vmm.put("/boot-source", &json!({"kernel_image_path": "kernel"}));
    vmm.action("InstanceStart").is_done();
    vmm.action("Stop").is_done();
    vmm.ends_with(20);
}

#[test]
fn drives_and_sockets() {
    let vmm = crate::halting();
    vmm.file("odd", 1000);
    vmm.file("good", 4096);
    fs::create_dir(vmm.path("directory")).unwrap();
    let _taken = UnixListener::bind(vmm.path("taken")).unwrap();
    for (path, texts) in [
        ("missing", ["bad", "missing"]),
        ("directory", ["bad", "directory"]),
        ("/dev/null", ["bad", "/dev/null"]),
        ("taken", ["bad", "taken"]),
    ] {
        let drive = json!({"drive_id": "bad", "path_on_host": path, "is_root_device": false});
        vmm.put("/drives/bad", &drive);
        vmm.action("InstanceStart").refuses(&texts);
    }
    let drive = json!({"drive_id": "bad", "path_on_host": "fd:nothing", "is_root_device": false});
    refuses(&vmm, "/drives/bad", &drive, &["path_on_host", "nothing"]);
    let drive = json!({"drive_id": "bad", "path_on_host": "good", "is_root_device": false});
    vmm.put("/drives/bad", &drive);
    for path in ["taken", "no/such/directory"] {
        vmm.put("/vsock", &json!({"guest_cid": 3, "uds_path": path}));
        vmm.action("InstanceStart").refuses(&[path]);
    }
    vmm.put("/vsock", &json!({"guest_cid": 3, "uds_path": "v.sock"}));
    vmm.put("/console", &json!({"socket_path": "taken"}));
    vmm.action("InstanceStart").refuses(&["taken"]);
    vmm.put("/console", &json!({"socket_path": "c.sock"}));
    vmm.action("InstanceStart").is_done();
    vmm.action("Stop").is_done();
    vmm.ends_with(20);
}

#[test]
fn command_lines() {
    for (arguments, status, text) in [
        (vec!["--no-such-flag"], 2, "--no-such-flag"),
        (vec!["--api-sock"], 2, "--api-sock"),
        (vec!["--no-api"], 2, "--config-file"),
        (vec!["--no-api", "--config-file", "missing"], 1, "missing"),
        (vec!["--api-sock", "taken"], 1, "taken"),
        (vec!["--api-sock", "no/such/place"], 1, "no/such/place"),
        (vec!["--api-sock", "a.sock", "--id", "a b"], 2, "--id"),
        (vec!["--api-sock", "a.sock", "--fd", "x=99"], 1, "--fd x"),
        (vec!["--snapshot-version"], 2, "--snapshot-version"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let _taken = UnixListener::bind(dir.path().join("taken")).unwrap();
        let out = Command::new(bin_dir().join("belljar-vmm"))
            .args(&arguments)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{arguments:?}: {said}");
        assert!(said.contains(text), "{arguments:?}: {said}");
    }
    let out = Command::new(bin_dir().join("belljar-vmm"))
        .arg("--version")
        .output()
        .unwrap();
    assert!(out.status.success() && !out.stdout.is_empty());
    let path = format!("/tmp/{}", "x".repeat(120));
    let out = Command::new(bin_dir().join("belljar-vmm"))
        .args(["--api-sock", &path])
        .output()
        .unwrap();
    assert_eq!(out.status.code().unwrap_or(-1) & !3, 0, "{out:?}");
    assert!(!out.status.success());
}

/// Runs the VMM where `script` has changed /dev/kvm, in a mount namespace of its own.
fn with_other_kvm(script: &str) -> Vmm {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "{script} && exec setpriv --bounding-set=-all --inh-caps=-all {} --api-sock api.sock",
        bin_dir().join("belljar-vmm").display()
    );
    let mut command = Command::new("unshare");
    command.args(["-r", "-m", "sh", "-c", &script]);
    Vmm::start(dir, &mut command)
}

#[test]
fn a_kvm_that_is_missing_forbidden_or_none() {
    for (script, texts) in [
        ("mount -t tmpfs tmpfs /dev", ["/dev/kvm", "No such file"]),
        (
            "touch kvm && chmod 0 kvm && mount --bind kvm /dev/kvm",
            ["/dev/kvm", "ermission"],
        ),
        ("mount --bind /dev/null /dev/kvm", ["/dev/kvm", "KVM"]),
    ] {
        let vmm = with_other_kvm(script);
        let kernel = vmm.write("kernel", &belljar_e2e::files::halting_kernel());
        vmm.put("/boot-source", &json!({"kernel_image_path": kernel}));
        vmm.action("InstanceStart").refuses(&texts);
        vmm.action("Stop").is_done();
        vmm.ends_with(20);
    }
}
