//! The messages of a state file (protobuf). Tags are never used again for something else; fields
//! are only added. `bytes` hold structures of KVM's interface for x86-64, whose sizes and layouts
//! Linux never changes (`linux/kvm.h`, `asm/kvm.h`).
use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(super) struct State {
    /// The version of the VMM that wrote it; for people.
    #[prost(string, tag = "1")]
    pub(super) writer: String,
    /// The document that `GET /vm/config` gives.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) config: Vec<u8>,
    #[prost(message, repeated, tag = "3")]
    pub(super) vcpus: Vec<Vcpu>,
    #[prost(message, optional, tag = "4")]
    pub(super) vm: Option<Vm>,
    #[prost(message, repeated, tag = "5")]
    pub(super) devices: Vec<Device>,
    #[prost(message, optional, tag = "6")]
    pub(super) serial: Option<Serial>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Vcpu {
    /// KVM_GET_MP_STATE.
    #[prost(uint32, tag = "1")]
    pub(super) mp_state: u32,
    /// `struct kvm_regs`.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) sregs: Vec<u8>,
    /// KVM_GET_XSAVE2: 4 KiB or more. Zeros at the end are left out.
    #[prost(bytes = "vec", tag = "4")]
    pub(super) xsave: Vec<u8>,
    /// The length of `xsave` with its zeros.
    #[prost(uint32, tag = "5")]
    pub(super) xsave_len: u32,
    /// `struct kvm_xcrs`.
    #[prost(bytes = "vec", tag = "6")]
    pub(super) xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[prost(bytes = "vec", tag = "7")]
    pub(super) debug_regs: Vec<u8>,
    /// `struct kvm_lapic_state`.
    #[prost(bytes = "vec", tag = "8")]
    pub(super) lapic: Vec<u8>,
    /// 0: unknown.
    #[prost(uint32, tag = "9")]
    pub(super) tsc_khz: u32,
    /// `struct kvm_cpuid_entry2`, one behind the other.
    #[prost(bytes = "vec", tag = "10")]
    pub(super) cpuid: Vec<u8>,
    /// Indices, in the order in which they are set …
    #[prost(uint32, repeated, tag = "11")]
    pub(super) msr_indices: Vec<u32>,
    /// … and as many values.
    #[prost(fixed64, repeated, tag = "12")]
    pub(super) msr_values: Vec<u64>,
    /// `struct kvm_vcpu_events`.
    #[prost(bytes = "vec", tag = "13")]
    pub(super) events: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Vm {
    /// `struct kvm_irqchip`, three times.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) pic_master: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) pic_slave: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) ioapic: Vec<u8>,
    /// `struct kvm_pit_state2`, if the machine has one.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub(super) pit: Option<Vec<u8>>,
    /// `struct kvm_clock_data`.
    #[prost(bytes = "vec", tag = "5")]
    pub(super) clock: Vec<u8>,
}

/// One virtio device (virtio 1.2 §4.2.2 for the registers).
#[derive(Clone, PartialEq, Message)]
pub(super) struct Device {
    #[prost(uint32, tag = "1")]
    pub(super) device_type: u32,
    #[prost(uint32, tag = "2")]
    pub(super) status: u32,
    #[prost(uint32, tag = "3")]
    pub(super) device_features_sel: u32,
    #[prost(uint32, tag = "4")]
    pub(super) driver_features_sel: u32,
    #[prost(uint64, tag = "5")]
    pub(super) driver_features: u64,
    #[prost(uint32, tag = "6")]
    pub(super) queue_sel: u32,
    #[prost(uint32, tag = "7")]
    pub(super) interrupt_status: u32,
    #[prost(uint32, tag = "8")]
    pub(super) config_generation: u32,
    #[prost(message, repeated, tag = "9")]
    pub(super) queues: Vec<Queue>,
    #[prost(message, optional, tag = "10")]
    pub(super) block: Option<Block>,
    #[prost(message, optional, tag = "11")]
    pub(super) balloon: Option<Balloon>,
    #[prost(message, optional, tag = "12")]
    pub(super) vsock: Option<Vsock>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Queue {
    #[prost(uint32, tag = "1")]
    pub(super) max_size: u32,
    #[prost(uint32, tag = "2")]
    pub(super) size: u32,
    #[prost(bool, tag = "3")]
    pub(super) ready: bool,
    #[prost(bool, tag = "4")]
    pub(super) event_idx: bool,
    #[prost(uint32, tag = "5")]
    pub(super) next_avail: u32,
    #[prost(uint32, tag = "6")]
    pub(super) next_used: u32,
    #[prost(uint64, tag = "7")]
    pub(super) descriptors: u64,
    #[prost(uint64, tag = "8")]
    pub(super) available: u64,
    #[prost(uint64, tag = "9")]
    pub(super) used: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Block {
    /// In sectors of 512 bytes.
    #[prost(uint64, tag = "1")]
    pub(super) capacity: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Vsock {
    #[prost(uint32, tag = "1")]
    pub(super) next_host_port: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Balloon {
    #[prost(uint32, tag = "1")]
    pub(super) target_pages: u32,
    #[prost(uint32, tag = "2")]
    pub(super) actual_pages: u32,
    #[prost(uint32, tag = "3")]
    pub(super) hinting_host_cmd: u32,
    #[prost(uint32, optional, tag = "4")]
    pub(super) hinting_guest_cmd: Option<u32>,
    #[prost(bool, tag = "5")]
    pub(super) hinting_acknowledge: bool,
}

/// Registers of the 16550.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Serial {
    /// DLL, DLM, IER, IIR, LCR, LSR, MCR, MSR, SCR: nine bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) registers: Vec<u8>,
    /// Received bytes that the guest has not read, at most 64.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) input: Vec<u8>,
}
