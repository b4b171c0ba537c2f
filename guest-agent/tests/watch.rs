//! Watches on a real file system.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use belljar_protocol::client::CallError;
use belljar_protocol::client::watch::{WatchReader, unwatch};
use belljar_protocol::v1::{self, error::Code, watch_event::What};

use common::{Agent, soon, wait_until};

type Reader = WatchReader<UnixStream>;

fn call(path: &Path) -> v1::Watch {
    v1::Watch {
        path: path.as_os_str().as_encoded_bytes().to_vec(),
        recursive: true,
        ..v1::Watch::default()
    }
}

fn watch(agent: &Agent, path: &Path) -> Reader {
    WatchReader::start(agent.connect(), call(path), soon()).unwrap()
}

fn code(result: Result<Reader, CallError>) -> (Code, u32) {
    match result {
        Err(CallError::Refused { code, errno, .. }) => (code, errno),
        other => panic!("not refused: {other:?}"),
    }
}

fn text(event: &v1::WatchEvent) -> String {
    let path = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    let slash = if event.is_directory { "/" } else { "" };
    match event.what.as_ref().unwrap() {
        What::Created(at) => format!("created {}{slash}", path(at)),
        What::Changed(at) => format!("changed {}{slash}", path(at)),
        What::Attributes(at) => format!("attributes {}{slash}", path(at)),
        What::Removed(at) => format!("removed {}{slash}", path(at)),
        What::Moved(moved) => format!("moved {} {}{slash}", path(&moved.from), path(&moved.to)),
        What::Overflow(_) => "overflow".to_owned(),
        What::Gone(_) => "gone".to_owned(),
    }
}

fn next(reader: &mut Reader) -> String {
    text(&reader.next(soon()).unwrap().unwrap())
}

/// Events up to the creation of a file that is made now.
fn up_to_now(reader: &mut Reader, folder: &Path) -> Vec<String> {
    fs::create_dir(folder.join("now")).unwrap();
    let mut events = Vec::new();
    loop {
        match next(reader) {
            last if last == "created now/" => break,
            event => events.push(event),
        }
    }
    fs::remove_dir(folder.join("now")).unwrap();
    assert_eq!(next(reader), "removed now/");
    events
}

#[test]
fn each_kind_of_event_is_told_once() {
    let agent = Agent::start_worker();
    let keep = tempfile::tempdir().unwrap();
    let folder = keep.path();
    fs::create_dir_all(folder.join("a/b")).unwrap();
    fs::write(folder.join("a/old"), "x").unwrap();
    let mut reader = watch(&agent, folder);
    assert_eq!(reader.started().directories, 3);

    fs::write(folder.join("a/b/new"), "x").unwrap();
    let events = up_to_now(&mut reader, folder);
    assert_eq!(events, ["created a/b/new", "changed a/b/new"]);

    fs::set_permissions(
        folder.join("a/old"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    assert_eq!(up_to_now(&mut reader, folder), ["attributes a/old"]);

    fs::rename(folder.join("a/old"), folder.join("a/b/older")).unwrap();
    assert_eq!(up_to_now(&mut reader, folder), ["moved a/old a/b/older"]);

    // What is in a directory goes with it.
    fs::rename(folder.join("a/b"), folder.join("c")).unwrap();
    fs::remove_file(folder.join("c/older")).unwrap();
    assert_eq!(
        up_to_now(&mut reader, folder),
        ["moved a/b c/", "removed c/older"]
    );

    // Across the border.
    let outside = tempfile::tempdir_in(keep.path().parent().unwrap()).unwrap();
    fs::rename(folder.join("c"), outside.path().join("c")).unwrap();
    fs::write(outside.path().join("c/unseen"), "").unwrap();
    fs::create_dir(outside.path().join("c/d")).unwrap();
    assert_eq!(next(&mut reader), "removed c/");
    fs::rename(outside.path().join("c"), folder.join("a/c")).unwrap();
    let events: BTreeSet<String> = up_to_now(&mut reader, folder).into_iter().collect();
    let expected = [
        "created a/c/",
        "created a/c/d/",
        "created a/c/new",
        "created a/c/unseen",
    ];
    assert_eq!(events, expected.map(str::to_owned).into());
}

#[test]
fn a_file_that_stays_open_is_told_within_a_second() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let mut file = fs::File::create(folder.path().join("log")).unwrap();
    let mut reader = watch(&agent, folder.path());
    for _ in 0..3 {
        file.write_all(b"line\n").unwrap();
        let begin = Instant::now();
        assert_eq!(next(&mut reader), "changed log");
        assert!(begin.elapsed() < Duration::from_millis(1500));
    }
    drop(file);
    assert_eq!(next(&mut reader), "changed log");
}

#[test]
fn directories_made_while_they_are_looked_at_are_covered() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let maker = std::thread::spawn(move || {
        for outer in 0..40 {
            for inner in 0..10 {
                let deep = path.join(format!("{outer}/{inner}/x/y"));
                fs::create_dir_all(&deep).unwrap();
                fs::write(deep.join("file"), "").unwrap();
            }
        }
    });
    // In the middle of it.
    wait_until("it is under way", || folder.path().join("5").exists());
    let mut reader = watch(&agent, folder.path());
    maker.join().unwrap();
    // Everything that is not told was there before.
    let mut told: BTreeSet<String> = BTreeSet::new();
    for event in up_to_now(&mut reader, folder.path()) {
        assert_ne!(event, "overflow");
        told.extend(event.strip_prefix("created ").map(str::to_owned));
    }
    assert!(told.contains("39/9/x/y/file"), "{}", told.len());
    assert!(told.contains("20/"), "{}", told.len());
    // And it is watched.
    for outer in 0..40 {
        for inner in 0..10 {
            let file = format!("{outer}/{inner}/x/y/later");
            fs::write(folder.path().join(&file), "").unwrap();
            assert_eq!(next(&mut reader), format!("created {file}"));
            assert_eq!(next(&mut reader), format!("changed {file}"));
        }
    }
}

#[test]
fn a_cursor_survives_its_connection() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let mut reader = watch(&agent, folder.path());
    let id = reader.started().id;
    fs::create_dir(folder.path().join("one")).unwrap();
    let first = reader.next(soon()).unwrap().unwrap();
    assert_eq!(text(&first), "created one/");
    drop(reader);
    fs::create_dir(folder.path().join("two")).unwrap();
    fs::create_dir(folder.path().join("three")).unwrap();
    let again = |from: u64| {
        let call = v1::Watch {
            id,
            from,
            ..v1::Watch::default()
        };
        WatchReader::start(agent.connect(), call, soon())
    };
    let mut reader = again(first.sequence + 1).unwrap();
    assert_eq!(reader.started().next, first.sequence + 1);
    assert_eq!(next(&mut reader), "created two/");
    assert_eq!(next(&mut reader), "created three/");
    // Two at once, from anywhere.
    let mut second = again(first.sequence).unwrap();
    assert_eq!(next(&mut second), "created one/");
    // A number that was never given.
    let mut strange = again(1_000_000).unwrap();
    assert_eq!(next(&mut strange), "overflow");
    assert_eq!(next(&mut strange), "created one/");

    unwatch(agent.connect(), id, soon()).unwrap();
    assert!(reader.next(soon()).unwrap().is_none());
    assert_eq!(code(again(1)).0, Code::NotFound);
    assert!(unwatch(agent.connect(), id, soon()).is_err());
}

#[test]
fn what_is_known_by_now_can_be_asked_for() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let begun = v1::Watch {
        no_follow: true,
        ..call(folder.path())
    };
    let mut reader = WatchReader::start(agent.connect(), begun, soon()).unwrap();
    let id = reader.started().id;
    assert!(reader.next(soon()).unwrap().is_none());
    fs::create_dir(folder.path().join("one")).unwrap();
    let asked = v1::Watch {
        id,
        from: 1,
        no_follow: true,
        ..v1::Watch::default()
    };
    wait_until("it is known", || {
        let mut reader = WatchReader::start(agent.connect(), asked.clone(), soon()).unwrap();
        let event = reader.next(soon()).unwrap();
        event.is_some_and(|event| text(&event) == "created one/")
    });
}

#[test]
fn nobody_reading_is_a_bounded_queue_and_then_an_overflow() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let reader = watch(&agent, folder.path());
    let id = reader.started().id;
    drop(reader);
    for number in 0..40_000 {
        let path = folder.path().join(number.to_string());
        fs::write(&path, "").unwrap();
        fs::remove_file(&path).unwrap();
    }
    let before = agent.resident_kib();
    assert!(before < 40_000, "{before} KiB");
    let call = v1::Watch {
        id,
        from: 1,
        ..v1::Watch::default()
    };
    let mut reader = WatchReader::start(agent.connect(), call, soon()).unwrap();
    assert!(reader.started().next > 1);
    assert_eq!(next(&mut reader), "overflow");
    fs::create_dir(folder.path().join("last")).unwrap();
    while next(&mut reader) != "created last/" {}
}

#[test]
fn many_files_in_many_directories_are_all_told() {
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let mut reader = watch(&agent, folder.path());
    let maker = std::thread::spawn(move || {
        for outer in 0..500 {
            let folder = path.join(outer.to_string());
            fs::create_dir(&folder).unwrap();
            for inner in 0..40 {
                rustix::fs::symlink("x", folder.join(inner.to_string())).unwrap();
            }
        }
        fs::create_dir(path.join("end")).unwrap();
    });
    let mut told = BTreeSet::new();
    loop {
        let event = next(&mut reader);
        assert_ne!(event, "overflow");
        if event == "created end/" {
            break;
        }
        told.insert(event);
    }
    maker.join().unwrap();
    assert_eq!(told.len(), 20_500);
}

#[test]
fn the_end_of_what_is_watched_is_told() {
    let agent = Agent::start_worker();
    let keep = tempfile::tempdir().unwrap();
    let folder = keep.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let mut reader = watch(&agent, &folder);
    fs::remove_dir(&folder).unwrap();
    while next(&mut reader) != "gone" {}
    assert!(reader.next(soon()).unwrap().is_none());

    // A file that is replaced as editors do.
    let file = keep.path().join("file");
    fs::write(&file, "1").unwrap();
    let mut reader = watch(&agent, &file);
    fs::write(&file, "2").unwrap();
    assert_eq!(next(&mut reader), "changed ");
    fs::write(keep.path().join("other"), "3").unwrap();
    fs::rename(keep.path().join("other"), &file).unwrap();
    while next(&mut reader) != "gone" {}

    let before = agent.settled_descriptors();
    drop(reader);
    assert!(agent.settled_descriptors() <= before);
}

#[test]
fn a_user_learns_of_what_it_may_read_only() {
    if !rustix::process::getuid().is_root() {
        return;
    }
    let agent = Agent::start_worker();
    let folder = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(path, mode).unwrap();
    };
    mode(folder.path(), 0o755);
    let (open, closed) = (folder.path().join("open"), folder.path().join("closed"));
    fs::create_dir(&open).unwrap();
    fs::create_dir(&closed).unwrap();
    mode(&closed, 0o700);
    let of = |user: &str, path: &Path| v1::Watch {
        user: user.to_owned(),
        ..call(path)
    };
    let start = |call: v1::Watch| WatchReader::start(agent.connect(), call, soon());
    let mut reader = start(of("daemon", folder.path())).unwrap();
    assert_eq!(reader.started().directories, 2);
    fs::create_dir(closed.join("secret")).unwrap();
    fs::create_dir(open.join("known")).unwrap();
    assert_eq!(next(&mut reader), "created open/known/");
    assert_eq!(code(start(of("daemon", &closed))), (Code::System, 13));
    assert_eq!(code(start(of("nobody-here", &open))).0, Code::Invalid);
}

#[test]
fn what_cannot_be_watched_is_told_and_nothing_is_left() {
    let agent = Agent::start_worker();
    let before = agent.settled_descriptors();
    let refused = |path: &str| {
        code(WatchReader::start(
            agent.connect(),
            call(Path::new(path)),
            soon(),
        ))
    };
    assert_eq!(refused("/no/such/folder"), (Code::System, 2));
    assert_eq!(refused("").0, Code::Invalid);
    assert_eq!(refused("a\0b").0, Code::Invalid);
    let folder = tempfile::tempdir().unwrap();
    let short = v1::Watch {
        keep_ms: 50,
        ..call(folder.path())
    };
    // Those without a connection go by themselves.
    let readers: Vec<Reader> = (0..64)
        .map(|_| WatchReader::start(agent.connect(), short.clone(), soon()).unwrap())
        .collect();
    let more = WatchReader::start(agent.connect(), short.clone(), soon());
    assert_eq!(code(more).0, Code::Busy);
    drop(readers);
    wait_until("they are gone", || agent.open_descriptors() <= before);
    WatchReader::start(agent.connect(), short, soon()).unwrap();
}
