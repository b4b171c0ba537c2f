//! What KVM knows of a VM and its vCPUs, taken and given back.
//!
//! The order matters (KVM api.rst; each line below says why where it is not obvious). What is
//! given back may come from a file that somebody made up: KVM checks registers, interrupt
//! controllers and XSAVE areas itself; MSRs go through a list of ours.
use std::time::Instant;

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VmFd;
use zerocopy::{FromBytes, IntoBytes};

use super::vcpu::{Vcpu, VcpuError};

/// Bytes of an XSAVE area without dynamically enabled components.
pub const XSAVE_MIN: usize = 4096;
/// Most bytes of an XSAVE area that are looked at: AMX brings it to 11 KiB.
pub const XSAVE_MAX: usize = 64 << 10;

/// Guests tolerate this much (NTP's limit); beyond it the TSC must be scaled.
const TSC_TOLERANCE_PPM: u64 = 250;

/// One vCPU.
#[derive(Clone, Debug)]
pub struct VcpuState {
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    /// The XSAVE area as the processor writes it, 4 KiB or more.
    pub xsave: Vec<u8>,
    pub xcrs: kvm_xcrs,
    pub debug_regs: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    /// 0: KVM does not say.
    pub tsc_khz: u32,
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Index and value, in the order in which they are set.
    pub msrs: Vec<(u32, u64)>,
    pub events: kvm_vcpu_events,
}

/// What all vCPUs share.
#[derive(Clone, Debug)]
pub struct VmState {
    /// The two PICs and the IOAPIC, in KVM's order.
    pub chips: [kvm_irqchip; 3],
    pub pit: Option<kvm_pit_state2>,
    pub clock: kvm_clock_data,
}

const IA32_TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that are saved, and the only ones that are set from a snapshot: what an operating system
/// keeps in them, and what KVM's own interface to guests needs. Not among them: whatever changes
/// the host, performance counters, debug store, and nested virtualisation.
const ALLOWED: &[std::ops::RangeInclusive<u32>] = &[
    // TSC, before everything that is measured by it.
    IA32_TSC..=IA32_TSC,
    // kvm-clock as it was first: wall clock, system time.
    0x11..=0x12,
    // TSC_ADJUST, SPEC_CTRL.
    0x3b..=0x3b,
    0x48..=0x48,
    // SYSENTER.
    0x174..=0x176,
    // MISC_ENABLE.
    0x1a0..=0x1a0,
    // MTRRs and PAT.
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x277..=0x277,
    0x2ff..=0x2ff,
    // XSS.
    0xda0..=0xda0,
    // KVM: wall clock, system time, asynchronous page faults, steal time, end of interrupt, polling.
    0x4b56_4d00..=0x4b56_4dff,
    // SYSCALL and segment bases.
    0xc000_0081..=0xc000_0084,
    0xc000_0100..=0xc000_0103,
    // AMD: speculation control for hypervisors.
    0xc001_011f..=0xc001_011f,
    // The deadline is absolute, so that it comes last.
    TSC_DEADLINE..=TSC_DEADLINE,
];

/// KVM has that many MSRs of its own; asking for the other 247 would cost a system call each.
const KVM_MSRS: u32 = 9;

/// Whether a snapshot may set this MSR.
pub fn is_allowed(msr: u32) -> bool {
    ALLOWED.iter().any(|range| range.contains(&msr))
}

fn wanted() -> impl Iterator<Item = u32> {
    let beyond = |msr: &u32| (0x4b56_4d00 + KVM_MSRS..=0x4b56_4dff).contains(msr);
    let all = ALLOWED.iter().flat_map(Clone::clone);
    all.filter(move |msr| !beyond(msr))
}

/// Also returns when the TSC was read.
pub(super) fn save(vcpu: &Vcpu) -> Result<(VcpuState, Instant), VcpuError> {
    let fd = &vcpu.fd;
    let failed = |what| vcpu.err(what);
    // First: it makes KVM act on an INIT or SIPI that waits.
    let mp_state = fd.get_mp_state().map_err(failed("give its run state"))?;
    let tsc_read = Instant::now();
    let msrs = save_msrs(vcpu)?;
    let state = VcpuState {
        mp_state,
        regs: fd.get_regs().map_err(failed("give its registers"))?,
        sregs: vcpu.sregs()?,
        xsave: save_xsave(vcpu)?,
        xcrs: fd
            .get_xcrs()
            .map_err(failed("give its extended control registers"))?,
        debug_regs: fd
            .get_debug_regs()
            .map_err(failed("give its debug registers"))?,
        lapic: vcpu.lapic()?,
        // Not every KVM knows.
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        cpuid: vcpu.cpuid.get().cloned().unwrap_or_default(),
        msrs,
        // Last: what the calls above delivered is in it.
        events: fd
            .get_vcpu_events()
            .map_err(failed("give its pending events"))?,
    };
    Ok((state, tsc_read))
}

fn save_xsave(vcpu: &Vcpu) -> Result<Vec<u8>, VcpuError> {
    let failed = vcpu.err("give its extended state");
    if vcpu.xsave_len <= XSAVE_MIN {
        let area = vcpu.fd.get_xsave().map_err(failed)?;
        return Ok(area.region.as_bytes().to_vec());
    }
    let extra = (vcpu.xsave_len - XSAVE_MIN).div_ceil(size_of::<u32>());
    let too_large = |_| vcpu.err("give its extended state")(kvm_ioctls::Error::new(libc::E2BIG));
    let mut area = Xsave::new(extra).map_err(too_large)?;
    // SAFETY: the area is as long as KVM said it needs, and this process enables no further
    // components (arch_prctl) afterwards.
    unsafe { vcpu.fd.get_xsave2(&mut area) }.map_err(failed)?;
    let mut bytes = area.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(area.as_slice().as_bytes());
    Ok(bytes)
}

/// KVM stops at the first MSR that it does not know: that one is left out.
fn save_msrs(vcpu: &Vcpu) -> Result<Vec<(u32, u64)>, VcpuError> {
    let indices: Vec<u32> = wanted().collect();
    let mut rest = indices.as_slice();
    let mut saved = Vec::with_capacity(indices.len());
    while !rest.is_empty() {
        let entries: Vec<kvm_msr_entry> = rest.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = list(vcpu, &entries)?;
        let read = vcpu
            .fd
            .get_msrs(&mut msrs)
            .map_err(vcpu.err("give its MSRs"))?;
        saved.extend(msrs.as_slice().iter().take(read).map(|m| (m.index, m.data)));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn list(vcpu: &Vcpu, entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuError> {
    Msrs::from_entries(entries)
        .map_err(|_| vcpu.err("take that many MSRs")(kvm_ioctls::Error::new(libc::E2BIG)))
}

/// Returns when the TSC was set.
pub(super) fn restore(vcpu: &Vcpu, saved: &VcpuState) -> Result<Instant, VcpuError> {
    let fd = &vcpu.fd;
    let failed = |what| vcpu.err(what);
    restore_tsc_rate(vcpu, saved.tsc_khz)?;
    // Before the system registers: kvm-amd checks long mode against it.
    let cpuid = CpuId::from_entries(&saved.cpuid)
        .map_err(|_| failed("take that many CPUID leaves")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    // One that goes back to what it was has it already, and KVM takes no other once a vCPU has run.
    if vcpu.cpuid.get().is_none() {
        vcpu.set_cpuid(&cpuid)?;
    }
    fd.set_mp_state(saved.mp_state)
        .map_err(failed("take its run state"))?;
    vcpu.set_regs(&saved.regs)?;
    vcpu.set_sregs(&saved.sregs)?;
    restore_xsave(vcpu, &saved.xsave)?;
    fd.set_xcrs(&saved.xcrs)
        .map_err(failed("take its extended control registers"))?;
    fd.set_debug_regs(&saved.debug_regs)
        .map_err(failed("take its debug registers"))?;
    // After the system registers, which say where the APIC is and in which mode.
    vcpu.set_lapic(&saved.lapic)?;
    let tsc_set = Instant::now();
    restore_msrs(vcpu, &saved.msrs)?;
    fd.set_vcpu_events(&saved.events)
        .map_err(failed("take its pending events"))?;
    // Tells kvm-clock guests that they stood still, lest their watchdogs bark. Guests without
    // kvm-clock cannot be told.
    let _ = fd.kvmclock_ctrl();
    Ok(tsc_set)
}

fn restore_tsc_rate(vcpu: &Vcpu, saved: u32) -> Result<(), VcpuError> {
    let Ok(here) = vcpu.fd.get_tsc_khz() else {
        return Ok(());
    };
    let apart = u64::from(here.abs_diff(saved));
    if saved == 0 || apart * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    vcpu.fd
        .set_tsc_khz(saved)
        .map_err(vcpu.err("run its TSC at the rate of the machine it was saved on"))
}

fn restore_xsave(vcpu: &Vcpu, saved: &[u8]) -> Result<(), VcpuError> {
    let refused = |code| vcpu.err("take its extended state")(kvm_ioctls::Error::new(code));
    // A longer area has components that this host does not know; a shorter one lacks what KVM
    // would read.
    let beyond = saved.get(vcpu.xsave_len..).unwrap_or_default();
    if saved.len() < XSAVE_MIN || beyond.iter().any(|byte| *byte != 0) {
        return Err(refused(libc::EINVAL));
    }
    let mut bytes = saved.to_vec();
    bytes.resize(vcpu.xsave_len.next_multiple_of(size_of::<u32>()), 0);
    let words: Vec<u32> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|word| u32::from_ne_bytes(*word))
        .collect();
    let (head, extra) = words
        .split_first_chunk::<1024>()
        .ok_or_else(|| refused(libc::EINVAL))?;
    if extra.is_empty() {
        let area = kvm_xsave {
            region: *head,
            ..Default::default()
        };
        // SAFETY: KVM said that it needs no more than 4 KiB.
        return unsafe { vcpu.fd.set_xsave(&area) }.map_err(vcpu.err("take its extended state"));
    }
    let mut area = Xsave::from_entries(extra).map_err(|_| refused(libc::E2BIG))?;
    // SAFETY: only the fixed part is written, the length stays.
    unsafe { area.as_mut_fam_struct() }.xsave.region = *head;
    // SAFETY: the area is as long as KVM said it needs.
    unsafe { vcpu.fd.set_xsave2(&area) }.map_err(vcpu.err("take its extended state"))
}

/// One that this KVM does not have and that was zero is nothing lost.
fn restore_msrs(vcpu: &Vcpu, saved: &[(u32, u64)]) -> Result<(), VcpuError> {
    let index = vcpu.index();
    if let Some((msr, value)) = saved.iter().find(|(msr, _)| !is_allowed(*msr)) {
        let (msr, value) = (*msr, *value);
        return Err(VcpuError::Msr { index, msr, value });
    }
    let entries: Vec<_> = saved
        .iter()
        .map(|(msr, value)| entry(*msr, *value))
        .collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let set = vcpu
            .fd
            .set_msrs(&list(vcpu, rest)?)
            .map_err(vcpu.err("take its MSRs"))?;
        match rest.get(set) {
            Some(refused) if refused.data != 0 => {
                let (msr, value) = (refused.index, refused.data);
                return Err(VcpuError::Msr { index, msr, value });
            }
            _ => rest = rest.get(set + 1..).unwrap_or_default(),
        }
    }
    Ok(())
}

type Failed = (&'static str, kvm_ioctls::Error);

/// Since `then`.
fn nanoseconds(then: Instant) -> u64 {
    u64::try_from(then.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn save_vm(fd: &VmFd, has_pit: bool, tsc_read: Instant) -> Result<VmState, Failed> {
    let chip = |id| {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        fd.get_irqchip(&mut chip)
            .map_err(|e| ("give an interrupt controller", e))?;
        Ok(chip)
    };
    let pit = has_pit.then(|| fd.get_pit2()).transpose();
    let mut clock = fd.get_clock().map_err(|e| ("give its clock", e))?;
    // What it showed when the TSC was read: Linux compares the two, and does not trust a TSC that leaps.
    clock.clock = clock.clock.saturating_sub(nanoseconds(tsc_read));
    clock.realtime = clock.realtime.saturating_sub(nanoseconds(tsc_read));
    Ok(VmState {
        pit: pit.map_err(|e| ("give its timer", e))?,
        clock,
        chips: [
            chip(KVM_IRQCHIP_PIC_MASTER)?,
            chip(KVM_IRQCHIP_PIC_SLAVE)?,
            chip(KVM_IRQCHIP_IOAPIC)?,
        ],
    })
}

pub(super) fn restore_vm(
    fd: &VmFd,
    saved: &VmState,
    advance: bool,
    tsc_set: Instant,
) -> Result<(), Failed> {
    if let Some(pit) = &saved.pit {
        fd.set_pit2(pit).map_err(|e| ("take its timer", e))?;
    }
    let mut clock = kvm_clock_data {
        clock: saved.clock.clock,
        ..Default::default()
    };
    if advance && saved.clock.flags & KVM_CLOCK_REALTIME != 0 {
        clock.flags = KVM_CLOCK_REALTIME;
        clock.realtime = saved.clock.realtime;
    } else {
        // The TSC has run since it was set.
        clock.clock = clock.clock.saturating_add(nanoseconds(tsc_set));
    }
    fd.set_clock(&clock).map_err(|e| ("take its clock", e))?;
    for (chip, id) in saved.chips.iter().zip([
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ]) {
        let mut chip = *chip;
        chip.chip_id = id;
        fd.set_irqchip(&chip)
            .map_err(|e| ("take an interrupt controller", e))?;
    }
    Ok(())
}

/// The bytes of a structure of KVM's interface, which never changes.
pub fn to_bytes<T: IntoBytes + zerocopy::Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// The structure in `bytes`; `None` if there are too few or too many of them.
pub fn from_bytes<T: FromBytes>(bytes: &[u8]) -> Option<T> {
    T::read_from_bytes(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_comes_first_and_its_deadline_last() {
        let all: Vec<u32> = wanted().collect();
        assert_eq!((all[0], *all.last().unwrap()), (IA32_TSC, TSC_DEADLINE));
        assert!(all.len() < 80, "{}", all.len());
        assert!(all.iter().all(|msr| is_allowed(*msr)));
    }

    #[test]
    fn what_reaches_the_host_is_not_allowed() {
        // Predictor commands, microcode update, debug control, SVM's control and save area.
        for msr in [0x49, 0x79, 0x1d9, 0xc001_0114, 0xc001_0117, 0xc000_0080] {
            assert!(!is_allowed(msr), "{msr:#x}");
        }
    }

    #[test]
    fn structures_have_their_size_or_are_none() {
        let regs = kvm_regs {
            rip: 7,
            ..Default::default()
        };
        let bytes = to_bytes(&regs);
        assert_eq!(from_bytes::<kvm_regs>(&bytes).unwrap().rip, 7);
        assert!(from_bytes::<kvm_regs>(&bytes[1..]).is_none());
        assert!(from_bytes::<kvm_regs>(&[bytes.as_slice(), &[0]].concat()).is_none());
    }
}
