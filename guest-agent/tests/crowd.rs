//! More connections than the agent has threads for.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::client::{self, CallError, Connection};
use belljar_protocol::v1::{self, error::Code, request::Call};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use common::{Agent, soon, wait_until};

/// As many threads as the agent makes, and some.
const CROWD: usize = 1300;

fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

fn is_closed(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    !matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn connections_that_say_nothing_make_room() {
    allow_descriptors();
    let agent = Agent::start();
    let silent: Vec<_> = (0..CROWD).map(|_| agent.connect()).collect();
    let asked = Instant::now();
    client::ping(agent.connect(), soon()).unwrap();
    // Far less than the time after which all of them are closed for being late.
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert!(is_closed(&silent[0]));
    assert!(!is_closed(&silent[CROWD - 1]));
}

/// Begins to write a file that is never complete: a call that lasts.
fn lasting(agent: &Agent, path: &std::path::Path) -> Result<Connection<UnixStream>, CallError> {
    let mut connection = Connection::new(agent.connect());
    let write = v1::WriteFile {
        path: path.as_os_str().as_encoded_bytes().to_vec(),
        mode: v1::write_file::Mode::New.into(),
        ..v1::WriteFile::default()
    };
    connection.call(Call::WriteFile(write), "write", soon())?;
    Ok(connection)
}

#[test]
fn a_call_too_many_is_refused_and_a_ping_is_answered() {
    allow_descriptors();
    let agent = Agent::start();
    let folder = tempfile::tempdir().unwrap();
    let mut calls = Vec::new();
    let refused = loop {
        assert!(calls.len() < CROWD, "there is no limit");
        match lasting(&agent, &folder.path().join(calls.len().to_string())) {
            Ok(call) => calls.push(call),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(
            refused,
            CallError::Refused {
                code: Code::Busy,
                ..
            }
        ),
        "{refused}"
    );
    assert!(calls.len() > 1000, "{}", calls.len());
    assert!(agent.is_alive());
    calls.clear();
    wait_until("there is room again", || {
        lasting(&agent, &folder.path().join("again")).is_ok()
    });
}
