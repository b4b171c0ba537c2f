use super::*;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
}

fn file_of(size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn open(path: &std::path::Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[test]
fn reads_and_writes_at_offsets() {
    let disk = file_of(4096);
    let mem = ram();
    mem.write_slice(b"bell jar", GuestAddress(0x100)).unwrap();
    let mut raw = RawFile::new(open(disk.path()), "d", false).unwrap();
    let from = [
        Segment {
            addr: GuestAddress(0x100),
            len: 4,
        },
        Segment {
            addr: GuestAddress(0x104),
            len: 4,
        },
    ];
    raw.run(
        &mem,
        Op::Write {
            from: &from,
            offset: 512,
        },
    )
    .unwrap();
    let to = [Segment {
        addr: GuestAddress(0x200),
        len: 8,
    }];
    raw.run(
        &mem,
        Op::Read {
            to: &to,
            offset: 512,
        },
    )
    .unwrap();
    let mut data = [0; 8];
    mem.read_slice(&mut data, GuestAddress(0x200)).unwrap();
    assert_eq!(&data, b"bell jar");
    raw.run(&mem, Op::Flush).unwrap();
}

#[test]
fn discard_and_zeroes_read_as_zeros_and_keep_the_size() {
    let disk = file_of(0);
    disk.as_file().write_all(&[7; 16384]).unwrap();
    let mut raw = RawFile::new(open(disk.path()), "d", false).unwrap();
    raw.discard(0, 4096).unwrap();
    raw.write_zeroes(4096, 512, true).unwrap();
    raw.write_zeroes(5120, 512, false).unwrap();
    raw.write_zeroes(16384, 0, false).unwrap();
    let mut data = vec![1; 16384];
    disk.as_file().read_exact_at(&mut data, 0).unwrap();
    for (i, byte) in data.iter().enumerate() {
        let zero = i < 4096 + 512 || (5120..5632).contains(&i);
        assert_eq!(*byte, if zero { 0 } else { 7 }, "byte {i}");
    }
    assert_eq!(disk.as_file().metadata().unwrap().len(), 16384);
}

#[test]
fn zeros_are_written_where_holes_are_not_possible() {
    let disk = file_of(0);
    disk.as_file().write_all(&[7; 200_000]).unwrap();
    write_zeroes(disk.as_file(), 1000, 150_000).unwrap();
    let mut data = vec![1; 200_000];
    disk.as_file().read_exact_at(&mut data, 0).unwrap();
    assert!(data[..1000].iter().all(|b| *b == 7));
    assert!(data[1000..151_000].iter().all(|b| *b == 0));
    assert!(data[151_000..].iter().all(|b| *b == 7));
}

fn refusal(file: File, read_only: bool) -> String {
    RawFile::new(file, "the-drive", read_only)
        .unwrap_err()
        .to_string()
}

#[test]
fn refuses_what_is_not_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let text = refusal(File::open(dir.path()).unwrap(), true);
    assert!(
        text.contains("the-drive") && text.contains("a directory"),
        "{text}"
    );
    let text = refusal(File::open("/dev/null").unwrap(), true);
    assert!(text.contains("a character device"), "{text}");
    let text = refusal(file_of(0).into_file(), false);
    assert!(text.contains("empty"), "{text}");
    let text = refusal(file_of(1025).into_file(), false);
    assert!(
        text.contains("1025 bytes") && text.contains("truncate"),
        "{text}"
    );
}

#[test]
fn refuses_descriptors_open_in_the_wrong_way() {
    let disk = file_of(512);
    let text = refusal(File::open(disk.path()).unwrap(), false);
    assert!(text.contains("reading and writing"), "{text}");
    let write_only = OpenOptions::new().write(true).open(disk.path()).unwrap();
    assert!(refusal(write_only, true).contains("open for reading"));
    let append = OpenOptions::new()
        .read(true)
        .append(true)
        .open(disk.path())
        .unwrap();
    assert!(refusal(append, false).contains("appending"));
}

#[test]
fn a_writable_drive_is_never_shared() {
    let disk = file_of(512);
    let first = RawFile::new(open(disk.path()), "a", false).unwrap();
    assert!(refusal(open(disk.path()), false).contains("in use"));
    assert!(refusal(open(disk.path()), true).contains("in use"));
    drop(first);
    let reader = RawFile::new(open(disk.path()), "a", true).unwrap();
    let other = RawFile::new(File::open(disk.path()).unwrap(), "b", true).unwrap();
    assert!(refusal(open(disk.path()), false).contains("in use"));
    drop((reader, other));
    RawFile::new(open(disk.path()), "a", false).unwrap();
}

#[test]
fn the_contents_never_decide_the_format() {
    // A header as a guest could write it to name a backing file of the host.
    let disk = file_of(0);
    let mut qcow2 = b"QFI\xfb\x00\x00\x00\x03".to_vec();
    qcow2.resize(1024, 0);
    disk.as_file().write_all(&qcow2).unwrap();
    let mem = ram();
    let mut raw = RawFile::new(open(disk.path()), "d", true).unwrap();
    assert_eq!(raw.size(), 1024);
    let to = [Segment {
        addr: GuestAddress(0),
        len: 512,
    }];
    raw.run(&mem, Op::Read { to: &to, offset: 0 }).unwrap();
    let mut data = vec![0; 512];
    mem.read_slice(&mut data, GuestAddress(0)).unwrap();
    assert_eq!(data, qcow2[..512]);
}

#[test]
fn rescan_takes_a_good_size_only() {
    let disk = file_of(512);
    let mut raw = RawFile::new(open(disk.path()), "d", false).unwrap();
    disk.as_file().set_len(2048).unwrap();
    raw.rescan().unwrap();
    assert_eq!(raw.size(), 2048);
    disk.as_file().set_len(2049).unwrap();
    raw.rescan().unwrap_err();
    disk.as_file().set_len(0).unwrap();
    raw.rescan().unwrap_err();
    assert_eq!(raw.size(), 2048);
}
