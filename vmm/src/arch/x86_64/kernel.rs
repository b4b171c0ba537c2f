//! Loading kernels and initrds into guest RAM: ELF `vmlinux` (64-bit entry or PVH) and
//! bzImage. Files are hostile: every offset is checked here before the loader follows it.
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout;
use super::registers::Entry;
use crate::config::BootProtocol as Protocol;
use crate::memory::GuestRam;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot be read: {0}")]
    Read(io::Error),
    #[error("is a directory or device, not a kernel file")]
    NotAFile,
    #[error(
        "is neither an ELF vmlinux nor a bzImage: it begins with {0:02x?}; Bell Jar boots x86_64 Linux kernels of these two forms"
    )]
    Unknown(Vec<u8>),
    #[error("is an ELF file, but {0}")]
    Elf(&'static str),
    #[error("is a bzImage, but {0}")]
    BzImage(&'static str),
    #[error("is cut short: it names bytes up to {needed}, but has {size}")]
    Truncated { needed: u64, size: u64 },
    #[error(
        "needs guest RAM up to {needed} MiB (below 3 GiB), but the guest has {available} MiB; give it more memory"
    )]
    DoesNotFit { needed: u64, available: u64 },
    #[error("cannot be loaded: {0}")]
    Load(linux_loader::loader::Error),
    #[error("has no PVH entry point, which was asked for; build it with CONFIG_PVH=y")]
    NoPvh,
    #[error(
        "of {size} bytes does not fit into guest RAM beside the kernel ({free} bytes are free); give the guest more memory"
    )]
    InitrdTooLarge { size: u64, free: u64 },
    #[error("is empty")]
    Empty,
}

/// A kernel in guest RAM.
#[derive(Clone, Copy)]
pub struct LoadedKernel {
    pub entry: Entry,
    /// First byte behind the kernel.
    pub end: u64,
    /// The header of a bzImage, to be repeated in the zero page.
    pub setup: Option<setup_header>,
}

/// What `registers` maps for the 64-bit entry.
const MAPPED_AT_ENTRY: u64 = 1 << 30;

const ELF_MAGIC: &[u8] = b"\x7fELF";
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_AT: u64 = 0x202;

/// Loads the kernel in `file`, by its own magic numbers.
pub fn load(
    ram: &GuestRam,
    file: &mut File,
    protocol: Protocol,
) -> Result<LoadedKernel, KernelError> {
    let meta = file.metadata().map_err(KernelError::Read)?;
    if !meta.is_file() {
        return Err(KernelError::NotAFile);
    }
    if meta.len() == 0 {
        return Err(KernelError::Empty);
    }
    let head = read_up_to(file, 0, 64)?;
    if head.starts_with(ELF_MAGIC) {
        return load_elf(ram, file, &head, meta.len(), protocol);
    }
    if read_up_to(file, BZIMAGE_MAGIC_AT, 4)? == BZIMAGE_MAGIC {
        return load_bzimage(ram, file, meta.len(), protocol);
    }
    let shown = head.get(..4).unwrap_or(&head);
    Err(KernelError::Unknown(shown.to_vec()))
}

fn read_up_to(file: &File, at: u64, len: usize) -> Result<Vec<u8>, KernelError> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(KernelError::Read(e)),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// End of the RAM below the hole, where kernels must lie.
fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.iter()
        .next()
        .map_or(0, vm_memory::GuestMemoryRegion::len)
}

fn fits(ram: &GuestRam, end: u64) -> Result<(), KernelError> {
    let available = low_ram_end(ram);
    if end <= available {
        return Ok(());
    }
    Err(KernelError::DoesNotFit {
        needed: end.div_ceil(1 << 20),
        available: available >> 20,
    })
}

fn load_elf(
    ram: &GuestRam,
    file: &mut File,
    head: &[u8],
    size: u64,
    protocol: Protocol,
) -> Result<LoadedKernel, KernelError> {
    let end = check_elf(file, head, size)?;
    fits(ram, end)?;
    let loaded = load_with::<Elf>(ram, file)?;
    let entry: Entry = match (protocol, loaded.pvh_boot_cap) {
        (Protocol::Linux, _) => Entry::Long {
            address: loaded.kernel_load.0,
        },
        (Protocol::Pvh, PvhBootCapability::PvhEntryPresent(address)) => {
            Entry::Pvh { address: address.0 }
        }
        (Protocol::Pvh, _) => return Err(KernelError::NoPvh),
    };
    check_entry(entry, end)?;
    Ok(LoadedKernel {
        entry,
        end,
        setup: None,
    })
}

/// An entry point outside the kernel, or where its first page tables do not reach, would be a
/// triple fault without a word.
fn check_entry(entry: Entry, end: u64) -> Result<(), KernelError> {
    let (address, limit) = match entry {
        Entry::Long { address } => (address, MAPPED_AT_ENTRY.min(end)),
        Entry::Pvh { address } => (address, end),
    };
    if (layout::HIGH_RAM_START..limit).contains(&address) {
        return Ok(());
    }
    Err(KernelError::Elf(
        "its entry point lies outside of it, or above 1 GiB",
    ))
}

fn load_with<L: KernelLoader>(
    ram: &GuestRam,
    file: &mut File,
) -> Result<KernelLoaderResult, KernelError> {
    let start = GuestAddress(layout::HIGH_RAM_START);
    L::load(ram, None, file, Some(start)).map_err(KernelError::Load)
}

/// Checks headers of an ELF kernel against the size of its file. Returns where it ends in RAM.
fn check_elf(file: &File, head: &[u8], size: u64) -> Result<u64, KernelError> {
    /// Real kernels have about five.
    const MAX_HEADERS: u64 = 64;
    const HEADER_LEN: u64 = 56;
    const MACHINE_X86_64: u64 = 62;
    const PT_LOAD: u64 = 1;
    const PT_NOTE: u64 = 4;
    const MAX_NOTES: u64 = 1 << 20;

    if head.len() < 64 {
        return Err(KernelError::Truncated { needed: 64, size });
    }
    if head.get(4..6) != Some(&[2, 1]) {
        return Err(KernelError::Elf("not of 64 bits, little endian"));
    }
    if field(head, 18, 2) != MACHINE_X86_64 {
        return Err(KernelError::Elf("not for x86_64"));
    }
    if field(head, 54, 2) != HEADER_LEN {
        return Err(KernelError::Elf("its program headers have a wrong size"));
    }
    let (at, count) = (field(head, 32, 8), field(head, 56, 2));
    if count == 0 || count > MAX_HEADERS {
        return Err(KernelError::Elf("it has none or too many program headers"));
    }
    let within = |end: Option<u64>| match end {
        Some(end) if end <= size => Ok(()),
        other => Err(KernelError::Truncated {
            needed: other.unwrap_or(u64::MAX),
            size,
        }),
    };
    within(at.checked_add(count * HEADER_LEN))?;
    let mut end = 0;
    let headers = read_up_to(file, at, (count * HEADER_LEN) as usize)?;
    for header in headers.chunks_exact(HEADER_LEN as usize) {
        let kind = field(header, 0, 4);
        let (offset, in_file) = (field(header, 8, 8), field(header, 32, 8));
        let (address, in_ram) = (field(header, 24, 8), field(header, 40, 8));
        match kind {
            PT_LOAD => {
                within(offset.checked_add(in_file))?;
                if address < layout::HIGH_RAM_START && in_ram > 0 {
                    return Err(KernelError::Elf("a segment lies below 1 MiB"));
                }
                let segment_end = address.checked_add(in_ram.max(in_file));
                end = end.max(segment_end.unwrap_or(u64::MAX));
            }
            PT_NOTE => {
                within(offset.checked_add(in_file))?;
                if in_file > MAX_NOTES {
                    return Err(KernelError::Elf("its notes are too long"));
                }
            }
            _ => {}
        }
    }
    if end == 0 {
        return Err(KernelError::Elf("it has nothing to load"));
    }
    Ok(end)
}

fn load_bzimage(
    ram: &GuestRam,
    file: &mut File,
    size: u64,
    protocol: Protocol,
) -> Result<LoadedKernel, KernelError> {
    /// boot.rst: XLF_KERNEL_64, the entry point 512 bytes behind the load address.
    const KERNEL_64: u16 = 1;
    const ENTRY_64: u64 = 0x200;
    const VERSION_2_12: u16 = 0x20c;

    if protocol == Protocol::Pvh {
        return Err(KernelError::NoPvh);
    }
    let header = read_up_to(file, 0x1f1, 0x7b)?;
    let sectors = match field(&header, 0, 1) {
        0 => 4,
        n => n,
    };
    let setup_end = (sectors + 1) * 512;
    // syssize counts 16-byte paragraphs of the protected-mode part.
    let needed = setup_end + field(&header, 3, 4) * 16;
    // The last paragraph may be incomplete.
    if size + 16 <= needed || size <= setup_end {
        return Err(KernelError::Truncated { needed, size });
    }
    if header.len() < 0x7b || field(&header, 0x206 - 0x1f1, 2) < u64::from(VERSION_2_12) {
        return Err(KernelError::BzImage("its boot protocol is older than 2.12"));
    }
    if field(&header, 0x236 - 0x1f1, 2) & u64::from(KERNEL_64) == 0 {
        return Err(KernelError::BzImage("it has no 64-bit entry point"));
    }
    let preferred = field(&header, 0x258 - 0x1f1, 8);
    let init_size = field(&header, 0x260 - 0x1f1, 4);
    let load_at = field(&header, 0x214 - 0x1f1, 4);
    let unpacked_end = preferred.max(load_at).saturating_add(init_size);
    fits(ram, unpacked_end.max(load_at + (size - setup_end)))?;
    file.seek(SeekFrom::Start(0)).map_err(KernelError::Read)?;
    let loaded = load_with::<BzImage>(ram, file)?;
    Ok(LoadedKernel {
        entry: Entry::Long {
            address: loaded.kernel_load.0.saturating_add(ENTRY_64),
        },
        end: unpacked_end,
        setup: loaded.setup_header,
    })
}

/// A little-endian field of `len` bytes; zero where the slice ends before it.
fn field(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len).unwrap_or_default();
    field
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Loads an initrd as high as possible below the hole, page-aligned, behind the kernel.
/// Returns its address and size.
pub fn load_initrd(
    ram: &GuestRam,
    file: &mut File,
    kernel: &LoadedKernel,
) -> Result<(u64, u64), KernelError> {
    const PAGE: u64 = 4096;
    let meta = file.metadata().map_err(KernelError::Read)?;
    if !meta.is_file() {
        return Err(KernelError::NotAFile);
    }
    let size = meta.len();
    if size == 0 {
        return Err(KernelError::Empty);
    }
    let kernel_end = kernel.end;
    // boot.rst: the highest address a byte of the initrd may have.
    let highest = kernel.setup.map(|header| u64::from(header.initrd_addr_max));
    let limit = match highest {
        Some(address) if address > 0 => low_ram_end(ram).min(address + 1),
        _ => low_ram_end(ram),
    };
    let free = limit.saturating_sub(kernel_end.next_multiple_of(PAGE));
    let too_large = KernelError::InitrdTooLarge { size, free };
    let Some(address) = limit.checked_sub(size).map(|a| a & !(PAGE - 1)) else {
        return Err(too_large);
    };
    if address < kernel_end {
        return Err(too_large);
    }
    file.seek(SeekFrom::Start(0)).map_err(KernelError::Read)?;
    ram.read_exact_volatile_from(GuestAddress(address), file, size as usize)
        .map_err(|e| KernelError::Read(io::Error::other(e)))?;
    Ok((address, size))
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
