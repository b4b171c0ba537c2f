//! Everything by descriptor: a VMM that opens nothing.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use belljar_e2e::guest::{BOOT_ARGS, Guest, Spec, configure};
use belljar_e2e::vmm::Vmm;
use belljar_e2e::{assets_dir, eventually};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use crate::open;

fn is_open(vmm: &Vmm, what: &str) -> bool {
    fs::read_dir(format!("/proc/{}/fd", vmm.pid()))
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target.to_string_lossy().contains(what))
}

#[test]
fn over_the_socket() {
    let vmm = Vmm::new();
    vmm.put("/prepare", &json!({"vcpu_count": 2}));
    vmm.call("PUT", "/prepare", &json!({"vcpu_count": 2}))
        .refuses(&["prepare"]);
    vmm.call(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 256}),
    )
    .refuses(&["vcpu_count"]);
    vmm.put(
        "/machine-config",
        &json!({"vcpu_count": 2, "mem_size_mib": 256}),
    );
    let boot = json!({
        "kernel_image_path": "fd:kernel", "initrd_path": "fd:initrd", "boot_args": BOOT_ARGS,
    });
    // Without the descriptors it is refused.
    vmm.call("PUT", "/boot-source", &boot).refuses(&["kernel"]);
    let assets = assets_dir();
    let (kernel, initrd, image) = (
        open(assets.join("vmlinux")),
        open(assets.join("initramfs")),
        open(assets.join("image")),
    );
    // Names that do not match the descriptors.
    vmm.call_with_files("PUT", "/boot-source", &boot, "one, two", &[kernel.as_fd()])
        .refuses(&["Belljar-Fds"]);
    vmm.call_with_files(
        "PUT",
        "/boot-source",
        &boot,
        "kernel, initrd",
        &[kernel.as_fd(), initrd.as_fd()],
    )
    .is_done();
    vmm.call_with_files(
        "PUT",
        "/drives/image",
        &json!({
            "drive_id": "image", "path_on_host": "fd:image", "is_root_device": false, "is_read_only": true,
        }),
        "image",
        &[image.as_fd()],
    )
    .is_done();
    let vsock = UnixListener::bind(vmm.path("v.sock")).unwrap();
    let directory = open(vmm.dir());
    vmm.call_with_files(
        "PUT",
        "/vsock",
        &json!({"guest_cid": 3, "uds_path": "fd:vsock"}),
        "vsock, vsock.dir",
        &[vsock.as_fd(), directory.as_fd()],
    )
    .is_done();
    // The guest's connections go to `_PORT` in that directory.
    let ready = UnixListener::bind(vmm.path("_1025")).unwrap();
    vmm.action("InstanceStart").is_done();
    ready.set_nonblocking(true).unwrap();
    let mut stream = None;
    eventually("the guest to connect", || {
        stream = ready.accept().ok();
        stream.is_some()
    });
    let (stream, _) = stream.unwrap();
    stream.set_nonblocking(false).unwrap();
    belljar_protocol::client::receive_ready(stream, None).unwrap();
    // What is not needed any more is closed.
    assert!(!is_open(&vmm, "vmlinux") && !is_open(&vmm, "initramfs"));
    let stream = belljar_protocol::hybrid::connect(
        &vmm.path("v.sock"),
        belljar_protocol::AGENT_PORT,
        std::time::Instant::now() + belljar_e2e::PATIENCE,
    )
    .unwrap();
    belljar_protocol::client::shutdown(
        stream,
        belljar_protocol::v1::shutdown::Mode::PowerOff,
        Some(Duration::ZERO),
        None,
    )
    .unwrap();
    eventually("its end", || {
        fs::read_to_string(format!("/proc/{}/stat", vmm.pid()))
            .is_ok_and(|stat| stat.contains(") Z "))
    });
    // The listener's file is its maker's, not the VMM's.
    fs::remove_file(vmm.path("v.sock")).unwrap();
    vmm.ends_with(0);
}

#[test]
fn at_the_start_with_a_configuration_file() {
    let assets = assets_dir();
    let files: Vec<OwnedFd> = ["vmlinux", "initramfs", "image"]
        .into_iter()
        .map(|name| open(assets.join(name)).into())
        .collect();
    for file in &files {
        fcntl_setfd(file, FdFlags::empty()).unwrap();
    }
    let config = json!({
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "boot-source": {
            "kernel_image_path": "fd:kernel", "initrd_path": "fd:initrd", "boot_args": BOOT_ARGS,
        },
        "drives": [{
            "drive_id": "image", "path_on_host": "fd:image", "is_root_device": false, "is_read_only": true,
        }],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "entropy": {},
        "console": {"socket_path": "console.sock"},
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let ready = UnixListener::bind(dir.path().join("v.sock_1025")).unwrap();
    let mut command = std::process::Command::new(belljar_e2e::bin_dir().join("belljar-vmm"));
    command.args(["--no-api", "--boot-timer", "--config-file", "config.json"]);
    for (name, file) in ["kernel", "initrd", "image"].into_iter().zip(&files) {
        command
            .arg("--fd")
            .arg(format!("{name}={}", file.as_raw_fd()));
    }
    let vmm = Vmm::start(dir, &mut command);
    drop(files);
    fs::remove_file(vmm.path("v.sock_1025")).unwrap();
    drop(ready);
    // The agent's one call found nobody; it goes on without.
    let agent = || {
        belljar_protocol::hybrid::connect(
            &vmm.path("v.sock"),
            belljar_protocol::AGENT_PORT,
            std::time::Instant::now() + Duration::from_secs(5),
        )
    };
    eventually("the agent", || agent().is_ok());
    let call = agent().unwrap();
    belljar_protocol::client::shutdown(
        call,
        belljar_protocol::v1::shutdown::Mode::PowerOff,
        Some(Duration::ZERO),
        None,
    )
    .unwrap();
    vmm.ends_with(0);
}

#[test]
fn a_prepared_machine_starts_as_any_other() {
    let guest = {
        let vmm = Vmm::new();
        vmm.put("/prepare", &json!({"vcpu_count": 2}));
        let spec = Spec {
            vcpus: 2,
            ..Spec::default()
        };
        configure(&vmm, &spec);
        Guest::start(vmm, |vmm| {
            vmm.action("InstanceStart").is_done();
        })
    };
    assert_eq!(guest.sh("nproc"), "2");
    guest.ends_well();
}

#[test]
fn descriptors_of_the_wrong_kind() {
    let vmm = crate::halting();
    let null = File::open("/dev/null").unwrap();
    let drive = json!({"drive_id": "d", "path_on_host": "fd:null", "is_root_device": false});
    vmm.call_with_files("PUT", "/drives/d", &drive, "null", &[null.as_fd()])
        .is_done();
    vmm.action("InstanceStart").refuses(&["null"]);
    vmm.ends_stopped();
}

trait Stopped {
    fn ends_stopped(self);
}

impl Stopped for Vmm {
    fn ends_stopped(self) {
        self.action("Stop").is_done();
        self.ends_with(20);
    }
}
