use std::io::Write;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::memory::allocate;

const LOAD_AT: u64 = 0x100_0000;

/// A minimal ELF kernel: one segment, one PVH note.
fn elf(segment: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 64 + 2 * 56];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, 2, 2);
    put(&mut file, 18, 62, 2);
    put(&mut file, 24, LOAD_AT, 8);
    put(&mut file, 32, 64, 8);
    put(&mut file, 52, 64, 2);
    put(&mut file, 54, 56, 2);
    put(&mut file, 56, 2, 2);
    let mut note = Vec::new();
    for word in [4u32, 8, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&(LOAD_AT + 4).to_le_bytes());
    let (note_at, data_at) = (file.len(), file.len() + note.len());
    for (index, kind, at, len) in [(0, 4, note_at, note.len()), (1, 1, data_at, segment.len())] {
        let header = 64 + index * 56;
        put(&mut file, header, kind, 4);
        put(&mut file, header + 8, at as u64, 8);
        put(&mut file, header + 24, LOAD_AT, 8);
        put(&mut file, header + 32, len as u64, 8);
        put(&mut file, header + 40, len as u64, 8);
    }
    file.extend_from_slice(&note);
    file.extend_from_slice(segment);
    file
}

fn put(file: &mut [u8], at: usize, value: u64, len: usize) {
    file[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_bytes(bytes: &[u8], protocol: Protocol) -> Result<LoadedKernel, KernelError> {
    load(&allocate(32).unwrap(), &mut file(bytes), protocol)
}

#[test]
fn a_good_elf_kernel_loads_by_both_entries() {
    let bytes = elf(b"kernel text");
    let ram = allocate(32).unwrap();
    let loaded = load(&ram, &mut file(&bytes), Protocol::Linux).unwrap();
    assert_eq!(loaded.entry, Entry::Long { address: LOAD_AT });
    let mut text = [0u8; 11];
    ram.read_slice(&mut text, GuestAddress(LOAD_AT)).unwrap();
    assert_eq!(&text, b"kernel text");
    let loaded = load_bytes(&bytes, Protocol::Pvh).unwrap();
    assert_eq!(
        loaded.entry,
        Entry::Pvh {
            address: LOAD_AT + 4
        }
    );
}

#[test]
fn foreign_empty_and_truncated_files_say_what_they_are() {
    let say = |bytes: &[u8]| match load_bytes(bytes, Protocol::Linux) {
        Ok(_) => String::from("loaded"),
        Err(e) => e.to_string(),
    };
    assert!(say(b"").contains("empty"));
    assert!(say(b"#!/bin/sh\n").contains("neither an ELF"));
    assert!(say(b"\x7fELF").contains("cut short"));
    let good = elf(&[1; 4096]);
    assert!(say(&good[..good.len() - 1]).contains("cut short"));
    let mut arm = good.clone();
    put(&mut arm, 18, 183, 2);
    assert!(say(&arm).contains("not for x86_64"));
    let mut narrow = good;
    narrow[4] = 1;
    assert!(say(&narrow).contains("64 bits"));
    assert!(
        load(
            &allocate(32).unwrap(),
            &mut File::open("/").unwrap(),
            Protocol::Linux
        )
        .is_err()
    );
}

/// A peer's loader looped for ever on offsets beyond the end of the file.
#[test]
fn elf_offsets_past_the_end_are_errors() {
    for (at, len) in [
        (32, 8),
        (64 + 8, 8),
        (64 + 32, 8),
        (120 + 8, 8),
        (120 + 32, 8),
    ] {
        for value in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 32, 100_000] {
            let mut bytes = elf(&[1; 64]);
            put(&mut bytes, at, value, len);
            let error = load_bytes(&bytes, Protocol::Pvh).err().unwrap();
            assert!(
                matches!(
                    error,
                    KernelError::Truncated { .. }
                        | KernelError::Elf(_)
                        | KernelError::DoesNotFit { .. }
                ),
                "{at}: {error}"
            );
        }
    }
}

#[test]
fn a_kernel_larger_than_ram_names_the_size_it_needs() {
    let mut bytes = elf(&[1; 64]);
    put(&mut bytes, 120 + 40, 64 << 20, 8);
    let error = load_bytes(&bytes, Protocol::Linux).err().unwrap();
    assert!(error.to_string().contains("up to 80 MiB"), "{error}");
}

#[test]
fn an_initrd_must_fit_behind_the_kernel() {
    let ram = allocate(32).unwrap();
    let (address, size) = load_initrd(&ram, &mut file(&[7; 5000]), &kernel_until(1 << 20)).unwrap();
    assert_eq!((address % 4096, size), (0, 5000));
    assert!(address + size <= 32 << 20);
    let big = tempfile::tempfile().unwrap();
    for len in [31 << 20, 32 << 20, 33 << 20, 1 << 40] {
        big.set_len(len).unwrap();
        let error = load_initrd(&ram, &mut big.try_clone().unwrap(), &kernel_until(2 << 20))
            .err()
            .unwrap();
        assert!(
            matches!(error, KernelError::InitrdTooLarge { .. }),
            "{error}"
        );
    }
}

fn kernel_until(end: u64) -> LoadedKernel {
    LoadedKernel {
        entry: Entry::Long { address: LOAD_AT },
        end,
        setup: None,
    }
}

#[test]
fn an_initrd_stays_below_what_a_bzimage_allows() {
    let ram = allocate(64).unwrap();
    let header = setup_header {
        initrd_addr_max: (48 << 20) - 1,
        ..Default::default()
    };
    let kernel = LoadedKernel {
        setup: Some(header),
        ..kernel_until(4 << 20)
    };
    let (address, size) = load_initrd(&ram, &mut file(&[7; 5000]), &kernel).unwrap();
    assert!(address + size <= 48 << 20, "{address:#x}");
}

#[test]
fn an_entry_point_outside_the_kernel_is_an_error() {
    for entry in [0, 0xf_ffff, LOAD_AT + 64, 1 << 30, u64::MAX] {
        let mut bytes = elf(&[1; 64]);
        put(&mut bytes, 24, entry, 8);
        assert!(load_bytes(&bytes, Protocol::Linux).is_err(), "{entry:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any bytes anywhere in the headers: an answer, soon, without a panic.
    #[test]
    fn mutated_headers_are_survived_in_bounded_time(
        changes in prop::collection::vec((0usize..200, any::<u8>()), 1..12),
        bzimage in any::<bool>(),
        pvh in any::<bool>(),
    ) {
        let mut bytes = if bzimage { bz_image() } else { elf(&[1; 64]) };
        for (at, value) in changes {
            let at = if bzimage { 0x1e8 + at % 0x80 } else { at % 188 };
            bytes[at] = value;
        }
        let started = Instant::now();
        let protocol = if pvh { Protocol::Pvh } else { Protocol::Linux };
        let _ = load_bytes(&bytes, protocol);
        prop_assert!(started.elapsed() < Duration::from_secs(5));
    }
}

/// A bzImage that is all header and one page of code.
fn bz_image() -> Vec<u8> {
    let mut file = vec![0u8; 5 * 512 + 4096];
    file[0x1f1] = 4;
    put(&mut file, 0x1f4, 4096 / 16, 4);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    put(&mut file, 0x206, 0x20f, 2);
    file[0x211] = 1;
    put(&mut file, 0x214, 0x10_0000, 4);
    put(&mut file, 0x236, 1, 2);
    put(&mut file, 0x258, LOAD_AT, 8);
    put(&mut file, 0x260, 1 << 20, 4);
    file
}

#[test]
fn a_good_bzimage_is_entered_behind_its_first_sector() {
    let loaded = load_bytes(&bz_image(), Protocol::Linux).unwrap();
    assert_eq!(loaded.entry, Entry::Long { address: 0x10_0200 });
    assert!(loaded.setup.is_some());
    assert!(matches!(
        load_bytes(&bz_image(), Protocol::Pvh),
        Err(KernelError::NoPvh)
    ));
    let mut old = bz_image();
    put(&mut old, 0x206, 0x20b, 2);
    assert!(load_bytes(&old, Protocol::Linux).is_err());
    let cut = &bz_image()[..5 * 512 + 2000];
    assert!(matches!(
        load_bytes(cut, Protocol::Linux),
        Err(KernelError::Truncated { .. })
    ));
}
