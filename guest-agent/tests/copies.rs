//! Copies between this machine and an agent, as the node makes them.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use belljar_node::files::{self, Copied, CopyError, CopyOptions, Guest};
use belljar_node::registry::ConnectError;

use common::Agent;

struct Box {
    agent: Agent,
    /// Files of the "guest", and of the host.
    folder: tempfile::TempDir,
}

impl Guest for Box {
    fn agent(&self, _: Instant) -> Result<UnixStream, ConnectError> {
        Ok(self.agent.connect())
    }

    fn called(&self) -> String {
        "box".to_owned()
    }
}

impl Box {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("guest")).unwrap();
        fs::create_dir(folder.path().join("host")).unwrap();
        Self {
            agent: Agent::start_worker(),
            folder,
        }
    }

    fn guest(&self, name: &str) -> PathBuf {
        self.folder.path().join("guest").join(name)
    }

    fn host(&self, name: &str) -> PathBuf {
        self.folder.path().join("host").join(name)
    }

    fn push(&self, from: &str, to: &str) -> Result<Copied, CopyError> {
        self.push_with(from, to, &CopyOptions::default())
    }

    fn push_with(&self, from: &str, to: &str, how: &CopyOptions) -> Result<Copied, CopyError> {
        let (from, to) = (self.host(from), self.guest(to));
        let to = to.to_str().unwrap().as_bytes();
        files::in_to_guest(&from, self, to, how, &mut |_, _| {})
    }

    fn pull(&self, from: &str, to: &str) -> Result<Copied, CopyError> {
        self.pull_with(from, to, &CopyOptions::default())
    }

    fn pull_with(&self, from: &str, to: &str, how: &CopyOptions) -> Result<Copied, CopyError> {
        let from = self.guest(from);
        let from = from.to_str().unwrap().as_bytes();
        files::out_of_guest(self, from, &self.host(to), how, &mut |_, _| {})
    }
}

fn text(result: Result<Copied, CopyError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn files_go_where_cp_would_put_them() {
    let world = Box::new();
    let content: Vec<u8> = (0..1_500_000_u32).map(|at| (at * 7 % 253) as u8).collect();
    fs::write(world.host("file"), &content).unwrap();
    fs::set_permissions(world.host("file"), fs::Permissions::from_mode(0o4711)).unwrap();
    let copied = world.push("file", "new").unwrap();
    assert_eq!((copied.bytes, copied.problems_total), (1_500_000, 0));
    assert_eq!(fs::read(world.guest("new")).unwrap(), content);
    let (old, new) = (
        fs::metadata(world.host("file")).unwrap(),
        fs::metadata(world.guest("new")).unwrap(),
    );
    assert_eq!(
        (new.mode() & 0o7777, new.mtime(), new.mtime_nsec()),
        (0o711, old.mtime(), old.mtime_nsec())
    );
    fs::create_dir(world.guest("dir")).unwrap();
    world.push("file", "dir").unwrap();
    world.push("file", "dir/").unwrap();
    world.push("file", "dir/other").unwrap();
    assert_eq!(fs::read_dir(world.guest("dir")).unwrap().count(), 2);
    assert!(text(world.push("file", "none/")).contains("no directory"));
    assert!(text(world.push("file", "none/x")).contains("no directory"));
    assert!(text(world.push("nothing", "x")).contains("nothing"));

    let copied = world.pull("new", "back").unwrap();
    assert_eq!(copied.bytes, 1_500_000);
    assert_eq!(fs::read(world.host("back")).unwrap(), content);
    let back = fs::metadata(world.host("back")).unwrap();
    assert_eq!(
        (back.mode() & 0o7777, back.mtime_nsec()),
        (0o711, old.mtime_nsec())
    );
    fs::create_dir(world.host("dir")).unwrap();
    world.pull("new", "dir").unwrap();
    assert!(world.host("dir/new").exists());
    assert!(text(world.pull("new", "none/")).contains("no directory"));
    assert!(text(world.pull("nothing", "x")).contains("nothing"));
    assert!(!world.host("x").exists());
    // What is longer before is not afterwards.
    fs::write(world.guest("short"), b"s").unwrap();
    world.pull("short", "back").unwrap();
    assert_eq!(fs::read(world.host("back")).unwrap(), b"s");
    let status = Path::new("/proc/self/status");
    let to = world.guest("status");
    let to = to.to_str().unwrap().as_bytes();
    files::in_to_guest(status, &world, to, &CopyOptions::default(), &mut |_, _| {}).unwrap();
    assert!(fs::metadata(world.guest("status")).unwrap().len() > 100);
    fs::write(world.guest("empty"), b"").unwrap();
    world.pull("empty", "back").unwrap();
    assert_eq!(fs::read(world.host("back")).unwrap(), b"");
}

#[test]
fn directories_go_where_docker_would_put_them() {
    let world = Box::new();
    fs::create_dir_all(world.host("src/sub")).unwrap();
    fs::write(world.host("src/sub/file"), b"x").unwrap();
    world.push("src", "new").unwrap();
    assert!(world.guest("new/sub/file").exists());
    world.push("src", "new").unwrap();
    assert!(world.guest("new/src/sub/file").exists());
    world.push("src/.", "content").unwrap();
    assert!(world.guest("content/sub/file").exists());
    world.push("src/sub/.", "content").unwrap();
    assert!(world.guest("content/file").exists());
    fs::write(world.guest("plain"), b"").unwrap();
    assert!(text(world.push("src", "plain")).contains("no directory"));
    assert!(text(world.push("src", "none/deep")).contains("no directory"));

    world.pull("new", "back").unwrap();
    assert!(world.host("back/src/sub/file").exists());
    world.pull("new/src", "back").unwrap();
    world.pull("new/src/sub/.", "back").unwrap();
    assert!(world.host("back/file").exists());
    fs::write(world.host("plain"), b"").unwrap();
    assert!(text(world.pull("new", "plain")).contains("no directory"));
    assert!(text(world.pull("new", "none/deep")).contains("none/deep"));
}

#[test]
fn symlinks_are_what_the_caller_says() {
    let world = Box::new();
    fs::write(world.host("file"), b"x").unwrap();
    symlink("file", world.host("link")).unwrap();
    let follow = CopyOptions {
        follow: true,
        ..CopyOptions::default()
    };
    world.push("link", "link").unwrap();
    assert_eq!(
        fs::read_link(world.guest("link")).unwrap(),
        Path::new("file")
    );
    world.push_with("link", "real", &follow).unwrap();
    assert_eq!(fs::read(world.guest("real")).unwrap(), b"x");
    symlink("real", world.guest("soft")).unwrap();
    world.pull("soft", "soft").unwrap();
    assert_eq!(
        fs::read_link(world.host("soft")).unwrap(),
        Path::new("real")
    );
    world.pull_with("soft", "hard", &follow).unwrap();
    assert_eq!(fs::read(world.host("hard")).unwrap(), b"x");
}

#[test]
fn a_guest_writes_nowhere_but_where_it_was_told_to() {
    let world = Box::new();
    fs::create_dir(world.host("precious")).unwrap();
    fs::write(world.host("precious/file"), b"precious").unwrap();
    fs::create_dir(world.host("out")).unwrap();
    // The first copy leaves symlinks, the second one has the names of what they point to.
    fs::create_dir(world.guest("trap")).unwrap();
    symlink(world.host("precious/file"), world.guest("trap/file")).unwrap();
    symlink(world.host("precious"), world.guest("trap/dir")).unwrap();
    world.pull("trap/.", "out").unwrap();
    assert!(fs::read_link(world.host("out/file")).is_ok());
    fs::write(world.guest("file"), b"evil").unwrap();
    world.pull("file", "out").unwrap();
    assert_eq!(fs::read(world.host("out/file")).unwrap(), b"evil");
    fs::create_dir(world.guest("dir")).unwrap();
    fs::write(world.guest("dir/file"), b"evil").unwrap();
    assert!(world.pull("dir", "out").is_err());
    assert_eq!(fs::read(world.host("precious/file")).unwrap(), b"precious");
    assert_eq!(fs::read_dir(world.host("precious")).unwrap().count(), 1);
}

#[test]
fn holes_and_what_is_left_out() {
    let world = Box::new();
    let file = fs::File::create(world.host("sparse")).unwrap();
    file.set_len(1 << 32).unwrap();
    file.write_all_at(b"data", 3 << 30).unwrap();
    drop(file);
    let mut told = Vec::new();
    let to = world.guest("sparse");
    files::in_to_guest(
        &world.host("sparse"),
        &world,
        to.to_str().unwrap().as_bytes(),
        &CopyOptions::default(),
        &mut |done, total| told.push((done, total)),
    )
    .unwrap();
    assert_eq!(told.last(), Some(&(1 << 32, Some(1 << 32))));
    assert!(fs::metadata(&to).unwrap().blocks() < 1000);
    world.pull("sparse", "back").unwrap();
    let back = fs::File::open(world.host("back")).unwrap();
    let info = back.metadata().unwrap();
    assert_eq!(info.len(), 1 << 32);
    assert!(info.blocks() < 1000);
    let mut found = [0; 4];
    back.read_exact_at(&mut found, 3 << 30).unwrap();
    assert_eq!(&found, b"data");
    // FIFOs stay where they are.
    fs::create_dir(world.guest("mixed")).unwrap();
    fs::write(world.guest("mixed/file"), b"x").unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        world.guest("mixed/fifo"),
        fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let copied = world.pull("mixed", "mixed").unwrap();
    assert_eq!(copied.problems_total, 1);
    assert!(copied.problems[0].contains("fifo"), "{:?}", copied.problems);
    assert!(world.host("mixed/file").exists() && !world.host("mixed/fifo").exists());
}

#[test]
fn streams_and_other_guests() {
    let (one, two) = (Box::new(), Box::new());
    fs::create_dir(one.guest("tree")).unwrap();
    fs::write(one.guest("tree/file"), b"x").unwrap();
    let how = CopyOptions::default();
    let path = |path: PathBuf| path.into_os_string().into_encoded_bytes();
    let mut tar = Vec::new();
    files::to_tar(
        &one,
        &path(one.guest("tree")),
        &mut tar,
        &how,
        &mut |_, _| {},
    )
    .unwrap();
    files::from_tar(
        tar.as_slice(),
        &two,
        &path(two.guest("")),
        &how,
        &mut |_, _| {},
    )
    .unwrap();
    assert_eq!(fs::read(two.guest("tree/file")).unwrap(), b"x");
    let refused = files::from_tar(
        &b"no tar"[..],
        &two,
        &path(two.guest("")),
        &how,
        &mut |_, _| {},
    );
    assert!(text(refused).contains("tar stream"));
    for (from, to) in [("tree", "copy"), ("tree/file", "copied")] {
        let (from, to) = (path(one.guest(from)), path(two.guest(to)));
        files::between(&one, &from, &two, &to, &how, &mut |_, _| {}).unwrap();
    }
    assert_eq!(fs::read(two.guest("copy/file")).unwrap(), b"x");
    assert_eq!(fs::read(two.guest("copied")).unwrap(), b"x");
}
