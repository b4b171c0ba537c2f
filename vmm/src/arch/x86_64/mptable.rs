//! Intel MultiProcessor Specification 1.4 table, for guests without ACPI: processors, one
//! ISA bus, the IOAPIC and its lines.
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::GuestRam;

const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IRQ_LINES: u8 = 24;
/// Entry types (§4.3) and interrupt kinds.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

#[derive(Debug, thiserror::Error)]
#[error("the MP table cannot be written to guest RAM: {0}")]
pub struct MpTableError(#[from] vm_memory::GuestMemoryError);

/// Writes the floating pointer and the table right above conventional memory, in the
/// last KiB below 640 KiB, where kernels search. The memory map reserves it.
pub fn write(ram: &GuestRam, cpus: u8) -> Result<(), MpTableError> {
    let pointer_at = layout::LOW_RAM_END;
    let table_at = pointer_at + 16;
    let mut pointer = Vec::with_capacity(16);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(table_at as u32).to_le_bytes());
    pointer.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    fix_checksum(&mut pointer, 10);
    ram.write_slice(&pointer, GuestAddress(pointer_at))?;
    ram.write_slice(&table(cpus), GuestAddress(table_at))?;
    Ok(())
}

fn table(cpus: u8) -> Vec<u8> {
    let mut out = vec![0u8; 44];
    let mut entries: u16 = 0;
    let mut add = |bytes: &[u8]| {
        out.extend_from_slice(bytes);
        entries += 1;
    };
    for cpu in 0..cpus {
        // Enabled; the first one is the bootstrap processor.
        let flags = 1 | u8::from(cpu == 0) << 1;
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, flags]);
        // Family 6 with FPU and APIC: kernels look at CPUID instead.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let io_apic = cpus.wrapping_add(1);
    let mut entry = [IO_APIC, io_apic, APIC_VERSION, 1, 0, 0, 0, 0];
    entry[4..].copy_from_slice(&layout::IOAPIC.to_le_bytes());
    add(&entry);
    for line in 0..IRQ_LINES {
        add(&[IO_INTERRUPT, INT, 0, 0, 0, line, io_apic, line]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let len = out.len() as u16;
    let header = |out: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        if let Some(field) = out.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    header(&mut out, 0, b"PCMP");
    header(&mut out, 4, &len.to_le_bytes());
    header(&mut out, 6, &[SPEC_1_4]);
    header(&mut out, 8, b"BELLJAR MICROVM     ");
    header(&mut out, 34, &entries.to_le_bytes());
    header(&mut out, 36, &layout::LOCAL_APIC.to_le_bytes());
    fix_checksum(&mut out, 7);
    out
}

/// Sets byte `at` so that all bytes sum to zero.
fn fix_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn pointer_leads_to_a_table_that_sums_to_zero() {
        let ram = allocate(32).unwrap();
        for cpus in [1, 2, 32] {
            write(&ram, cpus).unwrap();
            let mut pointer = [0u8; 16];
            ram.read_slice(&mut pointer, GuestAddress(layout::LOW_RAM_END))
                .unwrap();
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(pointer.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            let at = u32::from_le_bytes(pointer[4..8].try_into().unwrap());
            let len: u16 = ram.read_obj(GuestAddress(u64::from(at) + 4)).unwrap();
            let mut table = vec![0u8; usize::from(len)];
            ram.read_slice(&mut table, GuestAddress(u64::from(at)))
                .unwrap();
            assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            // A KiB less the pointer is reserved for the table.
            assert!(table.len() <= 1024 - 16, "{} bytes", table.len());
            let entries = u16::from_le_bytes(table[34..36].try_into().unwrap());
            assert_eq!(entries, u16::from(cpus) + 1 + 1 + 24 + 2);
        }
    }
}
