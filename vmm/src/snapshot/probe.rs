//! For fuzz targets and tests: a machine with something in every field, and the reader without its checksum.
use virtio_queue::QueueState;
use vm_superio::serial::SerialState;

use super::format::seal;
use super::{Saved, VcpuState, VmState, decode, encode};
use crate::config;
use crate::virtio::device::DeviceState;
use crate::virtio::mmio::TransportState;

/// A machine of two vCPUs with something in every field.
pub(super) fn sample() -> Saved {
    let config = br#"{
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "boot-source": {"kernel_image_path": "vmlinux"},
        "drives": [{"drive_id": "disk", "path_on_host": "disk", "is_root_device": false}],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "balloon": {"amount_mib": 4, "deflate_on_oom": true}
    }"#;
    let vcpu = |seed: u8| VcpuState {
        mp_state: kvm_bindings::kvm_mp_state { mp_state: 3 },
        regs: kvm_bindings::kvm_regs {
            rax: u64::from(seed) << 56,
            ..Default::default()
        },
        sregs: Default::default(),
        xsave: [vec![seed; 832], vec![0; 4096 - 832]].concat(),
        xcrs: Default::default(),
        debug_regs: Default::default(),
        lapic: Default::default(),
        tsc_khz: 2_400_000,
        cpuid: vec![kvm_bindings::kvm_cpuid_entry2 {
            function: 1,
            eax: seed.into(),
            ..Default::default()
        }],
        msrs: vec![(0x10, u64::MAX), (0x6e0, seed.into())],
        events: Default::default(),
    };
    let queue = QueueState {
        max_size: 256,
        next_avail: 65535,
        next_used: 7,
        event_idx_enabled: true,
        size: 128,
        ready: true,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 0x3000,
    };
    let device = |state| TransportState {
        device_type: 2,
        status: 15,
        driver_features: 1 << 32,
        interrupt_status: 1,
        queues: vec![queue; 2],
        device: state,
        ..Default::default()
    };
    Saved {
        config: config::parse(config).unwrap_or_default(),
        vcpus: vec![vcpu(1), vcpu(0)],
        vm: VmState {
            chips: Default::default(),
            pit: Some(Default::default()),
            clock: kvm_bindings::kvm_clock_data {
                clock: 42,
                ..Default::default()
            },
        },
        devices: vec![
            device(DeviceState::Nothing),
            device(DeviceState::Block { capacity: 8 }),
            device(DeviceState::Vsock {
                next_host_port: 1 << 30,
            }),
            device(DeviceState::Balloon {
                target_pages: 1,
                actual_pages: 2,
                hinting_host_cmd: 3,
                hinting_guest_cmd: Some(0),
                hinting_acknowledge: true,
            }),
        ],
        serial: SerialState {
            scratch: 9,
            in_buffer: vec![1, 2],
            ..Default::default()
        },
    }
}

/// A good state file.
pub fn seeds() -> Vec<Vec<u8>> {
    encode(&sample()).into_iter().collect()
}

/// Reads a file, and what is in it as if its head and checksum were right. What is accepted can be written again,
/// and is the same then.
pub fn state(bytes: &[u8]) {
    let body = bytes
        .get(16..bytes.len().saturating_sub(4))
        .unwrap_or_default();
    let resealed = seal(body).unwrap_or_default();
    for file in [bytes, &resealed] {
        let Ok(saved) = decode(file) else {
            continue;
        };
        let written = encode(&saved);
        assert!(written.is_ok(), "what was read can be written");
        let again = written.as_deref().map(decode);
        let again = again.map(|saved| saved.and_then(|saved| encode(&saved)));
        assert_eq!(again, Ok(written.clone()), "and is the same then");
    }
}
