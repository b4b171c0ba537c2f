//! What an agent does with bytes that are no calls: it drops the connection and serves on.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;

use belljar_protocol::client::{CallError, Connection};
use belljar_protocol::{frame, v1};
use proptest::prelude::*;

use common::{Agent, argv, exited, soon, wait_until};

#[test]
fn any_bytes_leave_the_agent_alive_and_close_the_connection() {
    let agent = Agent::start();
    let descriptors = agent.settled_descriptors();
    let mut runner = proptest::test_runner::TestRunner::default();
    let bytes = proptest::collection::vec(any::<u8>(), 1..200);
    runner
        .run(&bytes, |bytes| {
            let mut stream = agent.connect();
            stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            prop_assert!(answer.len() < 4096);
            Ok(())
        })
        .unwrap();
    assert!(agent.is_alive());
    wait_until("all is closed", || agent.open_descriptors() <= descriptors);
}

#[test]
fn a_frame_beyond_the_limit_is_dropped_at_once() {
    let agent = Agent::start();
    let mut stream = agent.connect();
    stream.write_all(&[0xff, 0xff, 0xff, 0xff, 0x0f]).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty());
    assert!(agent.is_alive());
}

#[test]
fn a_call_of_a_later_generation_is_refused_by_name() {
    let agent = Agent::start();
    let mut stream = agent.connect();
    // Field 120 of Request, an empty message: no call that this generation knows.
    stream.write_all(&[3, 0xc2, 0x07, 0x00]).unwrap();
    let reply: v1::Reply = Connection::new(stream)
        .receive("reply", soon())
        .unwrap()
        .unwrap();
    let Some(v1::reply::Result::Error(error)) = reply.result else {
        panic!("{reply:?}")
    };
    assert_eq!(error.code(), v1::error::Code::Unimplemented);
    assert_eq!(reply.generation, belljar_protocol::GENERATION);
    assert!(!reply.abilities.is_empty());
}

#[test]
fn a_request_in_single_bytes_is_served() {
    let agent = Agent::start();
    let request = v1::Request {
        generation: 1,
        deadline_ms: 0,
        call: Some(v1::request::Call::Ping(v1::Ping {})),
    };
    let mut bytes = Vec::new();
    frame::encode(&request, &mut bytes).unwrap();
    let mut stream = agent.connect();
    for byte in bytes {
        stream.write_all(&[byte]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let reply: v1::Reply = Connection::new(stream)
        .receive("reply", soon())
        .unwrap()
        .unwrap();
    assert!(matches!(reply.result, Some(v1::reply::Result::Pong(_))));
}

#[test]
fn garbage_in_place_of_input_ends_the_program_as_lost() {
    let agent = Agent::start();
    let mut exec = agent
        .exec(v1::Exec {
            stdin: v1::exec::Stdin::Stream.into(),
            ..argv(&["sleep", "60"])
        })
        .unwrap();
    let mut raw = exec.stdin().unwrap();
    raw.write(b"fine").unwrap();
    let mut socket = agent_socket(&exec);
    socket.write_all(&[0xff; 8]).unwrap();
    let end = exec.next(soon());
    assert!(
        matches!(
            end,
            Ok(Some(belljar_protocol::client::ExecEvent::Ended(
                v1::end::How::Lost(_)
            )))
        ),
        "{end:?}"
    );
    wait_until("it is killed and reaped", || agent.children().is_empty());
    assert_eq!(agent.run(argv(&["true"])).2, exited(0));
}

fn agent_socket(
    exec: &belljar_protocol::client::Exec<std::os::unix::net::UnixStream>,
) -> std::os::unix::net::UnixStream {
    exec.get_ref().try_clone().unwrap()
}

#[test]
fn many_half_requests_do_not_grow_the_agent() {
    let agent = Agent::start();
    agent.run(argv(&["true"]));
    let before = agent.resident_kib();
    // Each announces a megabyte and sends one byte.
    let mut streams = Vec::new();
    for _ in 0..100 {
        let mut stream = agent.connect();
        stream.write_all(&[0x80, 0x80, 0x40, 1]).unwrap();
        streams.push(stream);
    }
    assert!(agent.is_alive());
    assert!(
        agent.resident_kib() < before + 4096,
        "{} KiB",
        agent.resident_kib()
    );
}

#[test]
fn an_argument_list_beyond_the_systems_limit_is_a_typed_failure() {
    let agent = Agent::start();
    let word = "x".repeat(200_000);
    let failure = agent.exec(argv(&["true", &word])).map(|exec| exec.pid());
    let Err(CallError::SpawnFailed(failure)) = failure else {
        panic!("{failure:?}")
    };
    assert_eq!(failure.errno, 7, "{}", failure.message);
}
