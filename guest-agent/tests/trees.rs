//! Trees as tar streams as the host sees them.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use belljar_protocol::client::{CallError, files};
use belljar_protocol::transfer::Piece;
use belljar_protocol::v1;

use common::{Agent, PATIENCE, soon};

struct World {
    agent: Agent,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            agent: Agent::start_worker(),
            folder,
        }
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.path(name).into_os_string().into_vec()
    }

    fn read(&self, call: v1::ReadTree) -> Result<(Vec<u8>, v1::TransferEnd), CallError> {
        let (_, download) = files::read_tree(self.agent.connect(), call, soon())?;
        let mut stream = Vec::new();
        let end = download.run(Some(PATIENCE), |piece| {
            if let Piece::Data(data) = piece {
                stream.extend_from_slice(data);
            }
            Ok::<(), CallError>(())
        })?;
        Ok((stream, end))
    }

    fn write(&self, call: v1::WriteTree, stream: &[u8]) -> Result<v1::WriteDone, CallError> {
        let mut upload = files::write_tree(self.agent.connect(), call, Some(PATIENCE))?;
        upload.put(stream)?;
        upload.finish()
    }

    fn reading(&self, name: &str) -> v1::ReadTree {
        v1::ReadTree {
            path: self.bytes(name),
            name: b".".to_vec(),
            xattrs: true,
            ..v1::ReadTree::default()
        }
    }

    fn writing(&self, name: &str) -> v1::WriteTree {
        v1::WriteTree {
            path: self.bytes(name),
            parents: true,
            ..v1::WriteTree::default()
        }
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, CallError>) -> (v1::error::Code, u32, String) {
    match result {
        Err(CallError::Refused {
            code,
            errno,
            message,
        }) => (code, errno, message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tree_goes_out_and_comes_back() {
    let world = World::new();
    fs::create_dir_all(world.path("from/a/b")).unwrap();
    for at in 0..2000 {
        fs::write(world.path(format!("from/a/{at}")), vec![at as u8; at % 700]).unwrap();
    }
    fs::write(world.path("from/big"), vec![3; 3_000_000]).unwrap();
    symlink("../../big", world.path("from/a/b/link")).unwrap();
    fs::set_permissions(world.path("from/a"), fs::Permissions::from_mode(0o2710)).unwrap();
    fs::set_permissions(world.path("from"), fs::Permissions::from_mode(0o701)).unwrap();
    let (stream, end) = world.read(world.reading("from")).unwrap();
    assert_eq!((end.entries, end.problems_total), (2005, 0));
    let done = world.write(world.writing("new/to"), &stream).unwrap();
    assert_eq!((done.entries, done.problems_total), (2005, 0));
    let same = Command::new("diff")
        .arg("-r")
        .args([world.path("from"), world.path("new/to")])
        .status()
        .unwrap();
    assert!(same.success());
    let mode = |name: &str| fs::metadata(world.path(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("new/to"), mode("new/to/a")), (0o701, 0o2710));
    // Again over what is there; a directory that was there keeps its mode.
    fs::set_permissions(world.path("new/to"), fs::Permissions::from_mode(0o755)).unwrap();
    world.write(world.writing("new/to"), &stream).unwrap();
    assert_eq!(mode("new/to"), 0o755);
    let (code, errno, _) = refused(world.write(
        v1::WriteTree {
            no_replace: true,
            ..world.writing("new/to")
        },
        &stream,
    ));
    assert_eq!((code, errno), (v1::error::Code::System, 17));
    let (named, _) = world
        .read(v1::ReadTree {
            name: Vec::new(),
            ..world.reading("from/a/b")
        })
        .unwrap();
    assert!(named.windows(7).any(|part| part == b"b/link\0"));
    // A single file, and a symlink.
    let (stream, _) = world
        .read(v1::ReadTree {
            name: Vec::new(),
            ..world.reading("from/a/b/link")
        })
        .unwrap();
    world.write(world.writing("one"), &stream).unwrap();
    assert_eq!(
        fs::read_link(world.path("one/link")).unwrap(),
        Path::new("../../big")
    );
    let (stream, _) = world
        .read(v1::ReadTree {
            follow: true,
            name: b"renamed".to_vec(),
            ..world.reading("from/a/b/link")
        })
        .unwrap();
    world.write(world.writing("one"), &stream).unwrap();
    assert_eq!(
        fs::metadata(world.path("one/renamed")).unwrap().len(),
        3_000_000
    );
}

#[test]
fn failures_are_told_where_they_happen() {
    let world = World::new();
    assert_eq!(refused(world.read(world.reading("none"))).1, 2);
    let missing = v1::WriteTree {
        parents: false,
        ..world.writing("none")
    };
    assert_eq!(refused(world.write(missing, b"")).1, 2);
    let (code, _, message) = refused(world.write(world.writing("to"), &[7; 5000]));
    assert_eq!(code, v1::error::Code::Invalid, "{message}");
    let (_, _, message) = refused(world.write(world.writing("to"), b"half"));
    assert!(message.contains("ends within"), "{message}");
    // An early refusal reaches a host that is still sending.
    let mut upload =
        files::write_tree(world.agent.connect(), world.writing("to"), Some(PATIENCE)).unwrap();
    let failed = (0..2000).find_map(|_| upload.put(&[9; 100_000]).err());
    assert!(
        matches!(
            failed,
            Some(CallError::Refused {
                code: v1::error::Code::Invalid,
                ..
            })
        ),
        "{failed:?}"
    );
    assert!(world.agent.is_alive());
}

#[test]
fn another_user_packs_and_unpacks_what_they_may() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let world = World::new();
    let user = "54321:54321".to_owned();
    fs::create_dir(world.path("from")).unwrap();
    fs::write(world.path("from/open"), b"open").unwrap();
    fs::write(world.path("from/secret"), b"secret").unwrap();
    fs::set_permissions(world.path("from/secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(world.path("from/closed")).unwrap();
    fs::set_permissions(world.path("from/closed"), fs::Permissions::from_mode(0o700)).unwrap();
    let call = v1::ReadTree {
        user: user.clone(),
        ..world.reading("from")
    };
    let (stream, end) = world.read(call).unwrap();
    assert_eq!(end.problems_total, 2, "{:?}", end.problems);
    assert!(end.problems.iter().all(|problem| problem.errno == 13));
    assert!(
        end.problems[0].message.contains("/from/secret:"),
        "{:?}",
        end.problems
    );
    let call = v1::WriteTree {
        user: user.clone(),
        ..world.writing("to")
    };
    assert_eq!(refused(world.write(call, &stream)).1, 13);
    fs::create_dir(world.path("to")).unwrap();
    std::os::unix::fs::chown(world.path("to"), Some(54321), Some(54321)).unwrap();
    let call = v1::WriteTree {
        user,
        ..world.writing("to")
    };
    world.write(call, &stream).unwrap();
    assert_eq!(fs::metadata(world.path("to/open")).unwrap().uid(), 54321);
    assert!(!world.path("to/secret").exists());
    // Given away by root.
    let call = v1::WriteTree {
        owner: "12345:23456".to_owned(),
        ..world.writing("given")
    };
    world.write(call, &stream).unwrap();
    let found = fs::metadata(world.path("given/open")).unwrap();
    assert_eq!((found.uid(), found.gid()), (12345, 23456));
}
