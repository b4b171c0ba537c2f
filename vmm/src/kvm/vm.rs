//! One KVM virtual machine: irqchip, memory slots, ioeventfds, irqfds.
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::layout;
use crate::kvm::Vcpu;
use crate::kvm::state::{self, VmState};
use crate::memory::registers::{self, RegisterPage};
use crate::memory::{GuestRam, slots};
use crate::virtio::device::InterruptLine;

/// The only API version KVM has had since 2007 (KVM api.rst 4.1).
const API_VERSION: i32 = 12;

#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error(
        "/dev/kvm cannot be opened: {0}; load kvm_intel or kvm_amd, enable virtualisation in the firmware, and give this user the right to read and write /dev/kvm"
    )]
    Open(io::Error),
    #[error("the host's KVM speaks API version {0}, not {API_VERSION}")]
    Version(i32),
    #[error("/dev/kvm, or the descriptor given for it, is not KVM: {0}")]
    NotKvm(io::Error),
    #[error("the host's KVM lacks {0}")]
    Missing(&'static str),
    #[error("KVM refused to {what}: {source}")]
    Ioctl { what: String, source: io::Error },
}

fn ioctl(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |e| VmError::Ioctl {
        what: what.into(),
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

/// What a VM must be able to do on this host; named in the error if it is not.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    next_slot: u32,
    has_pit: bool,
}

impl Vm {
    /// Opens `/dev/kvm`, or uses the descriptor a jail handed in, and makes a VM with an
    /// in-kernel irqchip.
    pub fn new(dev_kvm: Option<OwnedFd>) -> Result<Self, VmError> {
        let kvm = match dev_kvm {
            // SAFETY: the descriptor is owned, and ownership moves into `Kvm`.
            Some(fd) => unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) },
            None => {
                Kvm::new().map_err(|e| VmError::Open(io::Error::from_raw_os_error(e.errno())))?
            }
        };
        let version = kvm.get_api_version();
        if version < 0 {
            return Err(VmError::NotKvm(io::Error::last_os_error()));
        }
        if version != API_VERSION {
            return Err(VmError::Version(version));
        }
        let fd = Arc::new(create(&kvm)?);
        for (cap, name) in REQUIRED {
            if !kvm.check_extension(cap) {
                return Err(VmError::Missing(name));
            }
        }
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(ioctl("place its identity map"))?;
        fd.set_tss_address(layout::TSS)
            .map_err(ioctl("place its task state segment"))?;
        fd.create_irq_chip()
            .map_err(ioctl("make an interrupt controller"))?;
        Ok(Self {
            kvm,
            fd,
            next_slot: 0,
            has_pit: false,
        })
    }

    /// A PIT, for kernels that find their devices without hardware-reduced ACPI and calibrate
    /// timers against it. Its host thread costs time, so other guests do without.
    pub fn create_pit(&mut self) -> Result<(), VmError> {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd.create_pit2(config).map_err(ioctl("make a timer"))?;
        self.has_pit = true;
        Ok(())
    }

    /// Makes all of `ram` visible to the guest. `ram` must outlive the VM's vCPUs; guest RAM
    /// is never unmapped, see `memory`.
    pub fn map_ram(&mut self, ram: &GuestRam) -> Result<(), VmError> {
        for slot in slots(ram) {
            self.map(slot.guest_start, slot.len, slot.host_start, 0)?;
        }
        Ok(())
    }

    /// Maps register pages, which lie one behind the other, read-only at `guest`: reads cost no
    /// exit, writes arrive as MMIO. Returns false if this KVM cannot.
    pub fn map_registers(&mut self, guest: u64, pages: &[RegisterPage]) -> Result<bool, VmError> {
        let Some(first) = pages.first() else {
            return Ok(false);
        };
        if !self.fd.check_extension(Cap::ReadonlyMem) {
            return Ok(false);
        }
        let len = (pages.len() * registers::PAGE) as u64;
        self.map(guest, len, first.address(), KVM_MEM_READONLY)?;
        Ok(true)
    }

    fn map(&mut self, guest: u64, len: u64, host: u64, flags: u32) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: self.next_slot,
            flags,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: callers pass memory that stays mapped for the life of the process, and
        // slots never overlap because their guest ranges come from the fixed layout.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(ioctl(format!("map guest memory at {guest:#x}")))?;
        self.next_slot += 1;
        Ok(())
    }

    /// An event fd that becomes readable when the guest writes to MMIO address `address`:
    /// any 4-byte value, or just `value`.
    pub fn ioeventfd(&self, address: u64, value: Option<u32>) -> Result<EventFd, VmError> {
        let fd = event_fd()?;
        let at = IoEventAddress::Mmio(address);
        let done = match value {
            Some(value) => self.fd.register_ioevent(&fd, &at, value),
            None => self.fd.register_ioevent(&fd, &at, kvm_ioctls::NoDatamatch),
        };
        done.map_err(ioctl(format!("watch writes to {address:#x}")))?;
        Ok(fd)
    }

    /// An edge-triggered interrupt line.
    pub fn irqfd(&self, gsi: u32) -> Result<IrqFd, VmError> {
        let fd = event_fd()?;
        self.fd
            .register_irqfd(&fd, gsi)
            .map_err(ioctl(format!("wire interrupt {gsi}")))?;
        Ok(IrqFd(fd))
    }

    /// The same, raised by a call into KVM instead of through an event fd.
    pub fn irq_line(&self, gsi: u32) -> IrqLine {
        IrqLine {
            vm: Arc::clone(&self.fd),
            gsi,
        }
    }

    /// What CPUID this host's KVM can give to guests.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("list what CPUs it can offer"))
    }

    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, VmError> {
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(ioctl(format!("make vCPU {index}")))?;
        Ok(Vcpu::new(index, fd, self.xsave_len()))
    }

    /// Bytes of a vCPU's XSAVE area (KVM api.rst 4.42, 4.134).
    fn xsave_len(&self) -> usize {
        let told = self.fd.check_extension_int(Cap::Xsave2);
        usize::try_from(told).map_or(state::XSAVE_MIN, |len| len.max(state::XSAVE_MIN))
    }

    /// Interrupt controllers, timer and clock, as it was when the first vCPU's TSC was read. No vCPU runs.
    pub fn save(&self, tsc_read: Instant) -> Result<VmState, VmError> {
        state::save_vm(&self.fd, self.has_pit, tsc_read).map_err(|(what, e)| ioctl(what)(e))
    }

    /// The same the other way, after the vCPUs were restored. With `advance` the guest's clock
    /// goes on by the time that has passed since, where host and snapshot know it; else it goes
    /// on where it stood when the TSC, which was set to what it was, has run since `tsc_set`.
    pub fn restore(
        &mut self,
        saved: &VmState,
        advance: bool,
        tsc_set: Instant,
    ) -> Result<(), VmError> {
        if saved.pit.is_some() && !self.has_pit {
            self.create_pit()?;
        }
        state::restore_vm(&self.fd, saved, advance, tsc_set).map_err(|(what, e)| ioctl(what)(e))
    }
}

/// A signal makes KVM_CREATE_VM fail with EINTR while it waits for a kernel thread: try again.
fn create(kvm: &Kvm) -> Result<VmFd, VmError> {
    const TRIES: usize = 5;
    let mut last = None;
    for _ in 0..TRIES {
        match kvm.create_vm() {
            Ok(fd) => return Ok(fd),
            Err(e) if e.errno() == libc::EINTR => last = Some(e),
            Err(e) => return Err(ioctl("make a VM")(e)),
        }
    }
    Err(ioctl("make a VM")(
        last.unwrap_or_else(|| kvm_ioctls::Error::new(libc::EINTR)),
    ))
}

fn event_fd() -> Result<EventFd, VmError> {
    EventFd::new(EFD_NONBLOCK).map_err(|source| VmError::Ioctl {
        what: "make an event fd".into(),
        source,
    })
}

/// An edge-triggered line of the IOAPIC, pulsed from the thread that has used buffers. An irqfd
/// would hand the interrupt to a kernel worker first, because KVM cannot deliver through the
/// IOAPIC from the middle of a write to an event fd: two context switches more.
pub struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl InterruptLine for IrqLine {
    fn trigger(&self) -> io::Result<()> {
        let to_io = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        self.vm.set_irq_line(self.gsi, true).map_err(to_io)?;
        self.vm.set_irq_line(self.gsi, false).map_err(to_io)
    }
}

/// An interrupt line behind an irqfd.
pub struct IrqFd(EventFd);

impl InterruptLine for IrqFd {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
