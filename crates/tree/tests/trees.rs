//! Trees through streams and back, and streams that mean harm.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use belljar_tree::pack::{Options, Root, Sink, pack};
use belljar_tree::problems::Report;
use belljar_tree::tar::{END, Entry, Kind, encode, padding};
use belljar_tree::unpack::{Owner, Rules, UnpackError, Unpacker};
use proptest::prelude::*;

/// A stream in memory, whose room comes in odd sizes.
struct Memory {
    bytes: Vec<u8>,
    room: Vec<u8>,
}

impl Sink for Memory {
    type Error = Infallible;
    fn space(&mut self) -> &mut [u8] {
        &mut self.room
    }
    fn filled(&mut self, count: usize) -> Result<(), Infallible> {
        self.bytes.extend_from_slice(&self.room[..count]);
        Ok(())
    }
}

fn packed(path: &Path, name: &[u8]) -> (Vec<u8>, Report) {
    let mut sink = Memory {
        bytes: Vec::new(),
        room: vec![0; 1000],
    };
    let options = Options {
        name: name.to_vec(),
        xattrs: true,
    };
    let root = Root::Directory(fs::File::open(path).unwrap().into());
    let report = pack(root, &options, &mut sink).unwrap_or_else(|_| panic!());
    (sink.bytes, report)
}

const RULES: Rules = Rules {
    owner: Owner::Stream,
    mode_mask: 0o7777,
    xattrs: true,
    nodes: false,
    no_replace: false,
    new_root: true,
};

fn unpacked(stream: &[u8], to: &Path, rules: Rules, step: usize) -> Result<Report, UnpackError> {
    let root = fs::File::open(to).unwrap();
    let mut unpacker = Unpacker::new(root.into(), rules);
    for part in stream.chunks(step) {
        unpacker.feed(part)?;
    }
    unpacker.finish()
}

#[test]
fn a_tree_survives_the_journey() {
    let from = tempfile::tempdir().unwrap();
    let path = |name: &str| from.path().join(name);
    let deep = "long-name-of-a-directory/".repeat(100);
    fs::create_dir_all(path(&deep)).unwrap();
    fs::write(path(&deep).join("leaf"), b"leaf").unwrap();
    fs::write(path("plain"), vec![b'p'; 700_000]).unwrap();
    fs::set_permissions(path("plain"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(path("plain"), path("second")).unwrap();
    symlink("/nowhere/at/all", path("link")).unwrap();
    let odd = OsStr::from_bytes(b"odd \xff\n name");
    fs::write(from.path().join(odd), b"odd").unwrap();
    let sparse = fs::File::create(path("sparse")).unwrap();
    sparse.set_len(200 << 20).unwrap();
    sparse.write_all_at(b"one", 1 << 20).unwrap();
    sparse.write_all_at(b"two", 150 << 20).unwrap();
    fs::File::create(path("all-hole"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    fs::create_dir(path("closed")).unwrap();
    fs::write(path("closed/inside"), b"x").unwrap();
    rustix::fs::setxattr(
        path("plain"),
        "user.tag",
        b"v\0",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    fs::set_permissions(path("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    let old =
        fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(7, 9));
    fs::File::open(path("closed"))
        .unwrap()
        .set_times(old)
        .unwrap();
    fs::File::open(path("plain"))
        .unwrap()
        .set_times(old)
        .unwrap();

    let (stream, report) = packed(from.path(), b".");
    assert_eq!(report.problems.total, 0, "{:?}", report.problems);
    assert!(stream.len() < 3 << 20, "{}", stream.len());
    for step in [997, 1 << 20] {
        let to = tempfile::tempdir().unwrap();
        let at = |name: &str| to.path().join(name);
        let done = unpacked(&stream, to.path(), RULES, step).unwrap();
        assert_eq!(done.problems.total, 0, "{:?}", done.problems);
        assert_eq!(done.entries, report.entries);
        assert_eq!(fs::read(at(&deep).join("leaf")).unwrap(), b"leaf");
        let plain = fs::metadata(at("plain")).unwrap();
        assert_eq!((plain.mode() & 0o7777, plain.nlink()), (0o4751, 2));
        assert_eq!((plain.mtime(), plain.mtime_nsec()), (7, 9));
        assert_eq!(plain.ino(), fs::metadata(at("second")).unwrap().ino());
        assert_eq!(fs::read(at("plain")).unwrap(), vec![b'p'; 700_000]);
        assert_eq!(
            fs::read_link(at("link")).unwrap(),
            Path::new("/nowhere/at/all")
        );
        assert_eq!(fs::read(to.path().join(odd)).unwrap(), b"odd");
        let sparse = fs::File::open(at("sparse")).unwrap();
        let info = sparse.metadata().unwrap();
        assert_eq!(info.len(), 200 << 20);
        assert!(info.blocks() < 2000, "{}", info.blocks());
        for (text, offset) in [(b"one", 1 << 20), (b"two", 150 << 20)] {
            let mut found = [0; 3];
            sparse.read_exact_at(&mut found, offset).unwrap();
            assert_eq!(&found, text);
        }
        let hole = fs::metadata(at("all-hole")).unwrap();
        assert_eq!((hole.len(), hole.blocks()), (1 << 30, 0));
        let closed = fs::metadata(at("closed")).unwrap();
        assert_eq!((closed.mode() & 0o7777, closed.mtime()), (0o555, 7));
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(at("plain"), "user.tag", &mut value).unwrap();
        assert_eq!(&value[..length], b"v\0");
        fs::set_permissions(at("closed"), fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(path("closed"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn gnu_tar_unpacks_it_too() {
    let from = tempfile::tempdir().unwrap();
    let sparse = fs::File::create(from.path().join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(b"x", 1 << 20).unwrap();
    fs::write(from.path().join("file"), b"content").unwrap();
    let (stream, _) = packed(from.path(), b"top");
    let to = tempfile::tempdir().unwrap();
    let archive = to.path().join("a.tar");
    fs::write(&archive, stream).unwrap();
    let status = std::process::Command::new("tar")
        .arg("-C")
        .arg(to.path())
        .arg("-xf")
        .arg(&archive)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read(to.path().join("top/file")).unwrap(), b"content");
    let content = fs::read(to.path().join("top/sparse")).unwrap();
    assert_eq!((content.len(), content[1 << 20]), (3 << 20, b'x'));
}

/// A stream that was written by hand.
#[derive(Default)]
struct Stream(Vec<u8>);

impl Stream {
    fn add(mut self, path: &str, kind: Kind, link: &str, content: &[u8]) -> Self {
        let mut entry = Entry::new(path.as_bytes().to_vec(), kind);
        entry.mode = 0o6777;
        entry.size = content.len() as u64;
        entry.link = link.as_bytes().to_vec();
        encode(&entry, entry.size, false, &mut self.0);
        self.0.extend_from_slice(content);
        self.0
            .resize(self.0.len() + padding(content.len() as u64), 0);
        self
    }

    fn file(self, path: &str) -> Self {
        self.add(path, Kind::Regular, "", b"evil")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&END);
        self.0
    }
}

/// The root lies beside something precious, which must stay as it is.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("root")).unwrap();
        fs::create_dir(folder.path().join("precious")).unwrap();
        fs::write(folder.path().join("precious/file"), b"precious").unwrap();
        Self { folder }
    }

    fn root(&self) -> std::path::PathBuf {
        self.folder.path().join("root")
    }

    fn precious(&self) -> String {
        self.folder
            .path()
            .join("precious")
            .into_os_string()
            .into_string()
            .unwrap()
    }

    fn unpack(&self, stream: Stream) -> Result<Report, UnpackError> {
        let result = unpacked(&stream.end(), &self.root(), RULES, 100);
        self.check();
        result
    }

    fn check(&self) {
        let outside: Vec<_> = fs::read_dir(self.folder.path()).unwrap().collect();
        assert_eq!(outside.len(), 2);
        let inside: Vec<_> = fs::read_dir(self.folder.path().join("precious"))
            .unwrap()
            .collect();
        assert_eq!(inside.len(), 1);
        let file = self.folder.path().join("precious/file");
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        assert_eq!(fs::metadata(&file).unwrap().nlink(), 1);
    }
}

#[test]
fn nothing_leads_out_of_the_tree() {
    let place = Place::new();
    for path in ["../precious/file", "a/../../precious/file", "..", "a/.."] {
        let refused = place.unpack(Stream::default().file(path));
        assert!(
            matches!(refused, Err(UnpackError::Name { .. })),
            "{path}: {refused:?}"
        );
    }
    // An absolute path is one below the root.
    place
        .unpack(Stream::default().file(&format!("{}/file", place.precious())))
        .unwrap();
    // Through a symlink that the stream made, with what is written to, made in, linked or replaced.
    let link = || Stream::default().add("out", Kind::Symlink, &place.precious(), b"");
    for stream in [
        link().file("out/file"),
        link().file("out/new"),
        link().add("out/new", Kind::Directory, "", b""),
        link().add("out", Kind::Directory, "", b"").file("out/new"),
        link().add("out/new", Kind::Symlink, "x", b""),
        link().add("mine", Kind::HardLink, "out/file", b""),
        link().add("mine", Kind::HardLink, "../precious/file", b""),
        link().add("out/new", Kind::Fifo, "", b""),
        Stream::default()
            .add("up", Kind::Symlink, "..", b"")
            .file("up/precious/file"),
    ] {
        place
            .unpack(stream)
            .map(|report| assert!(report.problems.total > 0))
            .unwrap_or_default();
    }
    // A file in the place of a symlink replaces the link.
    let file = format!("{}/file", place.precious());
    let stream = Stream::default()
        .add("direct", Kind::Symlink, &file, b"")
        .file("direct");
    place.unpack(stream).unwrap();
    assert_eq!(fs::read(place.root().join("direct")).unwrap(), b"evil");
    // A hard link to a symlink is one to the link itself.
    let stream = Stream::default()
        .add("s", Kind::Symlink, &file, b"")
        .add("h", Kind::HardLink, "s", b"")
        .file("h");
    place.unpack(stream).unwrap();
}

#[test]
fn what_was_there_leads_nowhere_either() {
    let place = Place::new();
    symlink(place.precious(), place.root().join("old")).unwrap();
    let refused = place.unpack(Stream::default().file("old/file"));
    assert!(matches!(refused, Err(UnpackError::Tree(_))), "{refused:?}");
    fs::hard_link(
        place.root().join("../precious/file"),
        place.root().join("linked"),
    )
    .unwrap();
    let stream = Stream::default().file("linked").end();
    unpacked(&stream, &place.root(), RULES, 512).unwrap();
    place.check();
    // A directory is not thrown away for a file.
    fs::create_dir(place.root().join("kept")).unwrap();
    assert!(place.unpack(Stream::default().file("kept")).is_err());
    let rules = Rules {
        no_replace: true,
        ..RULES
    };
    let stream = Stream::default().file("linked").end();
    assert!(unpacked(&stream, &place.root(), rules, 512).is_err());
}

#[test]
fn a_host_takes_no_powers_from_a_guest() {
    let place = Place::new();
    let rules = Rules {
        owner: Owner::Unpacker,
        mode_mask: 0o777,
        xattrs: false,
        ..RULES
    };
    let mut entry = Entry::new(b"attr".to_vec(), Kind::Regular);
    entry.xattrs = vec![(CString::new("user.x").unwrap(), b"1".to_vec())];
    let mut stream = Stream::default();
    encode(&entry, 0, false, &mut stream.0);
    let stream = stream
        .file("suid")
        .add("dir", Kind::Directory, "", b"")
        .add("null", Kind::CharacterDevice, "", b"")
        .add("fifo", Kind::Fifo, "", b"")
        .end();
    let report = unpacked(&stream, &place.root(), rules, 512).unwrap();
    assert_eq!(report.problems.total, 2);
    for name in ["suid", "dir"] {
        let mode = fs::metadata(place.root().join(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o777, "{name}");
    }
    assert!(!place.root().join("null").exists() && !place.root().join("fifo").exists());
    assert_eq!(
        rustix::fs::listxattr(place.root().join("attr"), &mut [0; 100]).unwrap(),
        0
    );
}

#[test]
fn half_a_stream_is_told() {
    let place = Place::new();
    let stream = Stream::default().file("a").end();
    for cut in [1, 511, 512, 514, 1000] {
        let result = unpacked(&stream[..cut], &place.root(), RULES, 64);
        assert!(
            matches!(result, Err(UnpackError::Parse(_))),
            "{cut}: {result:?}"
        );
    }
    unpacked(&stream[..1024], &place.root(), RULES, 64).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn no_mixture_of_entries_gets_out(
        entries in proptest::collection::vec((0..4_usize, 0..6_usize, 0..8_usize), 1..12),
    ) {
        let place = Place::new();
        let outside = place.precious();
        let paths = ["a", "a/b", "b", "b/file", "a/b/file", "./a/./file"];
        let links = [".", "..", "../precious", outside.as_str(), "a", "../precious/file", "b", "a/b"];
        let kinds = [Kind::Regular, Kind::Directory, Kind::Symlink, Kind::HardLink];
        let stream = entries.into_iter().fold(Stream::default(), |stream, (kind, path, link)| {
            let content: &[u8] = if kind == 0 { b"evil" } else { b"" };
            stream.add(paths[path], kinds[kind], links[link], content)
        });
        // Whether it is refused does not matter.
        let _ = place.unpack(stream);
    }
}
