//! Files for guests that are wrong in one way.

use std::fs;
use std::path::{Path, PathBuf};

/// An x86-64 ELF program of one segment with this code, which begins right behind the headers.
#[must_use]
pub fn program(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::new();
    // ELF-64, little endian, version 1; executable, x86-64.
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(2u16.to_le_bytes());
    elf.extend(62u16.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // One segment to load, readable and executable.
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// An x86-64 Linux program that only waits: `pause()` for ever.
fn waiting_program() -> Vec<u8> {
    // 1: mov eax, 34 (pause); syscall; jmp 1b
    program(&[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7])
}

/// A kernel that faults at once, without a handler: a triple fault.
#[must_use]
pub fn faulting_kernel() -> Vec<u8> {
    // lidt [rip + 2]; ud2; ten zeros: an empty table
    let mut code = vec![0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b];
    code.extend([0; 10]);
    program(&code)
}

/// A kernel that only halts, for ever: `cli; 1: hlt; jmp 1b`.
#[must_use]
pub fn halting_kernel() -> Vec<u8> {
    program(&[0xfa, 0xf4, 0xeb, 0xfd])
}

/// One file of a cpio archive in the "newc" format.
fn cpio_entry(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let fields = [
        1,
        mode,
        0,
        0,
        1,
        0,
        u32::try_from(content.len()).unwrap(),
        0,
        0,
        0,
        0,
        u32::try_from(name.len()).unwrap() + 1,
        0,
    ];
    let mut entry = b"070701".to_vec();
    for field in fields {
        entry.extend(format!("{field:08x}").bytes());
    }
    let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(4), 0);
    entry.extend(name.bytes());
    entry.push(0);
    pad(&mut entry);
    entry.extend(content);
    pad(&mut entry);
    entry
}

/// An initramfs whose init never does anything.
///
/// # Panics
/// The directory cannot be written.
#[must_use]
pub fn silent_initramfs(dir: &Path) -> PathBuf {
    let path = dir.join("silent-initramfs");
    let mut archive = cpio_entry("init", 0o100_755, &waiting_program());
    archive.extend(cpio_entry("TRAILER!!!", 0, b""));
    fs::write(&path, archive).unwrap();
    path
}

/// An initramfs with no program in it.
///
/// # Panics
/// The directory cannot be written.
#[must_use]
pub fn empty_initramfs(dir: &Path) -> PathBuf {
    let path = dir.join("empty-initramfs");
    fs::write(&path, cpio_entry("TRAILER!!!", 0, b"")).unwrap();
    path
}
