use proptest::prelude::*;
use virtio_queue::QueueState;
use vm_superio::serial::SerialState;

use super::*;
use crate::config;
use crate::virtio::device::DeviceState;

/// A machine of two vCPUs with something in every field.
pub(crate) fn sample() -> Saved {
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
        config: config::parse(config).unwrap(),
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

#[test]
fn what_was_written_is_read() {
    let saved = sample();
    let file = encode(&saved).unwrap();
    let read = decode(&file).unwrap();
    assert_eq!(read.config, saved.config);
    assert_eq!(read.devices, saved.devices);
    assert_eq!(read.serial, saved.serial);
    assert_eq!(read.vm.clock.clock, 42);
    assert!(read.vm.pit.is_some());
    for (read, saved) in read.vcpus.iter().zip(&saved.vcpus) {
        assert_eq!(read.regs.rax, saved.regs.rax);
        assert_eq!(read.xsave, saved.xsave);
        assert_eq!(read.cpuid, saved.cpuid);
        assert_eq!(read.msrs, saved.msrs);
    }
    assert_eq!(encode(&read).unwrap(), file, "one state has one encoding");
}

#[test]
fn structures_of_another_size_are_refused() {
    type Spoil = fn(&mut wire::State);
    let spoil: [(&str, Spoil); 9] = [
        ("kvm_regs has 143", |s| s.vcpus[0].regs.truncate(143)),
        ("CPUID", |s| s.vcpus[1].cpuid.push(0)),
        ("0 CPUID", |s| s.vcpus[1].cpuid.clear()),
        ("MSRs", |s| s.vcpus[0].msr_values.push(1)),
        ("XSAVE", |s| s.vcpus[0].xsave_len = u32::MAX),
        ("vCPUs", |s| drop(s.vcpus.pop())),
        ("no VM", |s| s.vm = None),
        ("large", |s| s.devices[0].queues[0].next_used = 1 << 16),
        ("two devices", |s| {
            s.devices[1].balloon = Some(Default::default());
        }),
    ];
    for (text, spoil) in spoil {
        let mut state = convert::to_wire(&sample()).unwrap();
        spoil(&mut state);
        let error = convert::from_wire(state).unwrap_err().to_string();
        assert!(error.contains(text), "{error} does not say {text}");
    }
}

proptest! {
    /// Whatever a body says, it is an error or a state, and nothing else.
    #[test]
    fn changed_bodies_are_states_or_errors(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        use prost::Message;
        let mut body = convert::to_wire(&sample()).unwrap().encode_to_vec();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Ok(state) = wire::State::decode(body.as_slice())
            && let Ok(saved) = convert::from_wire(state)
        {
            prop_assert!(decode(&encode(&saved).unwrap()).is_ok());
        }
    }
}
