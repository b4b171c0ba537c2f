//! The guest-physical address map.
//!
//! ```text
//! 0x0000_0000  RAM: boot structures below 640 KiB, ACPI at 0xe0000, kernel from 1 MiB
//! 0xc000_0000  hole: nothing                       (RAM ends here at the latest)
//! 0xd000_0000  virtio-mmio windows, one page each
//! 0xd010_0000  platform registers: pvpanic, sleep and reset
//! 0xfec0_0000  IOAPIC          0xfee0_0000  local APICs
//! 0xfffb_c000  KVM's identity map and TSS pages (Intel)
//! 0x1_0000_0000  the rest of RAM
//! ```

/// Boot structures in low memory. None outlives early boot.
pub const GDT: u64 = 0x500;
pub const IDT: u64 = 0x520;
pub const PVH_START_INFO: u64 = 0x6000;
pub const ZERO_PAGE: u64 = 0x7000;
pub const BOOT_STACK: u64 = 0x8ff0;
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
pub const PAGE_DIRECTORY: u64 = 0xb000;
pub const PVH_MEMMAP: u64 = 0xc000;
pub const PVH_MODULES: u64 = 0xd000;
pub const COMMAND_LINE: u64 = 0x20000;
/// Bytes of the kernel command line, terminating NUL included (Linux: COMMAND_LINE_SIZE).
pub const COMMAND_LINE_MAX: usize = 2048;

/// End of conventional memory. MP tables stand right below, where kernels look for them.
pub const LOW_RAM_END: u64 = 0x9fc00;
/// ACPI tables and the VM generation id, reserved in the memory map.
pub const ACPI_START: u64 = 0xe0000;
pub const ACPI_END: u64 = 0x100000;
/// The 16-byte VM generation id: the last page of the ACPI area.
pub const VM_GENERATION_ID: u64 = 0xff000;

/// Kernels are loaded from 1 MiB on.
pub const HIGH_RAM_START: u64 = 0x100000;

pub const HOLE_START: u64 = 0xc000_0000;
pub const HOLE_END: u64 = 0x1_0000_0000;

pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;
/// Interrupt line of the first virtio device; lines 0 to 4 belong to legacy devices.
pub const VIRTIO_FIRST_GSI: u32 = 5;
/// The IOAPIC has 24 lines; the last is the event device's.
pub const VIRTIO_MAX_DEVICES: usize = 18;
pub const EVENT_DEVICE_GSI: u32 = 23;

/// Platform registers: one page, see the offsets.
pub const PLATFORM_START: u64 = 0xd010_0000;
pub const PVPANIC: u64 = PLATFORM_START;
/// Sleep control, sleep status and reset registers, in the order of `legacy::sleep`.
pub const SLEEP_REGISTERS: u64 = PLATFORM_START + 0x10;
/// Where Firecracker's guests report the end of their boot, by writing 123.
pub const BOOT_MARKER: u64 = 0xc000_0000;

pub const IOAPIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const TSS: usize = 0xfffb_d000;

pub const COM1_PORT: u64 = 0x3f8;
pub const COM1_GSI: u32 = 4;
pub const I8042_PORT: u64 = 0x60;

/// Start and length of the pieces of `bytes` bytes of RAM.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}
