//! Clients and VMMs that mean harm, or break off: the keeper neither ends, hangs nor grows, and serves the others.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;

use belljar_keeper::client::{Keeper, KeeperError};
use belljar_keeper::v1::error::Code;
use belljar_keeper::wire::Connection;
use common::{begin, list, refused};

use super::*;

/// A keeper that leaves soon when nobody needs it, and may have so many descriptors.
fn keeper(place: &Place, descriptors: u32) -> Keeper {
    let program = place.dir.path().join("keeper-program");
    let text = format!(
        "#!/bin/sh\nulimit -n {descriptors}\nBELLJAR_KEEPER_IDLE_MS=300 exec {} \"$@\"\n",
        env!("CARGO_BIN_EXE_belljar-keeper")
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    Keeper {
        dir: place.path(),
        program,
    }
}

#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

/// Descriptors and bytes of memory of a keeper.
fn taken(place: &Place) -> (usize, u64) {
    let pid = place.pids()[0];
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.unwrap().split_ascii_whitespace().next().unwrap();
    (open, kib.parse::<u64>().unwrap() << 10)
}

/// A socket on which the keeper waits for a VMM, and the memory that belongs to it.
fn open_lazily(client: &mut Client, word: &str) -> (UnixStream, File) {
    let open = v1::Open {
        snapshot: word.to_owned(),
        lazy: true,
        ..v1::Open::default()
    };
    let (_, mut files) = client.call(Call::Open(open), &[], |_| {}).unwrap();
    let socket = files.pop().unwrap().into();
    (socket, File::from(files.remove(1)))
}

#[test]
fn what_clients_leave_behind_keeps_nobody_and_a_false_userfaultfd_is_given_up() {
    let place = Place::new();
    let mut client = place.connect();
    let tags = ["one", "two", "three", "four"];
    for (seed, tag) in (0..).zip(tags) {
        let (id, _) = capture(&mut client, 1000 * seed, tag);
        client = without_templates(&place, client, &id);
    }
    drop(client);
    place.kill();
    forget_templates(&place.path());
    let keeper = keeper(&place, 256);
    let (from_nobody, unfilled) = pipe();
    let (unread, to_nobody) = pipe();
    let fifo = place.dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from(0o600),
        0,
    )
    .unwrap();
    // A sandbox whose directory is a pipe, and one that is nowhere.
    for path in [fifo.as_path(), Path::new("/nowhere")] {
        let mut client = keeper.connect().unwrap();
        let begin = v1::Begin {
            memory_bytes: MIB,
            sandbox_dir: path.to_string_lossy().into_owned(),
            ..v1::Begin::default()
        };
        client.call(Call::Begin(begin), &[], |_| {}).unwrap();
    }
    // Streams that nobody fills or empties, of a client that has gone.
    for (call, descriptor) in [
        (Call::Import(v1::Import::default()), &from_nobody),
        (
            Call::Export(v1::Export {
                snapshot: "one".to_owned(),
                first: 0,
            }),
            &to_nobody,
        ),
    ] {
        drop(keeper.connect().unwrap());
        let stream = UnixStream::connect(place.path().join("keeper.sock")).unwrap();
        let mut connection = Connection::new(stream);
        connection.receive::<v1::Hello>().unwrap().unwrap();
        let request = v1::Request {
            descriptors: 1,
            call: Some(call),
        };
        connection.send(&request, &[descriptor.as_fd()]).unwrap();
    }
    // What is no userfaultfd. The keeper is heard to give it up, although nothing is closed here.
    let mut client = keeper.connect().unwrap();
    let (idle, other_end) = pipe();
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let two = [idle.as_fd(), file.as_fd()];
    let mut sockets = Vec::new();
    for (descriptors, tag) in [&two[..1], &two[1..], &two[..0], &two]
        .into_iter()
        .zip(tags)
    {
        let (socket, memory) = open_lazily(&mut client, tag);
        let message =
            format!(r#"[{{"base_host_virt_addr": 65536, "size": {LENGTH}, "offset": 0}}]"#);
        tell(&socket, &message, descriptors);
        let (mut reader, _memory) = (socket.try_clone().unwrap(), memory);
        let read = bounded("the keeper", move || {
            std::io::Read::read(&mut reader, &mut [0])
        });
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        sockets.push(socket);
    }
    assert_eq!(list(&mut client).len(), 4);
    drop(client);
    // The other ends of all pipes and sockets are still open here.
    eventually("the keeper leaves", || place.pids().is_empty());
    drop((unfilled, unread, other_end, sockets));
}

#[test]
fn a_snapshot_is_not_removed_while_it_is_brought_in_and_leaves_nothing_afterwards() {
    let place = Place::new();
    let mut client = place.connect();
    let (id, memory) = capture(&mut client, 10, "one");
    let mut client = without_templates(&place, client, &id);
    let guest = Guest::new(&mut client, "one");
    let mark = v1::Mark {
        snapshot: id.clone(),
        remove_tags: vec!["one".to_owned()],
        ..v1::Mark::default()
    };
    client.call(Call::Mark(mark), &[], |_| {}).unwrap();
    let remove = v1::Remove {
        snapshot: id,
        live: Vec::new(),
    };
    let collect = v1::Collect {
        evict: true,
        ..v1::Collect::default()
    };
    // Nothing is named, live or in the way of the smallest budget; but it is being read.
    let (code, message) = refused(client.call(Call::Remove(remove), &[], |_| {}));
    assert_eq!(code, Code::Kept, "{message}");
    let budget = v1::SetBudget {
        store_bytes: Some(1),
    };
    client.call(Call::SetBudget(budget), &[], |_| {}).unwrap();
    client
        .call(Call::Collect(collect.clone()), &[], |_| {})
        .unwrap();
    assert_eq!(list(&mut client).len(), 1);
    let guest = bounded("a guest", move || {
        for number in 0..2048 {
            let page = guest.page(number).unwrap();
            assert!(page == memory[number * 4096..][..4096], "page {number}");
        }
        guest
    });
    drop(guest);
    eventually("it is removed", || {
        client
            .call(Call::Collect(collect.clone()), &[], |_| {})
            .unwrap();
        list(&mut client).is_empty()
    });
    for folder in ["templates", "touched"] {
        let folder = place.path().join(folder);
        eventually("its files", || {
            std::fs::read_dir(&folder).unwrap().next().is_none()
        });
    }
}

#[test]
fn without_descriptors_calls_fail_and_with_them_they_work_again() {
    let place = Place::new();
    let keeper = keeper(&place, 40);
    let mut client = keeper.connect().unwrap();
    let (id, memory) = capture(&mut client, 11, "one");
    let (before, _) = taken(&place);
    let socket = place.path().join("keeper.sock");
    let crowd: Vec<_> = (0..100)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    eventually("all descriptors are taken", || taken(&place).0 >= 39);
    let begin_call = v1::Begin {
        memory_bytes: MIB,
        disk_bytes: MIB,
        ..v1::Begin::default()
    };
    for _ in 0..3 {
        let (_, message) = refused(client.call(Call::Begin(begin_call.clone()), &[], |_| {}));
        assert!(message.contains("Too many open files"), "{message}");
    }
    drop(crowd);
    // Some of them still wait to be taken, and to be found closed.
    eventually("it serves again", || match open(&mut client, &id) {
        Ok((opened, files)) => {
            assert!(opened.has_memory && content(&files[1]) == memory);
            true
        }
        Err(error) => {
            let is_short = error.to_string().contains("Too many open files");
            assert!(is_short, "{error}");
            false
        }
    });
    eventually("descriptors are given back", || {
        taken(&place).0 <= before + 2
    });
}

#[test]
fn files_that_are_cut_or_as_large_as_can_be_are_told_and_cost_nothing() {
    let place = Place::new();
    let mut client = place.connect();
    // Cut again and again while it is stored: a snapshot of what was there, or none.
    let (_, files) = begin(&mut client, "");
    let call = v1::Keep {
        has_memory: true,
        has_disk: true,
        sandbox: b"cut".to_vec(),
        memory_bytes: 8 * MIB,
        ..v1::Keep::default()
    };
    let cut = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                files[1].set_len(0).unwrap();
                files[1].set_len(8 * MIB).unwrap();
                files[1].write_all_at(&[7; 1 << 20], MIB).unwrap();
            }
        });
        let (answer, _) = client.call(Call::Keep(call), &[], |_| {})?;
        assert!(matches!(answer, Answer::Accepted(_)), "{answer:?}");
        client.answer(|_| {})
    });
    match cut {
        Ok(_) | Err(KeeperError::Refused { .. }) => {}
        other => panic!("{other:?}"),
    }
    let before = list(&mut client).len();
    // As large as a memory file can be, and empty.
    for in_memory in [false, true] {
        for length in [1_u64 << 43, 1 << 46, 1 << 62] {
            let begin = v1::Begin {
                memory_bytes: length,
                in_memory,
                ..v1::Begin::default()
            };
            let (_, files) = client.call(Call::Begin(begin), &[], |_| {}).unwrap();
            if File::from(files[1].try_clone().unwrap())
                .set_len(length)
                .is_err()
            {
                continue;
            }
            let call = v1::Keep {
                has_memory: true,
                sandbox: b"large".to_vec(),
                memory_bytes: length,
                tags: vec!["large".to_owned()],
                ..v1::Keep::default()
            };
            let kept = client.call(Call::Keep(call), &[], |_| {});
            let kept = kept.and_then(|_| client.answer(|_| {}));
            if let Err(error) = kept {
                assert!(matches!(error, KeeperError::Refused { .. }), "{error:?}");
                continue;
            }
            let open = v1::Open {
                snapshot: "large".to_owned(),
                lazy: true,
                ..v1::Open::default()
            };
            match client.call(Call::Open(open), &[], |_| {}) {
                Ok((Answer::Opened(opened), _)) => assert!(!opened.lazy, "{length:#x}"),
                Err(KeeperError::Refused { code, .. }) => assert_ne!(code, Code::Damaged),
                other => panic!("{other:?}"),
            }
        }
    }
    let (_, peak) = taken(&place);
    assert!(peak < 256 * MIB, "{} MiB", peak / MIB);
    assert!(list(&mut client).len() >= before);
}
