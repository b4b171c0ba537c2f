//! The keeper as its clients see it: a process that comes, keeps what it is given, and may be killed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use belljar_keeper::client::Client;
use belljar_keeper::v1::{self, error::Code, reply::Result as Answer, request::Call};

mod common;

use common::{
    MIB, Place, begin, capture, content, forget_templates, keep, list, open, pages, refused,
};

#[test]
fn what_is_kept_is_given_back_hot_and_from_chunks_by_this_keeper_and_the_next() {
    let place = Place::new();
    let mut client = place.connect();
    let (id, memory) = capture(&mut client, 1, "one");
    for round in 0..3 {
        let (opened, files) = open(&mut client, "one").unwrap();
        assert_eq!(opened.hot, round < 2, "{round}");
        assert_eq!(content(&files[0]), b"state");
        assert!(content(&files[1]) == memory);
        assert_eq!(&content(&files[2])[4096..4103], b"on disk");
        // What is shared cannot be written.
        assert!((&files[1]).write_all(b"x").is_err());
        assert!((&files[2]).write_all(b"x").is_err());
        if round == 0 {
            // Another keeper finds the file, when it has become durable.
            let file = place.path().join(format!("templates/{id}.memory"));
            let deadline = Instant::now() + Duration::from_secs(20);
            while !file.exists() {
                assert!(Instant::now() < deadline, "the template got no name");
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(200));
            drop(client);
            place.kill();
            client = place.connect();
        } else {
            forget_templates(&place.path());
        }
    }
    let description = Call::Describe(v1::Describe {
        snapshot: id[..6].to_owned(),
    });
    let (Answer::Description(description), _) = client.call(description, &[], |_| {}).unwrap()
    else {
        panic!("not described")
    };
    assert_eq!(description.sandbox, b"who it was");
    assert_eq!(description.images.len(), 4);
}

#[test]
fn an_increment_is_a_whole_snapshot() {
    let place = Place::new();
    let mut client = place.connect();
    let (base, mut memory) = capture(&mut client, 2, "base");
    let (begun, files) = begin(&mut client, &base);
    assert!(begun.has_base);
    files[0].write_all_at(b"later", 0).unwrap();
    files[1].set_len(8 * MIB).unwrap();
    let data = pages(9, 3);
    // Changed, new, and zero again.
    for at in [8192_usize, 6 << 20] {
        memory[at..at + data.len()].copy_from_slice(&data);
        files[1].write_all_at(&data, at as u64).unwrap();
    }
    let zeroed = (3 << 20) + 4096;
    memory[zeroed..zeroed + 4096].fill(0);
    files[1].write_all_at(&[0; 4096], zeroed as u64).unwrap();
    files[2].set_len(MIB).unwrap();
    let call = v1::Keep {
        is_increment: true,
        parents: vec![base.clone()],
        ..v1::Keep::default()
    };
    let id = keep(&mut client, call).unwrap();
    let (opened, files) = open(&mut client, &id).unwrap();
    assert!(
        !opened.hot,
        "an increment's memory is made a template when it is wanted"
    );
    assert!(content(&files[1]) == memory);
    assert_eq!(content(&files[0]), b"later");
    // A base that is not here, or of another size, is none.
    let (begun, _) = begin(&mut client, &"00".repeat(16));
    assert!(!begun.has_base);
    let call = v1::Keep {
        is_increment: true,
        ..v1::Keep::default()
    };
    let (code, message) = refused(keep(&mut client, call));
    assert_eq!(code, Code::Invalid, "{message}");
    assert_eq!(list(&mut client).len(), 2);
}

#[test]
fn what_is_not_kept_vanishes_and_what_does_not_fit_is_told() {
    let place = Place::new();
    let mut client = place.connect();
    let (_, files) = begin(&mut client, "");
    files[1].write_all_at(&pages(1, 500), 0).unwrap();
    drop((client, files));
    let mut client = place.connect();
    assert_eq!(list(&mut client), []);
    assert_eq!(
        std::fs::read_dir(place.path().join("templates"))
            .unwrap()
            .count(),
        0
    );
    let begin = v1::Begin {
        memory_bytes: 1 << 60,
        expected_bytes: 1 << 60,
        ..v1::Begin::default()
    };
    let (code, message) = refused(client.call(Call::Begin(begin), &[], |_| {}));
    assert_eq!(code, Code::NoSpace, "{message}");
    let (code, _) = refused(open(&mut client, "nothing"));
    assert_eq!(code, Code::NoSnapshot);
    let (code, _) = refused(client.call(Call::Keep(v1::Keep::default()), &[], |_| {}));
    assert_eq!(code, Code::Invalid);
    // A name that cannot be is told before anything is stored.
    let (_, files) = self::begin(&mut client, "");
    files[1].set_len(8 * MIB).unwrap();
    let call = v1::Keep {
        tags: vec!["a/b".to_owned()],
        ..v1::Keep::default()
    };
    let (code, message) = refused(keep(&mut client, call));
    assert_eq!(code, Code::Invalid, "{message}");
}

#[test]
fn a_base_image_must_be_there_with_its_content() {
    let place = Place::new();
    let mut client = place.connect();
    let (image, elsewhere) = (
        place.dir.path().join("image"),
        place.dir.path().join("other"),
    );
    std::fs::write(&image, b"the root file system").unwrap();
    let (_, files) = begin(&mut client, "");
    files[1].set_len(8 * MIB).unwrap();
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let metadata = std::fs::metadata(&image).unwrap();
    let used = v1::BaseFile {
        path: path(&image),
        device: metadata.dev(),
        inode: metadata.ino(),
        bytes: metadata.len(),
        changed: belljar_keeper::changed_ns(&metadata),
    };
    // Another file had this name when the sandbox began.
    let call = v1::Keep {
        base_files: [(
            "image".to_owned(),
            v1::BaseFile {
                inode: 1,
                ..used.clone()
            },
        )]
        .into(),
        ..v1::Keep::default()
    };
    let (code, message) = refused(keep(&mut client, call));
    assert_eq!(code, Code::Invalid);
    assert!(message.contains("replaced"), "{message}");
    let (_, files) = begin(&mut client, "");
    files[1].set_len(8 * MIB).unwrap();
    let call = v1::Keep {
        base_files: [("image".to_owned(), used)].into(),
        tags: vec!["with".to_owned()],
        ..v1::Keep::default()
    };
    keep(&mut client, call).unwrap();
    let mut open = |file: &Path| {
        let open = v1::Open {
            snapshot: "with".to_owned(),
            candidates: vec![v1::BaseImage {
                drive: "image".to_owned(),
                path: path(file),
            }],
            ..v1::Open::default()
        };
        client.call(Call::Open(open), &[], |_| {})
    };
    open(&image).unwrap();
    std::fs::rename(&image, &elsewhere).unwrap();
    let (code, message) = refused(open(&image));
    assert_eq!(code, Code::BaseImage, "{message}");
    open(&elsewhere).unwrap();
    std::fs::write(&elsewhere, b"the root file systen").unwrap();
    let (code, message) = refused(open(&elsewhere));
    assert_eq!(code, Code::BaseImage);
    assert!(message.contains("another content"), "{message}");
}

#[test]
fn a_keeper_that_is_killed_at_any_moment_leaves_whole_snapshots_only() {
    let place = Place::new();
    let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
    for round in 0..24 {
        let mut client = place.connect();
        // Other content each time, and known content among it.
        if round % 4 == 0 {
            kept.push(capture(&mut client, round, &format!("t{round}")));
        }
        let delay = Duration::from_micros(round * round * 150);
        let killer = std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                std::thread::sleep(delay);
                place.kill();
            });
            let begun =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| begin(&mut client, "")));
            let Ok((_, files)) = begun else {
                return killer.join();
            };
            files[1].set_len(8 * MIB).unwrap();
            files[1]
                .write_all_at(&pages(round + 1000, 1500), 0)
                .unwrap();
            files[2].set_len(MIB).unwrap();
            let _ = keep(&mut client, v1::Keep::default());
            killer.join()
        });
        killer.unwrap();
        let mut client = place.connect();
        for snapshot in list(&mut client) {
            assert!(!snapshot.pending);
            open(&mut client, &snapshot.id).unwrap();
        }
        let (Answer::Verified(verified), _) = client
            .call(Call::Verify(v1::Verify {}), &[], |_| {})
            .unwrap()
        else {
            panic!("not verified")
        };
        assert_eq!(
            (
                verified.damaged,
                verified.broken.len(),
                verified.problems.len()
            ),
            (0, 0, 0),
            "{verified:?}"
        );
    }
    place.kill();
    let mut client = place.connect();
    forget_templates(&place.path());
    for (id, memory) in kept {
        let (_, files) = open(&mut client, &id).unwrap();
        assert!(content(&files[1]) == memory, "{id}");
    }
}

#[test]
fn only_one_serves_and_garbage_harms_nobody() {
    let place = Place::new();
    let mut client = place.connect();
    let others: Vec<_> = (0..4)
        .map(|_| {
            std::process::Command::new(env!("CARGO_BIN_EXE_belljar-keeper"))
                .arg(place.path())
                .spawn()
                .unwrap()
        })
        .collect();
    for mut other in others {
        assert!(other.wait().unwrap().success());
    }
    assert_eq!(place.pids().len(), 1);
    for garbage in [&b"\xff\xff\xff\xff\xff"[..], b"\x05hello", &[0; 4096]] {
        let socket = place.path().join("keeper.sock");
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(garbage).unwrap();
    }
    // More descriptors than any call has.
    let file = File::open("/dev/null").unwrap();
    let too_many = vec![std::os::fd::AsFd::as_fd(&file); 8];
    let ping = || Call::Ping(v1::Ping {});
    assert!(client.call(ping(), &too_many, |_| {}).is_ok());
    let (code, _) = refused(client.call(Call::Export(v1::Export::default()), &too_many, |_| {}));
    assert_eq!(code, Code::Invalid);
    assert!(client.call(ping(), &[], |_| {}).is_ok());
}

#[test]
fn the_lock_of_a_sandbox_is_held_until_it_goes_on_whoever_dies() {
    use rustix::fs::{FlockOperation, flock};
    use std::os::fd::AsFd;
    let place = Place::new();
    let sandbox = tempfile::tempdir().unwrap();
    let path = sandbox.path().join("capture");
    let is_free = || {
        let lock = File::create(&path).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
    };
    let begin = |client: &mut Client| {
        let lock = File::create(&path).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        let call = v1::Begin {
            sandbox_dir: sandbox.path().to_string_lossy().into_owned(),
            ..v1::Begin::default()
        };
        let call = Call::Begin(call);
        client.call(call, &[lock.as_fd()], |_| {}).unwrap();
    };
    let mut client = place.connect();
    begin(&mut client);
    assert!(!is_free(), "whoever began it may have gone");
    let settle = Call::Settle(v1::Settle {});
    client.call(settle, &[], |_| {}).unwrap();
    assert!(is_free());
    begin(&mut client);
    drop(client);
    // There is no VMM that could be resumed: nothing is left to be done.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_free() {
        assert!(Instant::now() < deadline, "the lock is never free again");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn use_is_told_for_each_snapshot() {
    let place = Place::new();
    let mut client = place.connect();
    let ids = [1, 2].map(|seed| capture(&mut client, seed, &format!("tag{seed}")).0);
    let mut told = Vec::new();
    let call = Call::Usage(v1::GetUsage {});
    let (answer, _) = client
        .call(call, &[], |answer| {
            if let Answer::Item(item) = answer {
                told.push((item.id, item.stored_bytes > 0));
            }
        })
        .unwrap();
    assert!(matches!(answer, Answer::Usage(usage) if usage.snapshots.is_empty()));
    assert_eq!(told, ids.map(|id| (id, true)));
}

fn verify(client: &mut Client) -> v1::Verified {
    let call = Call::Verify(v1::Verify {});
    let (Answer::Verified(verified), _) = client.call(call, &[], |_| {}).unwrap() else {
        panic!("not verified")
    };
    verified
}

/// Writes into a template as only root could, leaving its record true.
fn spoil(place: &Path, id: &str) {
    use std::os::unix::fs::PermissionsExt;
    let path = place.join(format!("templates/{id}.memory"));
    let deadline = Instant::now() + Duration::from_secs(20);
    // The disk's is the last.
    while !path.with_extension("disk.ok").exists() {
        assert!(Instant::now() < deadline, "the template got no name");
        std::thread::sleep(Duration::from_millis(5));
    }
    let modified = path.metadata().unwrap().modified().unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"spoiled", 5 << 20).unwrap();
    file.set_modified(modified).unwrap();
}

#[test]
fn a_template_is_the_keepers_own_and_one_that_differs_from_its_chunks_is_found() {
    let place = Place::new();
    let mut client = place.connect();
    let (_, files) = begin(&mut client, "");
    files[1].set_len(8 * MIB).unwrap();
    files[1].write_all_at(&pages(3, 10), 4 << 20).unwrap();
    files[2].set_len(MIB).unwrap();
    let id = keep(&mut client, v1::Keep::default()).unwrap();
    // Whoever wrote the capture still has it open, and changes it.
    files[1].write_all_at(&[7; 4096], 4 << 20).unwrap();
    let (opened, shared) = open(&mut client, &id).unwrap();
    assert!(opened.hot);
    assert!(content(&shared[1])[4 << 20..][..40960] == pages(3, 10));
    let verified = verify(&mut client);
    assert_eq!((verified.damaged, verified.bad_templates.len()), (0, 0));
    spoil(&place.path(), &id);
    let verified = verify(&mut client);
    assert_eq!(verified.damaged, 0);
    assert_eq!(verified.templates, 2);
    assert_eq!(verified.bad_templates, [format!("{id} memory")]);
    let (opened, shared) = open(&mut client, &id).unwrap();
    assert!(!opened.hot, "it is made again");
    assert!(content(&shared[1])[5 << 20..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_clones_share_at_once_can_be_sealed() {
    let place = Place::new();
    let mut client = place.connect();
    let begin = |client: &mut Client, expected_bytes| {
        let begin = v1::Begin {
            memory_bytes: 8 * MIB,
            in_memory: true,
            expected_bytes,
            ..v1::Begin::default()
        };
        client.call(Call::Begin(begin), &[], |_| {})
    };
    let (_, files) = begin(&mut client, 0).unwrap();
    let files: Vec<File> = files.into_iter().map(File::from).collect();
    for file in &files {
        file.write_all_at(b"before", 0).unwrap();
        let seals = rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(file, seals).unwrap();
        assert!(file.write_all_at(b"after", 0).is_err());
    }
    assert_eq!(files.len(), 2);
    let (code, message) = refused(begin(&mut client, 1 << 50));
    assert_eq!(code, Code::NoMemory, "{message}");
}
