use std::io::{Read, Write};
use std::thread;

use belljar_protocol::client::Connection;
use belljar_protocol::frame;
use belljar_protocol::v1::{self, end::How, exec_output::Output, reply::Result as Answer};

use super::*;

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(10))
}

/// Runs `agent` as the guest of one exec; returns the outcome and what came out.
fn run_with(
    stdin: Option<&UnixStream>,
    agent: impl FnOnce(&mut Connection<UnixStream>) + Send + 'static,
) -> (Result<Outcome, ExecError>, Vec<u8>, Vec<u8>) {
    let (host, guest) = UnixStream::pair().unwrap();
    let guest = thread::spawn(move || {
        let mut guest = Connection::new(guest);
        let _: Option<v1::Request> = guest.receive("request", soon()).unwrap();
        agent(&mut guest);
    });
    let (mut out_reader, out) = io::pipe().unwrap();
    let (mut err_reader, err) = io::pipe().unwrap();
    let collect = thread::spawn(move || {
        let mut bytes = Vec::new();
        out_reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let streams = Streams {
        stdin: stdin.map(AsFd::as_fd),
        stdout: out.as_fd(),
        stderr: err.as_fd(),
        signals: None,
    };
    let outcome = exec(host, &ExecSpec::default(), streams);
    drop((out, err));
    let mut errors = Vec::new();
    err_reader.read_to_end(&mut errors).unwrap();
    guest.join().unwrap();
    (outcome, collect.join().unwrap(), errors)
}

fn reply(guest: &mut Connection<UnixStream>, result: Answer) {
    let reply = v1::Reply {
        result: Some(result),
        ..v1::Reply::default()
    };
    guest.send(&reply, "reply", soon()).unwrap();
}

fn started(guest: &mut Connection<UnixStream>) {
    reply(
        guest,
        Answer::Exec(v1::ExecStarted {
            pid: 9,
            ..v1::ExecStarted::default()
        }),
    );
}

fn say(guest: &mut Connection<UnixStream>, output: Output) {
    let output = Some(output);
    guest
        .send(&v1::ExecOutput { output }, "output", soon())
        .unwrap();
}

fn end(guest: &mut Connection<UnixStream>, code: u32) {
    let how = Some(How::Exited(v1::Exited { code }));
    say(
        guest,
        Output::End(v1::End {
            how,
            ..v1::End::default()
        }),
    );
}

#[test]
fn output_and_status_come_out() {
    let (outcome, out, err) = run_with(None, |guest| {
        started(guest);
        for _ in 0..64 {
            say(guest, Output::Stdout(vec![b'o'; 60_000]));
        }
        say(guest, Output::Stderr(b"oops".to_vec()));
        end(guest, 7);
    });
    assert_eq!(outcome.unwrap().exit_status(), 7);
    assert_eq!(out.len(), 64 * 60_000);
    assert_eq!(err, b"oops");
}

#[test]
fn input_arrives_whole_and_its_end_is_told() {
    let (input, mut writer) = UnixStream::pair().unwrap();
    let writer = thread::spawn(move || writer.write_all(&[b'i'; 300_000]).unwrap());
    let (outcome, ..) = run_with(Some(&input), |guest| {
        started(guest);
        let mut total = 0;
        loop {
            let message: v1::ExecInput = guest.receive("input", soon()).unwrap().unwrap();
            match message.input.unwrap() {
                v1::exec_input::Input::Stdin(bytes) => total += bytes.len(),
                v1::exec_input::Input::StdinEof(_) => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(total, 300_000);
        end(guest, 0);
    });
    writer.join().unwrap();
    assert_eq!(outcome.unwrap().exit_status(), 0);
}

#[test]
fn an_input_that_never_ends_does_not_keep_a_command_that_ends() {
    let (input, _never_closed) = UnixStream::pair().unwrap();
    let (outcome, ..) = run_with(Some(&input), |guest| {
        started(guest);
        end(guest, 3);
    });
    assert_eq!(outcome.unwrap().exit_status(), 3);
}

#[test]
fn failures_to_start_have_the_usual_statuses() {
    use v1::spawn_failure::Kind;
    for (kind, status) in [
        (Kind::NotFound, 127),
        (Kind::NotExecutable, 126),
        (Kind::BadCwd, 125),
    ] {
        let (outcome, ..) = run_with(None, move |guest| {
            let failure = v1::SpawnFailure {
                kind: kind.into(),
                errno: 2,
                message: "no such program: x".into(),
            };
            reply(guest, Answer::SpawnFailure(failure));
        });
        let error = outcome.unwrap_err();
        assert_eq!(error.exit_status(), status);
        assert!(error.to_string().contains("no such program"));
    }
}

#[test]
fn a_cut_connection_is_never_a_success() {
    let (outcome, ..) = run_with(None, started);
    assert!(
        matches!(&outcome, Ok(Outcome::Ended(How::Lost(_)))),
        "{outcome:?}"
    );
    assert_eq!(outcome.unwrap().exit_status(), 125);
    let (outcome, ..) = run_with(None, |_| {});
    assert!(matches!(outcome, Err(ExecError::CutBeforeStart)));
}

#[test]
fn a_guest_that_hangs_does_not_defeat_the_limit() {
    let (host, guest) = UnixStream::pair().unwrap();
    let (_reader, out) = io::pipe().unwrap();
    let spec = ExecSpec::default();
    let mut guest = Connection::new(guest);
    started(&mut guest);
    let pump = Pump {
        wire: Wire::start(&request(&spec, false)).unwrap(),
        stream: host,
        stdin: None,
        stdout: Sink::new(out.as_fd()),
        stderr: Sink::new(out.as_fd()),
        signals: None,
        interrupts: 0,
        start_by: Instant::now() + Duration::from_secs(10),
        end_by: Some(Instant::now() + Duration::from_millis(50)),
    };
    let outcome = pump.run().unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    assert_eq!(outcome.exit_status(), 124);
}

#[test]
fn a_reader_that_stops_does_not_defeat_the_limit() {
    let (host, guest) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let (_reader, out) = io::pipe().unwrap();
    let agent = thread::spawn(move || {
        let mut guest = Connection::new(guest);
        started(&mut guest);
        let mut bytes = Vec::new();
        frame::encode_chunk(1, &[b'x'; 60_000], &mut bytes);
        let mut stream = guest.get_ref();
        while stream.write_all(&bytes).is_ok() {}
    });
    let pump = Pump {
        wire: Wire::start(&request(&ExecSpec::default(), false)).unwrap(),
        stream: host,
        stdin: None,
        stdout: Sink::new(out.as_fd()),
        stderr: Sink::new(out.as_fd()),
        signals: None,
        interrupts: 0,
        start_by: Instant::now() + Duration::from_secs(10),
        end_by: Some(Instant::now() + Duration::from_millis(200)),
    };
    assert_eq!(pump.run().unwrap(), Outcome::TimedOut);
    agent.join().unwrap();
}

#[test]
fn a_reader_that_is_gone_ends_it() {
    let (host, guest) = UnixStream::pair().unwrap();
    let (reader, out) = io::pipe().unwrap();
    drop(reader);
    let mut guest = Connection::new(guest);
    started(&mut guest);
    say(&mut guest, Output::Stdout(b"x".to_vec()));
    let streams = Streams {
        stdin: None,
        stdout: out.as_fd(),
        stderr: out.as_fd(),
        signals: None,
    };
    let outcome = exec(host, &ExecSpec::default(), streams).unwrap();
    assert_eq!(outcome, Outcome::OutputClosed);
    assert_eq!(outcome.exit_status(), 141);
}

#[test]
fn every_end_has_its_status() {
    let signalled = How::Signalled(v1::Signalled {
        number: 15,
        core_dumped: false,
    });
    for (how, status) in [
        (How::Exited(v1::Exited { code: 0 }), 0),
        (How::Exited(v1::Exited { code: 70_000 }), 255),
        (signalled, 143),
        (How::TimedOut(v1::TimedOut { killed: true }), 124),
        (How::OutOfMemory(v1::OutOfMemory {}), 137),
    ] {
        assert_eq!(Outcome::Ended(how).exit_status(), status);
    }
    assert_eq!(Outcome::GivenUp(2).exit_status(), 130);
}
