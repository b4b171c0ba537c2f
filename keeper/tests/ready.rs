//! Supervisors that do not do what they should, as the keeper starts them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use belljar_keeper::client::Client;
use belljar_keeper::v1::{self, reply::Result as Answer, request::Call};

mod common;

use common::{Place, capture, list};

/// A program that writes down that it was started, and then does something.
fn program(dir: &Path, name: &str, does: &str) -> String {
    let path = dir.join(name);
    let started = dir.join(format!("{name}.started"));
    let text = format!("#!/bin/sh\necho $$ >>{}\n{does}\n", started.display());
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn started(dir: &Path, name: &str) -> usize {
    let text = fs::read_to_string(dir.join(format!("{name}.started"))).unwrap_or_default();
    text.lines().count()
}

fn open(client: &mut Client, supervisor: &str) -> (v1::Opened, Vec<OwnedFd>) {
    let open = v1::Open {
        snapshot: "one".to_owned(),
        programs: Some(v1::Programs {
            supervisor: supervisor.to_owned(),
            vmm: "/bin/true".to_owned(),
        }),
        ..v1::Open::default()
    };
    match client.call(Call::Open(open), &[], |_| {}).unwrap() {
        (Answer::Opened(opened), files) => (opened, files),
        other => panic!("{other:?}"),
    }
}

fn ready(client: &mut Client) -> u64 {
    match client
        .call(Call::Usage(v1::GetUsage {}), &[], |_| {})
        .unwrap()
    {
        (Answer::Usage(usage), _) => usage.ready_vmms,
        other => panic!("{other:?}"),
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_supervisor_that_fails_lies_or_hangs_is_in_nobodys_way() {
    let place = Place::new();
    let dir = place.dir.path();
    let mut client = place.connect();
    capture(&mut client, 1, "one");
    // It is there, or not; it ends, says something else, or refuses.
    for (name, does) in [
        ("ends", "exit 3"),
        ("lies", "printf '\\001\\377' >&0; exec cat >/dev/null"),
        (
            "refuses",
            "printf '\\006\\012\\004nope' >&0; exec cat >/dev/null",
        ),
        ("hangs", "exec sleep 1000"),
    ] {
        let supervisor = program(dir, name, does);
        assert!(!open(&mut client, &supervisor).0.ready);
        eventually(name, || started(dir, name) > 0);
        // Others are served.
        assert_eq!(list(&mut client).len(), 1);
        assert!(!open(&mut client, &supervisor).0.ready);
        assert_eq!(ready(&mut client), 0);
    }
    let hanging = fs::read_to_string(dir.join("hangs.started")).unwrap();
    assert!(!open(&mut client, "/nowhere/supervisor").0.ready);
    let log = fs::read_to_string(place.path().join("keeper.log")).unwrap();
    assert!(log.contains("no VMM is made ready: nope"), "{log}");
    for pid in hanging.lines() {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }

    // One that does what it should, as far as the keeper sees: each is given away once, and hung up on with the keeper.
    let good = program(
        dir,
        "good",
        "printf '\\002\\020\\007' >&0; exec cat >/dev/null",
    );
    assert!(!open(&mut client, &good).0.ready);
    eventually("two of them", || ready(&mut client) == 2);
    let mut files = Vec::new();
    eventually("one of them", || {
        let (opened, got) = open(&mut client, &good);
        files = got;
        opened.ready
    });
    assert_eq!(files.len(), 5, "state, memory, disk, socket, pidfd");
    eventually("another one", || started(dir, "good") >= 3);
    drop(client);
    place.kill();
    let alive = || {
        let text = fs::read_to_string(dir.join("good.started")).unwrap();
        let pids = text.lines().map(|pid| format!("/proc/{pid}/comm"));
        let comms = pids.filter_map(|comm| fs::read_to_string(comm).ok());
        comms.filter(|comm| comm.trim() == "cat").count()
    };
    eventually("those that waited to end", || alive() == 1);
    drop(files);
    eventually("the other one to end", || alive() == 0);
}
