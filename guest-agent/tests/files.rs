//! File calls as the host sees them, on a folder of this machine.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, files};
use belljar_protocol::transfer::Piece;
use belljar_protocol::v1::{self, FileType, write_file::Mode};

use common::{Agent, PATIENCE, soon};

const ENOENT: u32 = 2;
const EACCES: u32 = 13;
const EEXIST: u32 = 17;
const ENOTDIR: u32 = 20;
const EISDIR: u32 = 21;
const EINVAL: u32 = 22;
const ENAMETOOLONG: u32 = 36;
const ENOTEMPTY: u32 = 39;
const ELOOP: u32 = 40;

struct World {
    agent: Agent,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Other users may pass.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            agent: Agent::start_worker(),
            folder,
        }
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self, name: impl AsRef<Path>) -> Vec<u8> {
        self.path(name).into_os_string().into_vec()
    }

    fn stat(&self, name: &str) -> Result<v1::FileInfo, CallError> {
        let call = v1::Stat {
            path: self.bytes(name),
            ..v1::Stat::default()
        };
        files::stat(self.agent.connect(), call, soon())
    }

    fn read(&self, call: v1::ReadFile) -> Result<(Vec<u8>, Vec<u64>), CallError> {
        let (_, download) = files::read_file(self.agent.connect(), call, soon())?;
        let (mut content, mut holes) = (Vec::new(), Vec::new());
        download.run(Some(PATIENCE), |piece| {
            match piece {
                Piece::Data(data) => content.extend_from_slice(data),
                Piece::Hole(length) => {
                    holes.push(length);
                    content.resize(content.len() + length as usize, 0);
                }
                other => panic!("{other:?}"),
            }
            Ok::<(), CallError>(())
        })?;
        Ok((content, holes))
    }

    fn content(&self, name: &str) -> Vec<u8> {
        let call = v1::ReadFile {
            path: self.bytes(name),
            ..v1::ReadFile::default()
        };
        self.read(call).unwrap().0
    }

    fn write(&self, call: v1::WriteFile, data: &[u8]) -> Result<v1::WriteDone, CallError> {
        let mut upload = files::write_file(self.agent.connect(), call, Some(PATIENCE))?;
        upload.put(data)?;
        upload.finish()
    }

    fn writing(&self, name: &str, mode: Mode) -> v1::WriteFile {
        v1::WriteFile {
            path: self.bytes(name),
            mode: mode.into(),
            ..v1::WriteFile::default()
        }
    }

    fn list(
        &self,
        call: v1::ListDirectory,
    ) -> Result<(Vec<v1::DirectoryEntry>, Vec<u8>), CallError> {
        let mut entries = Vec::new();
        let cursor = files::list_directory(self.agent.connect(), call, Some(PATIENCE), |entry| {
            entries.push(entry);
            Ok::<(), CallError>(())
        })?;
        Ok((entries, cursor))
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, CallError>) -> u32 {
    match result {
        Err(CallError::Refused { errno, message, .. }) => {
            assert!(!message.is_empty());
            errno
        }
        other => panic!("{other:?}"),
    }
}

fn invalid<T: std::fmt::Debug>(result: Result<T, CallError>) -> String {
    match result {
        Err(CallError::Refused {
            code: v1::error::Code::Invalid,
            message,
            ..
        }) => message,
        other => panic!("{other:?}"),
    }
}

/// Tests of other users' rights need to be root.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Nobody with this number owns anything here.
const STRANGER: &str = "54321:54321";

#[test]
fn stat_tells_files_links_and_what_is_missing() {
    let world = World::new();
    fs::write(world.path("file"), b"hello").unwrap();
    fs::set_permissions(world.path("file"), fs::Permissions::from_mode(0o4750)).unwrap();
    symlink("file", world.path("link")).unwrap();
    let info = world.stat("file").unwrap();
    let truth = fs::metadata(world.path("file")).unwrap();
    assert_eq!(info.r#type(), FileType::Regular);
    assert_eq!((info.mode, info.size), (0o4750, 5));
    assert_eq!((info.inode, info.device), (truth.ino(), truth.dev()));
    assert_eq!((info.uid, info.gid), (truth.uid(), truth.gid()));
    let modified = truth.mtime() * 1_000_000_000 + truth.mtime_nsec();
    assert_eq!(info.modified_ns, modified);
    if is_root() {
        assert_eq!(info.user_name, "root");
    }
    let link = world.stat("link").unwrap();
    assert_eq!(
        (link.r#type(), link.target),
        (FileType::Symlink, b"file".to_vec())
    );
    let followed = v1::Stat {
        path: world.bytes("link"),
        follow: true,
        ..v1::Stat::default()
    };
    let followed = files::stat(world.agent.connect(), followed, soon()).unwrap();
    assert_eq!(followed.inode, truth.ino());
    assert_eq!(errno(world.stat("nothing")), ENOENT);
    assert_eq!(errno(world.stat("file/below")), ENOTDIR);
    let long = v1::Stat {
        path: vec![b'x'; 5000],
        ..v1::Stat::default()
    };
    assert_eq!(
        errno(files::stat(world.agent.connect(), long, soon())),
        ENAMETOOLONG
    );
    symlink("loop", world.path("loop")).unwrap();
    let looping = v1::Stat {
        path: world.bytes("loop"),
        follow: true,
        ..v1::Stat::default()
    };
    assert_eq!(
        errno(files::stat(world.agent.connect(), looping, soon())),
        ELOOP
    );
    invalid(files::stat(
        world.agent.connect(),
        v1::Stat::default(),
        soon(),
    ));
}

#[test]
fn ranges_and_holes_are_read_as_asked() {
    let world = World::new();
    let content: Vec<u8> = (0..600_000_u32).map(|at| (at % 251) as u8).collect();
    fs::write(world.path("file"), &content).unwrap();
    assert_eq!(world.content("file"), content);
    let part = v1::ReadFile {
        path: world.bytes("file"),
        offset: 1000,
        length: Some(300_000),
        ..v1::ReadFile::default()
    };
    assert_eq!(world.read(part).unwrap().0, content[1000..301_000]);
    let beyond = v1::ReadFile {
        path: world.bytes("file"),
        offset: 10_000_000,
        ..v1::ReadFile::default()
    };
    assert_eq!(world.read(beyond).unwrap().0, b"");

    let file = fs::File::create(world.path("sparse")).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(b"middle", 32 << 20).unwrap();
    let sparse = v1::ReadFile {
        path: world.bytes("sparse"),
        sparse: true,
        ..v1::ReadFile::default()
    };
    let (content, holes) = world.read(sparse).unwrap();
    assert_eq!(content.len(), 64 << 20);
    assert_eq!(&content[32 << 20..(32 << 20) + 6], b"middle");
    assert!(holes.iter().sum::<u64>() > 60 << 20, "{holes:?}");
    // What has no size is read to its end.
    let kernel = v1::ReadFile {
        path: b"/proc/self/status".to_vec(),
        ..v1::ReadFile::default()
    };
    assert!(world.read(kernel).unwrap().0.starts_with(b"Name:"));
}

#[test]
fn what_is_no_regular_file_is_refused_and_blocks_nobody() {
    let world = World::new();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        world.path("fifo"),
        rustix::fs::FileType::Fifo,
        0o666.into(),
        0,
    )
    .unwrap();
    fs::create_dir(world.path("folder")).unwrap();
    symlink("folder", world.path("link")).unwrap();
    let start = Instant::now();
    let read = |path: Vec<u8>| {
        world.read(v1::ReadFile {
            path,
            ..v1::ReadFile::default()
        })
    };
    assert!(invalid(read(world.bytes("fifo"))).contains("FIFO"));
    assert!(invalid(read(b"/dev/zero".to_vec())).contains("device"));
    assert_eq!(errno(read(world.bytes("folder"))), EISDIR);
    let no_follow = v1::ReadFile {
        path: world.bytes("link"),
        no_follow: true,
        ..v1::ReadFile::default()
    };
    assert_eq!(errno(world.read(no_follow)), ELOOP);
    for mode in [Mode::Truncate, Mode::Append, Mode::AtOffset] {
        assert!(invalid(world.write(world.writing("fifo", mode), b"x")).contains("FIFO"));
        assert_eq!(
            errno(world.write(world.writing("folder", mode), b"x")),
            EISDIR
        );
    }
    assert_eq!(
        errno(world.write(world.writing("folder", Mode::Replace), b"x")),
        EISDIR
    );
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn every_way_of_writing() {
    let world = World::new();
    let done = world
        .write(world.writing("file", Mode::Truncate), b"first content")
        .unwrap();
    assert_eq!(done.bytes, 13);
    assert_eq!(world.content("file"), b"first content");
    assert_eq!(world.stat("file").unwrap().mode, 0o644);
    world
        .write(world.writing("file", Mode::Truncate), b"second")
        .unwrap();
    assert_eq!(world.content("file"), b"second");
    let at = v1::WriteFile {
        offset: 3,
        ..world.writing("file", Mode::AtOffset)
    };
    world.write(at, b"XY").unwrap();
    assert_eq!(world.content("file"), b"secXYd");
    world
        .write(world.writing("file", Mode::Append), b"+")
        .unwrap();
    assert_eq!(world.content("file"), b"secXYd+");
    assert_eq!(
        errno(world.write(world.writing("file", Mode::New), b"x")),
        EEXIST
    );
    let new = v1::WriteFile {
        permissions: Some(0o600),
        modified_ns: Some(-1_500_000_000),
        parents: true,
        ..world.writing("a/b/new", Mode::New)
    };
    world.write(new, &vec![7; 1_000_000]).unwrap();
    assert_eq!(world.content("a/b/new"), vec![7; 1_000_000]);
    let info = world.stat("a/b/new").unwrap();
    assert_eq!((info.mode, info.modified_ns), (0o600, -1_500_000_000));
    // An old file keeps its mode unless asked.
    let kept = v1::WriteFile {
        permissions: Some(0o777),
        ..world.writing("a/b/new", Mode::Truncate)
    };
    world.write(kept, b"").unwrap();
    assert_eq!(world.stat("a/b/new").unwrap().mode, 0o600);
    let set = v1::WriteFile {
        permissions: Some(0o751),
        set_permissions: true,
        ..world.writing("a/b/new", Mode::Truncate)
    };
    world.write(set, b"").unwrap();
    assert_eq!(world.stat("a/b/new").unwrap().mode, 0o751);
    assert_eq!(
        errno(world.write(world.writing("no/where", Mode::Truncate), b"")),
        ENOENT
    );
}

#[test]
fn nothing_of_longer_content_is_left() {
    let world = World::new();
    let old = vec![b'o'; 300_000];
    fs::write(world.path("file"), &old).unwrap();
    world
        .write(world.writing("file", Mode::Truncate), b"new")
        .unwrap();
    assert_eq!(world.content("file"), b"new");

    // A hole is zeros, whatever was there.
    fs::write(world.path("file"), &old).unwrap();
    let call = world.writing("file", Mode::Truncate);
    let mut upload = files::write_file(world.agent.connect(), call, Some(PATIENCE)).unwrap();
    upload.put(b"new").unwrap();
    upload.hole(100_000).unwrap();
    upload.finish().unwrap();
    let mut expected = b"new".to_vec();
    expected.resize(100_003, 0);
    assert!(world.content("file") == expected);

    // Cut off in the middle: a beginning of the new content and nothing else.
    fs::write(world.path("file"), &old).unwrap();
    let call = world.writing("file", Mode::Truncate);
    let mut upload = files::write_file(world.agent.connect(), call, Some(PATIENCE)).unwrap();
    upload.put(b"new").unwrap();
    upload.flush().unwrap();
    drop(upload);
    let late = Instant::now() + PATIENCE;
    while world.path("file").metadata().unwrap().len() > 3 {
        assert!(Instant::now() < late, "the old content is still there");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(b"new".starts_with(&fs::read(world.path("file")).unwrap()));
}

#[test]
fn replacing_is_all_or_nothing() {
    let world = World::new();
    fs::write(world.path("file"), b"old").unwrap();
    fs::set_permissions(world.path("file"), fs::Permissions::from_mode(0o640)).unwrap();
    let inode = world.stat("file").unwrap().inode;
    // The host hangs up, or gives up, half-way.
    for polite in [true, false] {
        for mode in [Mode::Replace, Mode::New] {
            let name = if mode == Mode::New { "new" } else { "file" };
            let call = world.writing(name, mode);
            let mut upload =
                files::write_file(world.agent.connect(), call, Some(PATIENCE)).unwrap();
            upload.put(&vec![1; 2_000_000]).unwrap();
            if polite {
                upload.abort(v1::Error::default()).unwrap();
            }
        }
    }
    common::wait_until("the agent has noticed", || {
        fs::read_dir(world.folder.path()).unwrap().count() == 1
    });
    assert_eq!(fs::read(world.path("file")).unwrap(), b"old");
    world
        .write(world.writing("file", Mode::Replace), b"new")
        .unwrap();
    assert_eq!(fs::read(world.path("file")).unwrap(), b"new");
    let info = world.stat("file").unwrap();
    assert_ne!(info.inode, inode);
    assert_eq!(info.mode, 0o640);
    // A symlink is replaced, what it points to stays.
    symlink("file", world.path("link")).unwrap();
    world
        .write(world.writing("link", Mode::Replace), b"mine")
        .unwrap();
    assert_eq!(world.stat("link").unwrap().r#type(), FileType::Regular);
    assert_eq!(fs::read(world.path("file")).unwrap(), b"new");
    assert_eq!(fs::read_dir(world.folder.path()).unwrap().count(), 2);
}

#[test]
fn holes_are_written_as_holes() {
    let world = World::new();
    let mut upload = files::write_file(
        world.agent.connect(),
        world.writing("sparse", Mode::Truncate),
        Some(PATIENCE),
    )
    .unwrap();
    upload.hole(1 << 30).unwrap();
    upload.put(b"end").unwrap();
    upload.hole(1 << 20).unwrap();
    let done = upload.finish().unwrap();
    let size = (1 << 30) + 3 + (1 << 20);
    assert_eq!(done.bytes, size);
    let info = world.stat("sparse").unwrap();
    assert_eq!(info.size, size);
    assert!(info.allocated < 1 << 20, "{}", info.allocated);
    // In a file that is there a hole makes zeros, and leaves what follows.
    fs::write(world.path("full"), vec![9; 300_000]).unwrap();
    let call = v1::WriteFile {
        offset: 1000,
        ..world.writing("full", Mode::AtOffset)
    };
    let mut upload = files::write_file(world.agent.connect(), call, Some(PATIENCE)).unwrap();
    upload.hole(100_000).unwrap();
    upload.finish().unwrap();
    let content = fs::read(world.path("full")).unwrap();
    assert_eq!(content.len(), 300_000);
    assert!(content[1000..101_000].iter().all(|&byte| byte == 0));
    assert!(
        content[..1000]
            .iter()
            .chain(&content[101_000..])
            .all(|&byte| byte == 9)
    );
    // Appended, and absurdly long.
    let call = world.writing("full", Mode::Append);
    let mut upload = files::write_file(world.agent.connect(), call, Some(PATIENCE)).unwrap();
    upload.hole(10).unwrap();
    upload.put(b"x").unwrap();
    upload.finish().unwrap();
    assert_eq!(fs::metadata(world.path("full")).unwrap().len(), 300_011);
    let call = world.writing("full", Mode::Truncate);
    let mut upload = files::write_file(world.agent.connect(), call, Some(PATIENCE)).unwrap();
    upload.hole(u64::MAX).unwrap();
    assert_eq!(errno(upload.finish()), 27);
}

#[test]
fn listings_are_whole_paged_and_detailed() {
    let world = World::new();
    let names: Vec<String> = (0..3000)
        .map(|at| format!("entry-{at:05}-{}", "x".repeat(at % 200)))
        .collect();
    fs::create_dir(world.path("many")).unwrap();
    for name in &names {
        fs::write(world.path("many").join(name), b"").unwrap();
    }
    let odd = OsStr::from_bytes(b"entry-\xff\xfe\n");
    fs::write(world.path("many").join(odd), b"12").unwrap();
    let call = v1::ListDirectory {
        path: world.bytes("many"),
        ..v1::ListDirectory::default()
    };
    let (entries, cursor) = world.list(call.clone()).unwrap();
    assert!(cursor.is_empty());
    assert_eq!(entries.len(), 3001);
    assert!(
        entries
            .iter()
            .all(|entry| entry.r#type() == FileType::Regular && entry.info.is_none())
    );
    let mut listed: Vec<Vec<u8>> = entries.into_iter().map(|entry| entry.name).collect();
    listed.sort();
    let mut paged = Vec::new();
    let mut call = v1::ListDirectory {
        limit: 700,
        details: true,
        ..call
    };
    loop {
        let (entries, cursor) = world.list(call.clone()).unwrap();
        assert!(entries.len() <= 700);
        for entry in entries {
            let info = entry.info.unwrap();
            let size = if entry.name.ends_with(b"\n") { 2 } else { 0 };
            assert_eq!(info.size, size);
            paged.push(entry.name);
        }
        if cursor.is_empty() {
            break;
        }
        call.cursor = cursor;
    }
    assert_eq!(paged, listed);
    let file = v1::ListDirectory {
        path: world.bytes("many/entry-00000-"),
        ..v1::ListDirectory::default()
    };
    assert_eq!(errno(world.list(file)), ENOTDIR);
}

#[test]
fn names_are_made_changed_and_removed() {
    let world = World::new();
    let directory = |name: &str, parents| v1::MakeDirectory {
        path: world.bytes(name),
        parents,
        ..v1::MakeDirectory::default()
    };
    let make = |call| files::make_directory(world.agent.connect(), call, soon());
    assert_eq!(errno(make(directory("a/b", false))), ENOENT);
    make(directory("a/b", true)).unwrap();
    make(directory("a/b", true)).unwrap();
    assert_eq!(errno(make(directory("a", false))), EEXIST);
    make(v1::MakeDirectory {
        permissions: Some(0o2770),
        ..directory("a/c", false)
    })
    .unwrap();
    assert_eq!(world.stat("a/c").unwrap().mode, 0o2770);

    let rename = |from: &str, to: &str, no_replace, exchange| {
        let call = v1::Rename {
            from: world.bytes(from),
            to: world.bytes(to),
            no_replace,
            exchange,
            ..v1::Rename::default()
        };
        files::rename(world.agent.connect(), call, soon())
    };
    fs::write(world.path("one"), b"1").unwrap();
    fs::write(world.path("two"), b"2").unwrap();
    assert_eq!(errno(rename("one", "two", true, false)), EEXIST);
    rename("one", "two", false, true).unwrap();
    assert_eq!(fs::read(world.path("one")).unwrap(), b"2");
    rename("one", "two", false, false).unwrap();
    assert_eq!(errno(world.stat("one")), ENOENT);
    assert_eq!(errno(rename("one", "x", false, false)), ENOENT);

    let link = |path: &str, target: &[u8], hard| {
        let call = v1::MakeLink {
            path: world.bytes(path),
            target: target.to_vec(),
            hard,
            ..v1::MakeLink::default()
        };
        files::make_link(world.agent.connect(), call, soon())
    };
    link("soft", b"anything\xff", false).unwrap();
    assert_eq!(world.stat("soft").unwrap().target, b"anything\xff");
    link("hard", &world.bytes("two"), true).unwrap();
    assert_eq!(world.stat("hard").unwrap().links, 2);
    assert_eq!(errno(link("hard", &world.bytes("two"), true)), EEXIST);

    let remove = |name: &str, recursive, missing_ok| {
        let call = v1::Remove {
            path: world.bytes(name),
            recursive,
            missing_ok,
            ..v1::Remove::default()
        };
        files::remove(world.agent.connect(), call, soon())
    };
    assert_eq!(errno(remove("a", false, false)), ENOTEMPTY);
    assert_eq!(errno(remove("none", false, false)), ENOENT);
    assert_eq!(errno(remove("none", true, false)), ENOENT);
    remove("none", true, true).unwrap();
    // What a symlink in the tree points to stays.
    fs::create_dir(world.path("outside")).unwrap();
    fs::write(world.path("outside/kept"), b"").unwrap();
    symlink(world.path("outside"), world.path("a/b/out")).unwrap();
    remove("a", true, false).unwrap();
    assert!(world.path("outside/kept").exists());
    symlink(world.path("outside"), world.path("out")).unwrap();
    remove("out", true, false).unwrap();
    assert!(world.path("outside/kept").exists());
    remove("outside/kept", false, false).unwrap();
    remove("outside", false, false).unwrap();
    let root = v1::Remove {
        path: b"/".to_vec(),
        recursive: true,
        ..v1::Remove::default()
    };
    invalid(files::remove(world.agent.connect(), root, soon()));
}

#[test]
fn a_tree_of_any_depth_is_changed_copied_and_removed() {
    let world = World::new();
    // Deeper than any path can say.
    let depth = 2500;
    fs::create_dir(world.path("deep")).unwrap();
    let root = fs::File::open(world.path("deep")).unwrap();
    let mut dirs = belljar_tree::dirs::Dirs::new(root.into());
    for _ in 0..depth {
        rustix::fs::mkdirat(dirs.here(), c"d", 0o755.into()).unwrap();
        dirs.enter(c"d", true).unwrap();
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    drop(rustix::fs::openat(dirs.here(), c"bottom", flags, 0o644.into()).unwrap());
    let change = v1::Change {
        path: world.bytes("deep"),
        permissions: Some(0o700),
        modified_ns: Some(1_000_000_007),
        recursive: true,
        ..v1::Change::default()
    };
    files::change(world.agent.connect(), change, soon()).unwrap();
    let bottom = rustix::fs::statat(dirs.here(), c"bottom", rustix::fs::AtFlags::empty()).unwrap();
    assert_eq!((bottom.st_mode & 0o7777, bottom.st_mtime), (0o700, 1));
    let copy = v1::CopyPath {
        from: world.bytes("deep"),
        to: world.bytes("copy"),
        recursive: true,
        ..v1::CopyPath::default()
    };
    files::copy(world.agent.connect(), copy, soon()).unwrap();
    let root = fs::File::open(world.path("copy")).unwrap();
    let mut dirs = belljar_tree::dirs::Dirs::new(root.into());
    for _ in 0..depth {
        dirs.enter(c"d", true).unwrap();
    }
    let bottom = rustix::fs::statat(dirs.here(), c"bottom", rustix::fs::AtFlags::empty()).unwrap();
    assert_eq!((bottom.st_mode & 0o7777, bottom.st_mtime), (0o700, 1));
    for name in ["deep", "copy"] {
        let remove = v1::Remove {
            path: world.bytes(name),
            recursive: true,
            ..v1::Remove::default()
        };
        files::remove(world.agent.connect(), remove, soon()).unwrap();
        assert!(!world.path(name).exists());
    }
}

#[test]
fn copies_keep_holes_modes_times_and_links() {
    let world = World::new();
    fs::create_dir_all(world.path("from/sub")).unwrap();
    let file = fs::File::create(world.path("from/sub/sparse")).unwrap();
    file.set_len(100 << 20).unwrap();
    file.write_all_at(b"data", 50 << 20).unwrap();
    drop(file);
    fs::set_permissions(
        world.path("from/sub/sparse"),
        fs::Permissions::from_mode(0o604),
    )
    .unwrap();
    symlink("sub/sparse", world.path("from/link")).unwrap();
    let copy = |from: &str, to: &str, recursive| {
        let call = v1::CopyPath {
            from: world.bytes(from),
            to: world.bytes(to),
            recursive,
            ..v1::CopyPath::default()
        };
        files::copy(world.agent.connect(), call, soon())
    };
    assert_eq!(errno(copy("from", "to", false)), EISDIR);
    copy("from", "to", true).unwrap();
    let (old, new) = (
        world.stat("from/sub/sparse").unwrap(),
        world.stat("to/sub/sparse").unwrap(),
    );
    assert_eq!(
        (new.size, new.mode, new.modified_ns),
        (old.size, 0o604, old.modified_ns)
    );
    assert!(new.allocated < 1 << 20);
    let mut found = [0; 4];
    let file = fs::File::open(world.path("to/sub/sparse")).unwrap();
    file.read_exact_at(&mut found, 50 << 20).unwrap();
    assert_eq!(&found, b"data");
    assert_eq!(
        fs::read_link(world.path("to/link")).unwrap(),
        Path::new("sub/sparse")
    );
    let (old, new) = (
        world.stat("from/sub").unwrap(),
        world.stat("to/sub").unwrap(),
    );
    assert_eq!(old.modified_ns, new.modified_ns);
    // Into itself.
    assert_eq!(errno(copy("from", "from/sub/again", true)), EINVAL);
    assert_eq!(
        errno(copy("from/sub/sparse", "from/sub/sparse", false)),
        EINVAL
    );
    assert_eq!(world.stat("from/sub/sparse").unwrap().size, 100 << 20);
}

#[test]
fn attributes_and_file_systems_are_told() {
    let world = World::new();
    fs::write(world.path("file"), b"x").unwrap();
    let xattr = |name: &[u8], value: &[u8]| v1::Xattr {
        name: name.to_vec(),
        value: value.to_vec(),
    };
    let call = |set, remove| v1::Xattrs {
        path: world.bytes("file"),
        set,
        remove,
        ..v1::Xattrs::default()
    };
    let ask = |call| files::xattrs(world.agent.connect(), call, soon());
    let list = ask(call(
        vec![xattr(b"user.one", b"1\0\xff"), xattr(b"user.two", b"")],
        vec![],
    ))
    .unwrap();
    assert_eq!(
        list.xattrs,
        [xattr(b"user.one", b"1\0\xff"), xattr(b"user.two", b"")]
    );
    let list = ask(call(vec![], vec![b"user.one".to_vec()])).unwrap();
    assert_eq!(list.xattrs, [xattr(b"user.two", b"")]);
    assert_eq!(errno(ask(call(vec![], vec![b"user.one".to_vec()]))), 61);
    assert_eq!(errno(ask(call(vec![xattr(b"nonsense", b"")], vec![]))), 95);
    let call = v1::StatFs {
        path: world.bytes("."),
        ..v1::StatFs::default()
    };
    let found = files::stat_fs(world.agent.connect(), call, soon()).unwrap();
    assert!(found.total > 0 && found.free <= found.total && found.available <= found.free);
    assert!(!found.r#type.is_empty());
}

#[test]
fn another_users_rights_are_those_of_the_call_alone() {
    if !is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let world = World::new();
    fs::write(world.path("secret"), b"x").unwrap();
    fs::set_permissions(world.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    let read = |user: &str| {
        world.read(v1::ReadFile {
            path: world.bytes("secret"),
            user: user.to_owned(),
            ..v1::ReadFile::default()
        })
    };
    assert_eq!(errno(read(STRANGER)), EACCES);
    let write = |user: &str, name: &str| {
        let call = v1::WriteFile {
            user: user.to_owned(),
            ..world.writing(name, Mode::Truncate)
        };
        world.write(call, b"y")
    };
    assert_eq!(errno(write(STRANGER, "secret")), EACCES);
    assert_eq!(errno(write(STRANGER, "new")), EACCES);
    fs::create_dir(world.path("theirs")).unwrap();
    std::os::unix::fs::chown(world.path("theirs"), Some(54321), Some(54321)).unwrap();
    write(STRANGER, "theirs/new").unwrap();
    let info = world.stat("theirs/new").unwrap();
    assert_eq!((info.uid, info.gid), (54321, 54321));
    // Root's powers that have nothing to do with the owner are gone, too.
    let trusted = v1::Xattrs {
        path: world.bytes("theirs/new"),
        user: STRANGER.to_owned(),
        set: vec![v1::Xattr {
            name: b"trusted.mine".to_vec(),
            value: b"1".to_vec(),
        }],
        ..v1::Xattrs::default()
    };
    assert_eq!(
        errno(files::xattrs(world.agent.connect(), trusted, soon())),
        1
    );
    let give = v1::Change {
        path: world.bytes("theirs/new"),
        user: STRANGER.to_owned(),
        owner: "0".to_owned(),
        ..v1::Change::default()
    };
    assert_eq!(errno(files::change(world.agent.connect(), give, soon())), 1);
    // Not through what the agent itself has open.
    let magic = v1::Stat {
        path: b"/proc/self/fd/0".to_vec(),
        ..v1::Stat::default()
    };
    files::stat(world.agent.connect(), magic, soon()).unwrap();
    let magic = world.read(v1::ReadFile {
        path: b"/proc/self/root/etc/passwd".to_vec(),
        user: STRANGER.to_owned(),
        ..v1::ReadFile::default()
    });
    assert_eq!(errno(magic), ELOOP);
    // The agent's threads are themselves again.
    for _ in 0..20 {
        assert_eq!(errno(read(STRANGER)), EACCES);
        assert_eq!(read("").unwrap().0, b"x");
        assert_eq!(read("root").unwrap().0, b"x");
    }
    assert!(invalid(read("no-such-user")).contains("no-such-user"));
    let owned = v1::WriteFile {
        owner: "54321:12345".to_owned(),
        ..world.writing("given", Mode::Replace)
    };
    world.write(owned, b"").unwrap();
    let info = world.stat("given").unwrap();
    assert_eq!((info.uid, info.gid), (54321, 12345));
}

#[test]
fn a_change_is_what_was_given_and_no_more() {
    let world = World::new();
    fs::write(world.path("file"), b"content").unwrap();
    symlink("file", world.path("link")).unwrap();
    let before = world.stat("file").unwrap();
    let change = |call: v1::Change| files::change(world.agent.connect(), call, soon());
    let of = |name: &str| v1::Change {
        path: world.bytes(name),
        follow: true,
        ..v1::Change::default()
    };
    change(v1::Change {
        modified_ns: Some(5),
        ..of("link")
    })
    .unwrap();
    let after = world.stat("file").unwrap();
    assert_eq!(
        (after.modified_ns, after.accessed_ns, after.mode),
        (5, before.accessed_ns, before.mode)
    );
    change(v1::Change {
        size: Some(3),
        permissions: Some(0o4711),
        ..of("file")
    })
    .unwrap();
    assert_eq!(world.content("file"), b"con");
    assert_eq!(world.stat("file").unwrap().mode, 0o4711);
    let link = v1::Change {
        modified_ns: Some(9),
        follow: false,
        ..of("link")
    };
    change(link).unwrap();
    assert_eq!(world.stat("link").unwrap().modified_ns, 9);
    let mode_of_link = v1::Change {
        permissions: Some(0o600),
        follow: false,
        ..of("link")
    };
    assert_eq!(errno(change(mode_of_link)), 95);
    assert_eq!(
        errno(change(v1::Change {
            size: Some(1),
            ..of(".")
        })),
        EISDIR
    );
    invalid(change(v1::Change {
        size: Some(1),
        recursive: true,
        ..of("file")
    }));
    invalid(change(v1::Change {
        owner: "no-such-user".into(),
        ..of("file")
    }));
}
