//! The state in which the bootstrap processor enters a kernel, and the MSRs and local APIC of
//! every vCPU.
use kvm_bindings::{kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestRam;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst "64-bit BOOT PROTOCOL"):
    /// long mode, first GiB mapped one to one, RSI at the zero page.
    Long { address: u64 },
    /// PVH: 32-bit protected mode without paging, EBX at the start info.
    Pvh { address: u64 },
}

// Bits of control registers and MSRs (Intel SDM volume 3 §2.5, volume 4).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const PAGE_PRESENT_WRITE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// General registers of the bootstrap processor.
pub fn general(entry: Entry) -> kvm_regs {
    match entry {
        Entry::Long { address } => kvm_regs {
            rflags: RFLAGS_RESERVED,
            rip: address,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rsi: layout::ZERO_PAGE,
            ..Default::default()
        },
        Entry::Pvh { address } => kvm_regs {
            rflags: RFLAGS_RESERVED,
            rip: address,
            rbx: layout::PVH_START_INFO,
            ..Default::default()
        },
    }
}

/// Sets segments, control registers and, for long mode, page tables.
pub fn system(ram: &GuestRam, sregs: &mut kvm_sregs, entry: Entry) -> Result<(), GuestMemoryError> {
    let long = matches!(entry, Entry::Long { .. });
    // Flat segments: null, (unused,) code and data, at the selectors 0x10 and 0x18 that
    // both protocols name.
    let code = segment(2, 0xb, long);
    let data = segment(3, 0x3, false);
    let task = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        g: 0,
        db: 0,
        s: 0,
        ..segment(4, 0xb, false)
    };
    let table = [
        0,
        0,
        descriptor(&code),
        descriptor(&data),
        descriptor(&task),
    ];
    for (at, value) in (layout::GDT..).step_by(8).zip(table) {
        ram.write_obj(value, GuestAddress(at))?;
    }
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (table.len() * 8 - 1) as u16;
    ram.write_obj(0u64, GuestAddress(layout::IDT))?;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long {
        map_first_gib(ram)?;
        sregs.cr3 = layout::PML4;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    Ok(())
}

fn segment(index: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The segment as a descriptor of a table (SDM volume 3 §3.4.5).
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let flags = u64::from(s.type_)
        | u64::from(s.s) << 4
        | u64::from(s.dpl) << 5
        | u64::from(s.present) << 7
        | u64::from(s.avl) << 12
        | u64::from(s.l) << 13
        | u64::from(s.db) << 14
        | u64::from(s.g) << 15;
    (s.base & 0xff00_0000) << 32
        | (s.base & 0x00ff_ffff) << 16
        | limit & 0xffff
        | (limit & 0xf_0000) << 32
        | flags << 40
}

fn map_first_gib(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    ram.write_obj(
        layout::PDPT | PAGE_PRESENT_WRITE,
        GuestAddress(layout::PML4),
    )?;
    ram.write_obj(
        layout::PAGE_DIRECTORY | PAGE_PRESENT_WRITE,
        GuestAddress(layout::PDPT),
    )?;
    let mut directory = [0u8; 4096];
    for (entry, page) in directory.chunks_exact_mut(8).zip(0u64..) {
        entry.copy_from_slice(&(page << 21 | PAGE_LARGE | PAGE_PRESENT_WRITE).to_le_bytes());
    }
    ram.write_slice(&directory, GuestAddress(layout::PAGE_DIRECTORY))
}

/// MSRs that firmware would have set: fast strings, write-back as the default memory type.
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRING: u64 = 1;
    const MTRR_DEFAULT: u32 = 0x2ff;
    const MTRR_ENABLE: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    [
        entry(MISC_ENABLE, FAST_STRING),
        entry(MTRR_DEFAULT, MTRR_ENABLE | WRITE_BACK),
    ]
}

/// Wires LINT0 as external interrupt and LINT1 as NMI (SDM volume 3 §11.5.1).
pub fn wire_lapic(lapic: &mut kvm_lapic_state) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4;
    const MODE_EXT_INT: u32 = 7;
    for (at, mode) in [(LVT_LINT0, MODE_EXT_INT), (LVT_LINT1, MODE_NMI)] {
        let bytes = lapic.regs.get(at..at + 4).unwrap_or_default();
        let old = bytes
            .iter()
            .rev()
            .fold(0u32, |value, byte| value << 8 | u32::from(*byte as u8));
        let new = old & !0x700 | mode << 8;
        if let Some(register) = lapic.regs.get_mut(at..at + 4) {
            for (byte, value) in register.iter_mut().zip(new.to_le_bytes()) {
                *byte = value as _;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn flat_descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&segment(2, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(2, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(3, 0x3, false)), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn long_mode_maps_the_first_gib_one_to_one() {
        let ram = allocate(32).unwrap();
        let mut sregs = kvm_sregs::default();
        system(
            &ram,
            &mut sregs,
            Entry::Long {
                address: 0x100_0000,
            },
        )
        .unwrap();
        assert_eq!(sregs.cr3, layout::PML4);
        let last: u64 = ram
            .read_obj(GuestAddress(layout::PAGE_DIRECTORY + 511 * 8))
            .unwrap();
        assert_eq!(last, 511 << 21 | 0x83);
    }

    #[test]
    fn lint_pins_keep_their_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x350 + 2] = 1;
        wire_lapic(&mut lapic);
        assert_eq!(lapic.regs[0x351], 7);
        assert_eq!(lapic.regs[0x361], 4);
        assert_eq!(lapic.regs[0x352], 1);
    }
}
