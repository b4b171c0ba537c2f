use std::ffi::CString;
use std::io::Write as _;
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;

/// A file as it comes out of a stream.
type Seen = (Entry, Vec<(u64, Vec<u8>)>);

fn parse(bytes: &[u8], step: usize) -> Result<Vec<Seen>, ParseError> {
    let mut parser = Parser::new();
    let mut seen: Vec<Seen> = Vec::new();
    let mut ended = false;
    for mut part in bytes.chunks(step.max(1)) {
        while let Some(event) = parser.feed(&mut part)? {
            assert!(!ended);
            match event {
                Event::Entry(entry) => seen.push((*entry, Vec::new())),
                Event::Data { offset, bytes } => {
                    let (_, data) = seen.last_mut().unwrap();
                    match data.last_mut() {
                        Some((from, held)) if *from + held.len() as u64 == offset => {
                            held.extend_from_slice(bytes);
                        }
                        _ => data.push((offset, bytes.to_vec())),
                    }
                }
                Event::Done => {}
                Event::End => ended = true,
            }
        }
        assert!(part.is_empty());
    }
    if parser.may_end() {
        Ok(seen)
    } else {
        Err(ParseError::Cut)
    }
}

fn stream(entries: &[(Entry, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (entry, content) in entries {
        encode(entry, content.len() as u64, false, &mut out);
        out.extend_from_slice(content);
        out.resize(out.len() + padding(content.len() as u64), 0);
    }
    out.extend_from_slice(&END);
    out
}

fn file(path: &[u8], content: &[u8]) -> (Entry, Vec<u8>) {
    let mut entry = Entry::new(path.to_vec(), Kind::Regular);
    entry.size = content.len() as u64;
    entry.mode = 0o640;
    (entry, content.to_vec())
}

#[test]
fn everything_an_entry_says_comes_back() {
    let (mut one, content) = file(
        &[b"dir/\xff".repeat(60), b"x".to_vec()].concat(),
        b"content",
    );
    one.uid = 4_000_000_000;
    one.gid = 3_000_000;
    one.modified = -5;
    one.modified_ns = 250_000_000;
    one.xattrs = vec![(CString::new("user.a").unwrap(), b"1\n=\0".to_vec())];
    let mut two = Entry::new(b"link".to_vec(), Kind::Symlink);
    two.link = vec![b'y'; 3000];
    let mut three = Entry::new(b"d/".to_vec(), Kind::Directory);
    three.mode = 0o1777;
    three.modified = 1 << 40;
    let mut four = Entry::new(b"dev".to_vec(), Kind::CharacterDevice);
    four.device = (5, 1);
    let entries = [
        (one, content),
        (two, vec![]),
        (three, vec![]),
        (four, vec![]),
    ];
    let bytes = stream(&entries);
    for step in [1, 7, 512, bytes.len()] {
        let seen = parse(&bytes, step).unwrap();
        let found: Vec<_> = seen.iter().map(|(entry, _)| entry).collect();
        let wanted: Vec<_> = entries.iter().map(|(entry, _)| entry).collect();
        assert_eq!(found, wanted);
        assert_eq!(seen[0].1, [(0, b"content".to_vec())]);
    }
}

#[test]
fn holes_come_back() {
    let segments = [(4096, 5), (1 << 40, 3)];
    let size = (1 << 40) + 100;
    let (mut entry, _) = file(&[b's'; 200], b"");
    entry.size = size;
    let map = sparse_map(&segments, size);
    let mut out = Vec::new();
    encode(&entry, map.len() as u64 + 8, true, &mut out);
    out.extend_from_slice(&map);
    out.extend_from_slice(b"firstend");
    out.resize(out.len() + padding(8), 0);
    out.extend_from_slice(&END);
    for step in [1, 100, out.len()] {
        let seen = parse(&out, step).unwrap();
        assert_eq!(seen[0].0, entry);
        assert_eq!(
            seen[0].1,
            [(4096, b"first".to_vec()), (1 << 40, b"end".to_vec())]
        );
    }
}

#[test]
fn gnu_tar_reads_what_is_written() {
    let mut entry = file(&[b"a/".repeat(80), b"name".to_vec()].concat(), b"hello").0;
    entry.modified = 1_600_000_000;
    entry.modified_ns = 5;
    let bytes = stream(&[(entry, b"hello".to_vec())]);
    let mut tar = Command::new("tar")
        .args(["-xO", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = tar.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"hello");
}

#[test]
fn what_gnu_tar_writes_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let long = "n".repeat(150);
    let long_path = folder.path().join(&long);
    std::fs::write(&long_path, b"long").unwrap();
    std::os::unix::fs::symlink("z".repeat(180), folder.path().join("link")).unwrap();
    let sparse = std::fs::File::create(folder.path().join("sparse")).unwrap();
    sparse.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"mid", 4 << 20).unwrap();
    for format in ["gnu", "pax", "ustar", "v7"] {
        let mut command = Command::new("tar");
        command.arg("-C").arg(folder.path());
        command.arg(format!("--format={format}")).args(["-cf", "-"]);
        match format {
            "pax" => command.args(["--sparse", "sparse"]).args([&long, "link"]),
            "gnu" => command.args([&long, "link"]),
            _ => command.arg("sparse"),
        };
        let output = command.output().unwrap();
        assert!(output.status.success(), "{format}");
        let seen = parse(&output.stdout, 1000).unwrap();
        for (entry, data) in seen {
            match entry.path.as_slice() {
                b"sparse" => {
                    assert_eq!(entry.size, 8 << 20);
                    let (from, bytes) = data.last().unwrap();
                    let at = usize::try_from((4 << 20) - from).unwrap();
                    assert_eq!(&bytes[at..at + 3], b"mid", "{format}");
                    assert_eq!(bytes.len() < 1 << 20, format == "pax");
                }
                b"link" => assert_eq!(entry.link, vec![b'z'; 180]),
                path => {
                    assert_eq!(path, long.as_bytes());
                    assert_eq!(data, [(0, b"long".to_vec())]);
                }
            }
        }
    }
}

#[test]
fn hostile_headers_are_refused() {
    let good = stream(&[file(b"a", b"12345")]);
    assert_eq!(parse(&good[..700], 100), Err(ParseError::Cut));
    let mut wrong = good;
    wrong[0] = b'b';
    assert_eq!(parse(&wrong, 512), Err(ParseError::Checksum));
    assert_eq!(
        parse(&[b'x'; 512], 512),
        Err(ParseError::Invalid("a field is no number"))
    );
    // Names beyond the limit, and endless extensions.
    let long = stream(&[file(&vec![b'x'; MAX_PATH + 1], b"")]);
    assert_eq!(parse(&long, 4096), Err(ParseError::TooLarge("a name")));
    let mut huge = file(b"a", b"").0;
    huge.xattrs = vec![(CString::new("user.a").unwrap(), vec![0; 5 << 20])];
    let mut out = Vec::new();
    encode(&huge, 0, false, &mut out);
    assert!(matches!(parse(&out, 4096), Err(ParseError::TooLarge(_))));
    // A sparse map that overlaps, or goes beyond the file.
    for segments in [&[(0, 10), (5, 10)][..], &[(90, 20)], &[(u64::MAX, 1)]] {
        let mut entry = file(b"s", b"").0;
        entry.size = 100;
        let map = sparse_map(segments, 0);
        let data: u64 = segments.iter().map(|(_, length)| length).sum();
        let mut out = Vec::new();
        encode(&entry, map.len() as u64 + data, true, &mut out);
        out.extend_from_slice(&map);
        out.resize(out.len() + 512, 0);
        assert!(
            matches!(parse(&out, 512), Err(ParseError::Invalid(_))),
            "{segments:?}"
        );
    }
}

fn any_entry() -> impl Strategy<Value = (Entry, Vec<u8>)> {
    let path = proptest::collection::vec(1..=255_u8, 1..300);
    let content = proptest::collection::vec(any::<u8>(), 0..2000);
    let numbers = (
        any::<u32>(),
        any::<u32>(),
        any::<i64>(),
        0..1_000_000_000_u32,
    );
    let xattr = (
        "[a-z.]{1,20}",
        proptest::collection::vec(any::<u8>(), 0..100),
    );
    let xattrs = proptest::collection::vec(xattr, 0..3);
    (path, content, numbers, 0..0o10000_u32, xattrs).prop_map(
        |(mut path, content, (uid, gid, time, ns), mode, xattrs)| {
            if path.last() == Some(&b'/') {
                path.push(b'x');
            }
            let mut entry = Entry::new(path, Kind::Regular);
            entry.size = content.len() as u64;
            entry.mode = mode;
            (entry.uid, entry.gid) = (uid, gid);
            (entry.modified, entry.modified_ns) = (time / 2, ns);
            entry.xattrs = xattrs
                .into_iter()
                .map(|(name, value)| (CString::new(name).unwrap(), value))
                .collect();
            (entry, content)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_entries_survive_the_round_trip(entries in proptest::collection::vec(any_entry(), 0..5), step in 1..3000_usize) {
        let seen = parse(&stream(&entries), step).unwrap();
        prop_assert_eq!(seen.len(), entries.len());
        for ((found, data), (entry, content)) in seen.iter().zip(&entries) {
            prop_assert_eq!(found, entry);
            let joined: Vec<u8> = data.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
            prop_assert_eq!(&joined, content);
        }
    }

    #[test]
    fn flipped_bytes_never_panic(entries in proptest::collection::vec(any_entry(), 1..3), flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6), step in 1..3000_usize) {
        let mut bytes = stream(&entries);
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let _ = parse(&bytes, step);
    }
}
