//! Between the messages and the plain types. Everything in a message is checked here for its form:
//! sizes of structures, numbers of things.
use kvm_bindings::{kvm_cpuid_entry2, kvm_mp_state};
use virtio_queue::QueueState;
use vm_superio::serial::SerialState;
use zerocopy::{FromBytes, IntoBytes};

use super::format::FormatError;
use super::{Saved, wire};
use crate::arch::x86_64::layout;
use crate::config;
use crate::kvm::state::{VcpuState, VmState, XSAVE_MAX, XSAVE_MIN, from_bytes, to_bytes};
use crate::virtio::device::DeviceState;
use crate::virtio::mmio::TransportState;

type Result<T> = std::result::Result<T, FormatError>;

/// No device has more queues.
const MAX_QUEUES: usize = 8;
const SERIAL_REGISTERS: usize = 9;
const SERIAL_FIFO: usize = 64;

fn malformed(what: impl Into<String>) -> FormatError {
    FormatError::Malformed(what.into())
}

pub(super) fn to_wire(saved: &Saved) -> Result<wire::State> {
    let config = serde_json::to_vec(&saved.config)
        .map_err(|e| malformed(format!("the configuration: {e}")))?;
    Ok(wire::State {
        writer: env!("CARGO_PKG_VERSION").to_owned(),
        config,
        vcpus: saved.vcpus.iter().map(vcpu_to_wire).collect(),
        vm: Some(vm_to_wire(&saved.vm)),
        devices: saved.devices.iter().map(device_to_wire).collect(),
        serial: Some(serial_to_wire(&saved.serial)),
    })
}

pub(super) fn from_wire(state: wire::State) -> Result<Saved> {
    let config: config::VmConfig =
        config::parse(&state.config).map_err(|e| malformed(format!("the configuration: {e}")))?;
    let count = usize::from(config.machine_config.vcpu_count);
    if state.vcpus.len() != count {
        return Err(malformed(format!(
            "{count} vCPUs are configured, {} are there",
            state.vcpus.len()
        )));
    }
    if state.devices.len() > layout::VIRTIO_MAX_DEVICES {
        return Err(malformed(format!("{} devices", state.devices.len())));
    }
    let missing = |what: &str| malformed(format!("it has no {what}"));
    Ok(Saved {
        config,
        vcpus: state
            .vcpus
            .iter()
            .map(vcpu_from_wire)
            .collect::<Result<_>>()?,
        vm: vm_from_wire(&state.vm.ok_or_else(|| missing("VM"))?)?,
        devices: state
            .devices
            .iter()
            .map(device_from_wire)
            .collect::<Result<_>>()?,
        serial: serial_from_wire(&state.serial.ok_or_else(|| missing("serial port"))?)?,
    })
}

fn vcpu_to_wire(vcpu: &VcpuState) -> wire::Vcpu {
    let used = vcpu.xsave.iter().rposition(|byte| *byte != 0);
    let xsave = vcpu.xsave.get(..used.map_or(0, |last| last + 1));
    wire::Vcpu {
        mp_state: vcpu.mp_state.mp_state,
        regs: to_bytes(&vcpu.regs),
        sregs: to_bytes(&vcpu.sregs),
        xsave: xsave.unwrap_or_default().to_vec(),
        xsave_len: u32::try_from(vcpu.xsave.len()).unwrap_or(u32::MAX),
        xcrs: to_bytes(&vcpu.xcrs),
        debug_regs: to_bytes(&vcpu.debug_regs),
        lapic: to_bytes(&vcpu.lapic),
        tsc_khz: vcpu.tsc_khz,
        cpuid: vcpu.cpuid.as_slice().as_bytes().to_vec(),
        msr_indices: vcpu.msrs.iter().map(|(index, _)| *index).collect(),
        msr_values: vcpu.msrs.iter().map(|(_, value)| *value).collect(),
        events: to_bytes(&vcpu.events),
    }
}

/// The structure in a field, which must have exactly its bytes.
fn structure<T: FromBytes>(name: &str, bytes: &[u8]) -> Result<T> {
    from_bytes(bytes).ok_or_else(|| {
        let (found, wanted) = (bytes.len(), size_of::<T>());
        malformed(format!("{name} has {found} bytes instead of {wanted}"))
    })
}

fn vcpu_from_wire(vcpu: &wire::Vcpu) -> Result<VcpuState> {
    let len = vcpu.xsave_len as usize;
    if !(XSAVE_MIN..=XSAVE_MAX).contains(&len) || vcpu.xsave.len() > len {
        return Err(malformed(format!("an XSAVE area of {len} bytes")));
    }
    let mut xsave = vcpu.xsave.clone();
    xsave.resize(len, 0);
    let cpuid = <[kvm_cpuid_entry2]>::ref_from_bytes(&vcpu.cpuid);
    let entry = size_of::<kvm_cpuid_entry2>();
    let cpuid = match cpuid {
        Ok(entries) => entries.to_vec(),
        // Not aligned for the structure.
        Err(_) => vcpu
            .cpuid
            .chunks(entry)
            .map(|bytes| structure("a CPUID leaf", bytes))
            .collect::<Result<_>>()?,
    };
    if cpuid.is_empty() || cpuid.len() > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
        return Err(malformed(format!("{} CPUID leaves", cpuid.len())));
    }
    if vcpu.msr_indices.len() != vcpu.msr_values.len()
        || vcpu.msr_indices.len() > kvm_bindings::KVM_MAX_MSR_ENTRIES
    {
        return Err(malformed("numbers and values of MSRs do not match"));
    }
    let msrs = vcpu.msr_indices.iter().zip(&vcpu.msr_values);
    Ok(VcpuState {
        mp_state: kvm_mp_state {
            mp_state: vcpu.mp_state,
        },
        regs: structure("kvm_regs", &vcpu.regs)?,
        sregs: structure("kvm_sregs", &vcpu.sregs)?,
        xsave,
        xcrs: structure("kvm_xcrs", &vcpu.xcrs)?,
        debug_regs: structure("kvm_debugregs", &vcpu.debug_regs)?,
        lapic: structure("kvm_lapic_state", &vcpu.lapic)?,
        tsc_khz: vcpu.tsc_khz,
        cpuid,
        msrs: msrs.map(|(index, value)| (*index, *value)).collect(),
        events: structure("kvm_vcpu_events", &vcpu.events)?,
    })
}

fn vm_to_wire(vm: &VmState) -> wire::Vm {
    let [master, slave, ioapic] = &vm.chips;
    wire::Vm {
        pic_master: to_bytes(master),
        pic_slave: to_bytes(slave),
        ioapic: to_bytes(ioapic),
        pit: vm.pit.as_ref().map(to_bytes),
        clock: to_bytes(&vm.clock),
    }
}

fn vm_from_wire(vm: &wire::Vm) -> Result<VmState> {
    let pit = vm.pit.as_ref();
    Ok(VmState {
        chips: [
            structure("kvm_irqchip", &vm.pic_master)?,
            structure("kvm_irqchip", &vm.pic_slave)?,
            structure("kvm_irqchip", &vm.ioapic)?,
        ],
        pit: pit
            .map(|pit| structure("kvm_pit_state2", pit))
            .transpose()?,
        clock: structure("kvm_clock_data", &vm.clock)?,
    })
}

fn device_to_wire(device: &TransportState) -> wire::Device {
    let (mut block, mut balloon, mut vsock) = (None, None, None);
    match device.device {
        DeviceState::Nothing => {}
        DeviceState::Block { capacity } => block = Some(wire::Block { capacity }),
        DeviceState::Vsock { next_host_port } => vsock = Some(wire::Vsock { next_host_port }),
        DeviceState::Balloon {
            target_pages,
            actual_pages,
            hinting_host_cmd,
            hinting_guest_cmd,
            hinting_acknowledge,
        } => {
            balloon = Some(wire::Balloon {
                target_pages,
                actual_pages,
                hinting_host_cmd,
                hinting_guest_cmd,
                hinting_acknowledge,
            });
        }
    }
    wire::Device {
        device_type: device.device_type,
        status: device.status,
        device_features_sel: device.device_features_sel,
        driver_features_sel: device.driver_features_sel,
        driver_features: device.driver_features,
        queue_sel: device.queue_sel,
        interrupt_status: device.interrupt_status,
        config_generation: device.config_generation,
        queues: device.queues.iter().map(queue_to_wire).collect(),
        block,
        balloon,
        vsock,
    }
}

fn device_from_wire(device: &wire::Device) -> Result<TransportState> {
    if device.queues.len() > MAX_QUEUES {
        return Err(malformed(format!("{} queues", device.queues.len())));
    }
    let state = match (&device.block, &device.balloon, &device.vsock) {
        (None, None, None) => DeviceState::Nothing,
        (None, None, Some(vsock)) => DeviceState::Vsock {
            next_host_port: vsock.next_host_port,
        },
        (Some(block), None, None) => DeviceState::Block {
            capacity: block.capacity,
        },
        (None, Some(balloon), None) => DeviceState::Balloon {
            target_pages: balloon.target_pages,
            actual_pages: balloon.actual_pages,
            hinting_host_cmd: balloon.hinting_host_cmd,
            hinting_guest_cmd: balloon.hinting_guest_cmd,
            hinting_acknowledge: balloon.hinting_acknowledge,
        },
        _ => return Err(malformed("a device that is two devices")),
    };
    let queues = device.queues.iter().map(queue_from_wire);
    Ok(TransportState {
        device_type: device.device_type,
        status: device.status,
        device_features_sel: device.device_features_sel,
        driver_features_sel: device.driver_features_sel,
        driver_features: device.driver_features,
        queue_sel: device.queue_sel,
        interrupt_status: device.interrupt_status,
        config_generation: device.config_generation,
        queues: queues.collect::<Result<_>>()?,
        device: state,
    })
}

fn queue_to_wire(queue: &QueueState) -> wire::Queue {
    wire::Queue {
        max_size: queue.max_size.into(),
        size: queue.size.into(),
        ready: queue.ready,
        event_idx: queue.event_idx_enabled,
        next_avail: queue.next_avail.into(),
        next_used: queue.next_used.into(),
        descriptors: queue.desc_table,
        available: queue.avail_ring,
        used: queue.used_ring,
    }
}

fn queue_from_wire(queue: &wire::Queue) -> Result<QueueState> {
    let short =
        |value: u32| u16::try_from(value).map_err(|_| malformed("a queue with a large number"));
    Ok(QueueState {
        max_size: short(queue.max_size)?,
        next_avail: short(queue.next_avail)?,
        next_used: short(queue.next_used)?,
        event_idx_enabled: queue.event_idx,
        size: short(queue.size)?,
        ready: queue.ready,
        desc_table: queue.descriptors,
        avail_ring: queue.available,
        used_ring: queue.used,
    })
}

fn serial_to_wire(serial: &SerialState) -> wire::Serial {
    wire::Serial {
        registers: vec![
            serial.baud_divisor_low,
            serial.baud_divisor_high,
            serial.interrupt_enable,
            serial.interrupt_identification,
            serial.line_control,
            serial.line_status,
            serial.modem_control,
            serial.modem_status,
            serial.scratch,
        ],
        input: serial.in_buffer.clone(),
    }
}

fn serial_from_wire(serial: &wire::Serial) -> Result<SerialState> {
    let registers: [u8; SERIAL_REGISTERS] = serial
        .registers
        .as_slice()
        .try_into()
        .map_err(|_| malformed("a serial port with other registers"))?;
    if serial.input.len() > SERIAL_FIFO {
        return Err(malformed("more serial input than the port holds"));
    }
    let [dll, dlm, ier, iir, lcr, lsr, mcr, msr, scr] = registers;
    Ok(SerialState {
        baud_divisor_low: dll,
        baud_divisor_high: dlm,
        interrupt_enable: ier,
        interrupt_identification: iir,
        line_control: lcr,
        line_status: lsr,
        modem_control: mcr,
        modem_status: msr,
        scratch: scr,
        in_buffer: serial.input.clone(),
    })
}
