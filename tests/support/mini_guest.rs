//! A guest that needs no kernel, for tests of several crates (included with `#[path]`).
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::Path;

pub(crate) const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
pub(crate) const INCREMENT: u64 = 1_442_695_040_888_963_407;

/// Computes one number after the other in RAM and writes each to the serial port.
pub(crate) fn kernel() -> Vec<u8> {
    // mov ebx, 0x200000; mov dx, 0x3f8; mov r13, MULTIPLIER; mov r14, INCREMENT
    let mut code = vec![0xbb, 0, 0, 0x20, 0, 0x66, 0xba, 0xf8, 3, 0x49, 0xbd];
    code.extend(MULTIPLIER.to_le_bytes());
    code.extend([0x49, 0xbe]);
    code.extend(INCREMENT.to_le_bytes());
    code.extend([
        0x48, 0x8b, 0x03, // 1: mov rax, [rbx]
        0x49, 0x0f, 0xaf, 0xc5, // imul rax, r13
        0x4c, 0x01, 0xf0, // add rax, r14
        0x48, 0x89, 0x03, // mov [rbx], rax
        0xb9, 8, 0, 0, 0,    // mov ecx, 8
        0xee, // 2: out dx, al
        0x48, 0xc1, 0xe8, 8, // shr rax, 8
        0xff, 0xc9, // dec ecx
        0x75, 0xf7, // jnz 2
        0xeb, 0xe3, // jmp 1
    ]);
    program(&code)
}

/// An x86-64 ELF program of one segment with this code.
pub(crate) fn program(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0; 4]);
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    for word in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Checks that these files, one behind the other, are the guest's numbers without a gap.
pub(crate) fn check(dir: &Path, files: &[&str]) {
    let all: Vec<u8> = files
        .iter()
        .flat_map(|file| fs::read(dir.join(file)).unwrap())
        .collect();
    let mut expected = 0u64;
    for (bytes, at) in all.as_chunks().0.iter().zip(0..) {
        expected = expected.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        assert_eq!(u64::from_le_bytes(*bytes), expected, "number {at}");
    }
}
