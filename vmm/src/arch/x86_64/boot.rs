//! What a kernel reads at its entry: zero page or PVH start info, memory map, command line.
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::kernel::LoadedKernel;
use super::layout;
use super::registers::Entry;
use crate::memory::GuestRam;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("the kernel command line has {0} bytes; {max} are the most", max = layout::COMMAND_LINE_MAX - 1)]
    CommandLineTooLong(usize),
    #[error("the kernel command line holds a NUL byte or is not ASCII")]
    CommandLineText,
    #[error("boot parameters cannot be written to guest RAM: {0}")]
    Write(vm_memory::GuestMemoryError),
    #[error("boot parameters cannot be written to guest RAM: {0}")]
    Configure(linux_loader::configurator::Error),
}

/// What goes with the kernel.
pub struct BootInfo<'a> {
    pub command_line: &'a str,
    /// Address and size.
    pub initrd: Option<(u64, u64)>,
    /// Address of ACPI's root pointer, if the guest has ACPI.
    pub rsdp: Option<u64>,
}

/// Writes all that the entry protocol of `kernel` asks for.
pub fn write(ram: &GuestRam, kernel: &LoadedKernel, info: &BootInfo<'_>) -> Result<(), BootError> {
    write_command_line(ram, info.command_line)?;
    match kernel.entry {
        Entry::Long { .. } => write_zero_page(ram, kernel, info),
        Entry::Pvh { .. } => write_start_info(ram, info),
    }
}

fn write_command_line(ram: &GuestRam, text: &str) -> Result<(), BootError> {
    if text.len() >= layout::COMMAND_LINE_MAX {
        return Err(BootError::CommandLineTooLong(text.len()));
    }
    if text.contains('\0') || !text.is_ascii() {
        return Err(BootError::CommandLineText);
    }
    let mut bytes = Vec::with_capacity(text.len() + 1);
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    ram.write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(BootError::Write)
}

/// Start, length and type of every piece of the address space.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (
            layout::LOW_RAM_END,
            0xa0000 - layout::LOW_RAM_END,
            E820_RESERVED,
        ),
        (
            layout::ACPI_START,
            layout::VM_GENERATION_ID - layout::ACPI_START,
            E820_ACPI,
        ),
        (
            layout::VM_GENERATION_ID,
            layout::ACPI_END - layout::VM_GENERATION_ID,
            E820_RESERVED,
        ),
    ];
    for region in ram.iter() {
        let start = region.start_addr().0.max(layout::HIGH_RAM_START);
        let end = region.start_addr().0 + region.len();
        map.push((start, end.saturating_sub(start), E820_RAM));
    }
    map
}

fn write_zero_page(
    ram: &GuestRam,
    kernel: &LoadedKernel,
    info: &BootInfo<'_>,
) -> Result<(), BootError> {
    const BOOT_FLAG: u16 = 0xaa55;
    const HEADER_MAGIC: u32 = 0x5372_6448;
    /// boot.rst: a loader without an assigned number.
    const LOADER_UNDEFINED: u8 = 0xff;
    const MIN_ALIGNMENT: u32 = 0x0100_0000;

    let mut params = boot_params::default();
    if let Some(header) = kernel.setup {
        params.hdr = header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = MIN_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = info.command_line.len() as u32 + 1;
    if let Some((address, size)) = info.initrd {
        // Both lie below the hole at 3 GiB.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    if let Some(rsdp) = info.rsdp {
        params.acpi_rsdp_addr = rsdp;
    }
    let map = memory_map(ram);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: type_,
        };
    }
    let params = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, ram).map_err(BootError::Configure)
}

fn write_start_info(ram: &GuestRam, info: &BootInfo<'_>) -> Result<(), BootError> {
    /// "xEn3" (Xen public/arch-x86/hvm/start_info.h).
    const MAGIC: u32 = 0x336e_c578;
    const VERSION_WITH_MEMMAP: u32 = 1;

    let map: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = info
        .initrd
        .iter()
        .map(|(paddr, size)| hvm_modlist_entry {
            paddr: *paddr,
            size: *size,
            ..Default::default()
        })
        .collect();
    let start = hvm_start_info {
        magic: MAGIC,
        version: VERSION_WITH_MEMMAP,
        cmdline_paddr: layout::COMMAND_LINE,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: map.len() as u32,
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            layout::PVH_MODULES
        },
        nr_modules: modules.len() as u32,
        rsdp_paddr: info.rsdp.unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&start, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMMAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(BootError::Configure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    #[test]
    fn the_memory_map_covers_all_ram_without_overlap() {
        for mib in [32, 3072, 5000] {
            let ram = allocate(mib).unwrap();
            let mut map = memory_map(&ram);
            map.sort_unstable();
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
            }
            let usable: u64 = map.iter().filter(|e| e.2 == E820_RAM).map(|e| e.1).sum();
            assert_eq!(
                usable,
                (mib << 20) - (layout::HIGH_RAM_START - layout::LOW_RAM_END)
            );
        }
    }

    #[test]
    fn overlong_and_odd_command_lines_are_refused() {
        let ram = allocate(32).unwrap();
        write_command_line(&ram, &"x".repeat(2047)).unwrap();
        assert!(write_command_line(&ram, &"x".repeat(2048)).is_err());
        assert!(write_command_line(&ram, "a\0b").is_err());
        assert!(write_command_line(&ram, "ä").is_err());
    }
}
