//! How a VMM ends, and what it says about it.

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::vmm::Vmm;
use belljar_e2e::{eventually, files};
use belljar_protocol::v1::shutdown::Mode;
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_reboot_is_16() {
    let guest = Guest::boot(&Spec::default());
    guest.is_healthy();
    guest.shutdown(Mode::Reboot);
    guest.vmm.ends_with(16);
}

#[test]
fn a_panic_is_17() {
    let vmm = Vmm::new();
    let initramfs = files::empty_initramfs(vmm.dir());
    belljar_e2e::guest::configure(
        &vmm,
        &Spec {
            initramfs,
            ..Spec::default()
        },
    );
    vmm.action("InstanceStart").is_done();
    vmm.ends_with(17);
}

#[test]
fn a_triple_fault_is_18() {
    for vcpus in [1, 3] {
        let vmm = Vmm::new();
        let kernel = vmm.write("kernel", &files::faulting_kernel());
        vmm.put(
            "/machine-config",
            &json!({"vcpu_count": vcpus, "mem_size_mib": 32}),
        );
        vmm.put("/boot-source", &json!({"kernel_image_path": kernel}));
        vmm.action("InstanceStart").is_done();
        vmm.ends_with(18);
    }
}

#[test]
fn stop_is_20_in_every_state() {
    let vmm = Vmm::new();
    vmm.action("Stop").is_done();
    vmm.ends_with(20);

    let vmm = crate::halting();
    vmm.action("InstanceStart").is_done();
    vmm.action("Stop").is_done();
    vmm.ends_with(20);

    let vmm = crate::halting();
    vmm.action("InstanceStart").is_done();
    vmm.patch("/vm", &json!({"state": "Paused"}));
    vmm.action("Stop").is_done();
    vmm.ends_with(20);
}

#[test]
fn signals_that_ask_to_end_are_20() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let vmm = Vmm::new();
        vmm.signal(signal);
        vmm.ends_with(20);

        let vmm = crate::halting();
        vmm.put("/vsock", &json!({"guest_cid": 3, "uds_path": "v.sock"}));
        vmm.put("/console", &json!({"socket_path": "console.sock"}));
        vmm.action("InstanceStart").is_done();
        eventually("its sockets", || vmm.path("v.sock").exists());
        vmm.signal(signal);
        vmm.ends_with(20);
    }
}
