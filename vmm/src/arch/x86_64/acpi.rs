//! Hardware-reduced ACPI (ACPI 6.5 §4.1): the processors, one `LNRO0005` object for each
//! virtio device, VMGenID with its event device, pvpanic, sleep and reset registers.
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::legacy::sleep;
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"BELJAR";
const OEM_TABLE_ID: [u8; 8] = *b"BELLJAR ";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
/// FADT IAPC_BOOT_ARCH (ACPI 6.5 §5.2.9.3): no VGA, no ASPM, no CMOS clock.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// A virtio-mmio window as the guest finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    pub address: u64,
    pub gsi: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("ACPI tables of {0} bytes do not fit below 1 MiB")]
    TooLarge(usize),
    #[error("ACPI tables cannot be written to guest RAM: {0}")]
    Write(vm_memory::GuestMemoryError),
}

/// Writes the tables into the ACPI area. Returns the address of the RSDP.
pub fn write(ram: &GuestRam, cpus: u8, devices: &[MmioDevice]) -> Result<u64, AcpiError> {
    let mut area = Area {
        ram,
        next: layout::ACPI_START + Rsdp::len().next_multiple_of(ALIGN as usize) as u64,
    };
    let dsdt = area.place(&dsdt(cpus, devices))?;
    let fadt = area.place(&bytes(&fadt(dsdt)))?;
    let madt = area.place(&bytes(&madt(cpus)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.place(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    ram.write_slice(&rsdp, GuestAddress(layout::ACPI_START))
        .map_err(AcpiError::Write)?;
    Ok(layout::ACPI_START)
}

const ALIGN: u64 = 16;

struct Area<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Area<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > layout::VM_GENERATION_ID {
            return Err(AcpiError::TooLarge(table.len()));
        }
        self.ram
            .write_slice(table, GuestAddress(at))
            .map_err(AcpiError::Write)?;
        self.next = end.next_multiple_of(ALIGN);
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Bytestream(Vec::new());
    table.to_aml_bytes(&mut out);
    out.0
}

struct Bytestream(Vec<u8>);

impl AmlSink for Bytestream {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn vec(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let byte_at = |address| {
        GAS::new(
            AddressSpace::SystemMemory,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = byte_at(layout::SLEEP_REGISTERS + sleep::RESET);
    fadt.reset_value = sleep::RESET_VALUE;
    fadt.sleep_control_reg = byte_at(layout::SLEEP_REGISTERS + sleep::SLEEP_CONTROL);
    fadt.sleep_status_reg = byte_at(layout::SLEEP_REGISTERS + sleep::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt
}

fn dsdt(cpus: u8, devices: &[MmioDevice]) -> Vec<u8> {
    let mut sdt = Sdt::new(
        *b"DSDT",
        36,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    let mut add = |item: &dyn Aml| sdt.append_slice(&bytes(item));
    for cpu in 0..cpus {
        add_processor(&mut add, cpu);
    }
    for (index, device) in devices.iter().enumerate() {
        add_virtio(&mut add, index, device);
    }
    add_generation_id(&mut add);
    add_pvpanic(&mut add);
    // \_S5: soft off, by the value that the sleep control register takes (ACPI 6.5 §7.4.2.5).
    add(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&sleep::S5_SLEEP_TYPE]),
    ));
    sdt.as_slice().to_vec()
}

fn add_processor(add: &mut impl FnMut(&dyn Aml), cpu: u8) {
    add(&aml::Device::new(
        aml::Path::new(&format!("\\_SB_.C{cpu:03}")),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0007"),
            &aml::Name::new("_UID".into(), &cpu),
        ],
    ));
}

fn add_virtio(add: &mut impl FnMut(&dyn Aml), index: usize, device: &MmioDevice) {
    add(&aml::Device::new(
        aml::Path::new(&format!("\\_SB_.V{index:03}")),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &(index as u16)),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(
                        true,
                        device.address as u32,
                        layout::VIRTIO_MMIO_LEN as u32,
                    ),
                    &aml::Interrupt::new(true, true, false, false, device.gsi),
                ]),
            ),
        ],
    ));
}

/// VMGenID (Microsoft's "Virtual Machine Generation ID") and the generic event device that
/// tells of its changes (ACPI 6.5 §5.6.9).
fn add_generation_id(add: &mut impl FnMut(&dyn Aml)) {
    add(&aml::Device::new(
        "\\_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"BELJ0001"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new(
                "ADDR".into(),
                &aml::Package::new(vec![
                    &(layout::VM_GENERATION_ID as u32),
                    &((layout::VM_GENERATION_ID >> 32) as u32),
                ]),
            ),
        ],
    ));
    add(&aml::Device::new(
        "\\_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::EVENT_DEVICE_GSI,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::If::new(
                    &aml::Equal::new(&aml::Arg(0), &layout::EVENT_DEVICE_GSI),
                    vec![&aml::Notify::new(
                        &aml::Path::new("\\_SB_.VGEN"),
                        &0x80usize,
                    )],
                )],
            ),
        ],
    ));
}

/// `QEMU0001`, by which Linux reports a panic (drivers/misc/pvpanic).
fn add_pvpanic(add: &mut impl FnMut(&dyn Aml)) {
    add(&aml::Device::new(
        "\\_SB_.PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_STA".into(), &0xfu8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                    true,
                    layout::PVPANIC as u32,
                    1,
                )]),
            ),
        ],
    ));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        ram.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        read(ram, at, len as usize)
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let ram = allocate(32).unwrap();
        let devices: Vec<_> = (0..layout::VIRTIO_MAX_DEVICES)
            .map(|i| MmioDevice {
                address: layout::VIRTIO_MMIO_START + i as u64 * layout::VIRTIO_MMIO_LEN,
                gsi: layout::VIRTIO_FIRST_GSI + i as u32,
            })
            .collect();
        let rsdp = write(&ram, 32, &devices).unwrap();
        let rsdp = read(&ram, rsdp, 36);
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(&rsdp), 0);
        let xsdt = u64::from_le_bytes(rsdp[24..32].try_into().unwrap());
        let xsdt = table(&ram, xsdt);
        assert_eq!(sum(&xsdt), 0);
        let mut signatures = Vec::new();
        for entry in xsdt[36..].chunks_exact(8) {
            let at = u64::from_le_bytes(entry.try_into().unwrap());
            let table = table(&ram, at);
            assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
            signatures.push(table[..4].to_vec());
            if table.starts_with(b"FACP") {
                let dsdt = u64::from_le_bytes(table[140..148].try_into().unwrap());
                let dsdt = self::table(&ram, dsdt);
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(sum(&dsdt), 0);
            }
        }
        assert_eq!(signatures, [b"FACP".to_vec(), b"APIC".to_vec()]);
    }
}
