//! Entries to headers.

use std::io::Write;

use super::{Entry, Kind};

/// Everything in a stream comes in blocks of this size.
pub const BLOCK: usize = 512;

/// What ends a stream: two blocks of zeros.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Where fields of a ustar header lie.
const NAME: (usize, usize) = (0, 100);
const MODE: (usize, usize) = (100, 8);
const UID: (usize, usize) = (108, 8);
const GID: (usize, usize) = (116, 8);
const SIZE: (usize, usize) = (124, 12);
const MTIME: (usize, usize) = (136, 12);
const CHECKSUM: (usize, usize) = (148, 8);
const TYPE: (usize, usize) = (156, 1);
const LINK: (usize, usize) = (157, 100);
const MAGIC: (usize, usize) = (257, 8);
const MAJOR: (usize, usize) = (329, 8);
const MINOR: (usize, usize) = (337, 8);

/// Largest numbers of octal fields of 8 and 12 bytes.
const MAX_OCTAL_8: u64 = 0o7_777_777;
const MAX_OCTAL_12: u64 = 0o77_777_777_777;

/// Zeros behind so many bytes of content.
#[must_use]
pub const fn padding(length: u64) -> usize {
    let over = (length % BLOCK as u64) as usize;
    if over == 0 { 0 } else { BLOCK - over }
}

/// The map of a sparse file, which comes ahead of its data: where data lies, as (offset, length).
#[must_use]
pub fn sparse_map(segments: &[(u64, u64)], size: u64) -> Vec<u8> {
    let ends_in_hole = segments
        .last()
        .is_none_or(|(offset, length)| offset.saturating_add(*length) < size);
    let count = segments.len() + usize::from(ends_in_hole);
    let mut map = format!("{count}\n").into_bytes();
    let end = (size, 0);
    let last = ends_in_hole.then_some(&end);
    for (offset, length) in segments.iter().chain(last) {
        // Writing to memory does not fail.
        let _ = write!(map, "{offset}\n{length}\n");
    }
    map.resize(map.len() + padding(map.len() as u64), 0);
    map
}

/// Appends the header of an entry. `stored` is how many bytes of content follow; `is_sparse`: a map, then
/// data, of a file of `entry.size` bytes.
pub fn encode(entry: &Entry, stored: u64, is_sparse: bool, out: &mut Vec<u8>) {
    let mut path = entry.path.clone();
    if entry.kind == Kind::Directory && path.last() != Some(&b'/') {
        path.push(b'/');
    }
    let mut records = Vec::new();
    let is_binary = |bytes: &[u8]| std::str::from_utf8(bytes).is_err();
    let long_path = path.len() > NAME.1 && !is_sparse;
    let long_link = entry.link.len() > LINK.1;
    if (long_path && is_binary(&path)) || (long_link && is_binary(&entry.link)) {
        record(&mut records, b"hdrcharset", b"BINARY");
    }
    if is_sparse {
        record(&mut records, b"GNU.sparse.major", b"1");
        record(&mut records, b"GNU.sparse.minor", b"0");
        record(&mut records, b"GNU.sparse.name", &path);
        record(
            &mut records,
            b"GNU.sparse.realsize",
            entry.size.to_string().as_bytes(),
        );
    } else if long_path {
        record(&mut records, b"path", &path);
    }
    if long_link {
        record(&mut records, b"linkpath", &entry.link);
    }
    if stored > MAX_OCTAL_12 {
        record(&mut records, b"size", stored.to_string().as_bytes());
    }
    for (name, id) in [(&b"uid"[..], entry.uid), (b"gid", entry.gid)] {
        if u64::from(id) > MAX_OCTAL_8 {
            record(&mut records, name, id.to_string().as_bytes());
        }
    }
    let plain_time = u64::try_from(entry.modified).is_ok_and(|time| time <= MAX_OCTAL_12);
    if entry.modified_ns != 0 || !plain_time {
        record(&mut records, b"mtime", time(entry).as_bytes());
    }
    for (name, value) in &entry.xattrs {
        let mut key = b"SCHILY.xattr.".to_vec();
        key.extend_from_slice(name.as_bytes());
        record(&mut records, &key, value);
    }
    if !records.is_empty() {
        let mut extension = Entry::new(b"PaxHeaders/entry".to_vec(), Kind::Regular);
        extension.mode = 0o644;
        header(&extension, &extension.path, b'x', records.len() as u64, out);
        let length = records.len() as u64;
        out.extend_from_slice(&records);
        out.resize(out.len() + padding(length), 0);
    }
    let kind = match entry.kind {
        Kind::Regular => b'0',
        Kind::HardLink => b'1',
        Kind::Symlink => b'2',
        Kind::CharacterDevice => b'3',
        Kind::BlockDevice => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    };
    let shown = if is_sparse {
        b"GNUSparseFile.0/entry"
    } else {
        path.as_slice()
    };
    header(entry, shown, kind, stored, out);
}

/// Seconds with nanoseconds: of times before 1970 both count down.
fn time(entry: &Entry) -> String {
    let (seconds, ns) = (entry.modified, entry.modified_ns);
    match (seconds < 0, ns) {
        (_, 0) => seconds.to_string(),
        (false, ns) => format!("{seconds}.{ns:09}"),
        (true, ns) => {
            let whole = seconds.saturating_add(1).unsigned_abs();
            format!("-{whole}.{:09}", 1_000_000_000_u32.saturating_sub(ns))
        }
    }
}

/// Appends `LENGTH NAME=VALUE\n`, whose length counts its own digits.
fn record(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let rest = name.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + digits(length) {
        length = rest + digits(length);
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(name);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

const fn digits(number: usize) -> usize {
    match number.checked_ilog10() {
        Some(power) => power as usize + 1,
        None => 1,
    }
}

fn header(entry: &Entry, path: &[u8], kind: u8, size: u64, out: &mut Vec<u8>) {
    let mut block = [0; BLOCK];
    text(&mut block, NAME, path);
    octal(&mut block, MODE, (entry.mode & 0o7777).into());
    octal(&mut block, UID, u64::from(entry.uid).min(MAX_OCTAL_8));
    octal(&mut block, GID, u64::from(entry.gid).min(MAX_OCTAL_8));
    octal(&mut block, SIZE, size.min(MAX_OCTAL_12));
    let time = u64::try_from(entry.modified).unwrap_or(0);
    octal(&mut block, MTIME, time.min(MAX_OCTAL_12));
    text(&mut block, TYPE, &[kind]);
    text(&mut block, LINK, &entry.link);
    text(&mut block, MAGIC, b"ustar\x0000");
    octal(
        &mut block,
        MAJOR,
        u64::from(entry.device.0).min(MAX_OCTAL_8),
    );
    octal(
        &mut block,
        MINOR,
        u64::from(entry.device.1).min(MAX_OCTAL_8),
    );
    text(&mut block, CHECKSUM, b"        ");
    let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
    text(&mut block, CHECKSUM, format!("{sum:06o}\0 ").as_bytes());
    out.extend_from_slice(&block);
}

fn text(block: &mut [u8; BLOCK], (start, length): (usize, usize), value: &[u8]) {
    let room = block.iter_mut().skip(start).take(length);
    for (to, from) in room.zip(value) {
        *to = *from;
    }
}

fn octal(block: &mut [u8; BLOCK], field: (usize, usize), value: u64) {
    let digits = field.1.saturating_sub(1);
    text(block, field, format!("{value:0digits$o}").as_bytes());
}
