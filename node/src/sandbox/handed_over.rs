//! A VMM that waited is given a sandbox, and does not load its snapshot: played, without a guest.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use belljar_keeper::v1::{self as keeper, order::Order};
use belljar_keeper::wire::Connection;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Limits, Programs, Sandbox, create_with};
use crate::snapshots::{Saved, Source};
use crate::stages::Stages;
use crate::state::spec::SandboxSpec;
use crate::state::{self, StateRoot};
use crate::supervisor::{Event, Ready};

/// Reads one request to its end; what it asks for.
fn request(api: &mut UnixStream) -> String {
    let mut text = String::new();
    loop {
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.split_once("Content-Length: ").unwrap().1;
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            if body.len() >= length {
                return head.lines().next().unwrap().to_owned();
            }
        }
        let mut bytes = [0; 4096];
        let count = api.read(&mut bytes).unwrap();
        assert!(count > 0, "{text}");
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
}

fn answer(api: &mut UnixStream, status: &str, body: &str) {
    let length = body.len();
    let text = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}");
    api.write_all(text.as_bytes()).unwrap();
}

/// A supervisor and its VMM, which answers a load so; both end when they are hung up on. What was asked of the VMM.
fn waiting(
    socket: UnixStream,
    mut process: Child,
    status: &'static str,
) -> JoinHandle<[String; 2]> {
    thread::spawn(move || {
        let mut connection = Connection::new(socket);
        let order: keeper::Order = connection.receive().unwrap().unwrap();
        let _files = connection.take(order.descriptors).unwrap();
        let Some(Order::Take(take)) = order.order else {
            panic!("{order:?}")
        };
        let path = Path::new(&take.dir).join(state::API_SOCKET);
        let listener = UnixListener::bind(path).unwrap();
        let mut owner = connection.into_stream();
        Event::Started { pid: process.id() }.send(&mut owner);
        let (mut api, _) = listener.accept().unwrap();
        let console = request(&mut api);
        answer(&mut api, "204 No Content", "");
        let load = request(&mut api);
        answer(&mut api, status, r#"{"fault_message": "as it is"}"#);
        while owner.read(&mut [0; 64]).unwrap() > 0 {}
        process.kill().unwrap();
        process.wait().unwrap();
        [console, load]
    })
}

/// Restores with a VMM that waited and answers so. Whether another one was started, and what was told.
fn restore(status: &'static str) -> (bool, String) {
    let keep = tempfile::tempdir().unwrap();
    let root = StateRoot::at(&keep.path().join("state")).unwrap();
    let program = keep.path().join("program");
    let started = keep.path().join("started");
    fs::write(&program, format!("#!/bin/sh\n: >{}\n", started.display())).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let programs = Programs {
        supervisor: program.clone(),
        vmm: program,
    };
    let process = Command::new("sleep").arg("1000").spawn().unwrap();
    let pidfd = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let record = r#"{"version": 1, "writer": "0", "sandbox": "0badcafe", "lineage": "0badcafe",
        "generation": 0, "spec": {"version": 1, "created_ms": 1, "life": "owned", "vcpus": 1, "memory": 1}}"#;
    let file = || tempfile::tempfile().unwrap();
    let source = Source {
        handler: None,
        working_set: None,
        records: None,
        ready: Some(Ready::new(ours, pidfd)).into(),
        saved: Saved::parse(record.as_bytes()).unwrap(),
        snapshot: None,
        machine: Some((file(), file())),
        disk: None,
        base_images: Default::default(),
        hot: true,
    };
    let played = waiting(theirs, process, status);
    let (dir, lock) = create_with(&root, &SandboxSpec::default(), |_| Ok(())).unwrap();
    let limits = Limits {
        boot: Duration::from_secs(60),
        cancel: None,
    };
    let mut stages = Stages::new(std::time::Instant::now());
    let restored = Sandbox::restore(&dir, lock, &programs, &source, false, limits, &mut stages);
    let error = restored.expect_err("nothing was loaded").to_string();
    let asked = played.join().unwrap();
    assert!(asked[0].contains("/console"), "{asked:?}");
    assert!(asked[1].contains("/snapshot/load"), "{asked:?}");
    (started.exists(), error)
}

#[test]
fn one_that_refuses_is_replaced() {
    let (was_replaced, error) = restore("400 Bad Request");
    assert!(was_replaced, "{error}");
}

/// Its guest may run, and write to its disk: a second one would be the same guest once more.
#[test]
fn one_that_does_not_say_what_became_of_it_is_not_replaced() {
    let (was_replaced, error) = restore("504 Gateway Timeout");
    assert!(!was_replaced, "{error}");
    assert!(error.contains("did not say what became of"), "{error}");
}
