use std::collections::VecDeque;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use belljar_protocol::client::Connection;
use belljar_protocol::frame;
use belljar_protocol::v1::{end::How, exec_output::Output, reply::Result as Answer};

use super::super::spec::ExecSpec;
use super::*;

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(10))
}

/// Each dial gives the other end of a new pair to `agents`.
struct Pairs {
    guests: std::sync::mpsc::Sender<UnixStream>,
    refuse: Arc<Mutex<VecDeque<io::ErrorKind>>>,
}

impl Dial for Pairs {
    fn dial(&self) -> io::Result<UnixStream> {
        if let Some(kind) = self.refuse.lock().unwrap().pop_front() {
            return Err(kind.into());
        }
        let (host, guest) = UnixStream::pair()?;
        host.set_nonblocking(true)?;
        self.guests
            .send(guest)
            .map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(host)
    }

    fn port(&self) -> Option<u32> {
        None
    }
}

type Guest = Connection<UnixStream>;
type Told = (Result<Outcome, SessionError>, Vec<u8>, Vec<u8>);

/// Runs `agent` as the guest of one session; each of its calls gets the next connection with its request.
fn run_with(
    spec: &ExecSpec,
    stdin: Option<&UnixStream>,
    refuse: &[io::ErrorKind],
    patience: Patience,
    agent: impl FnOnce(&mut dyn FnMut() -> (Guest, v1::request::Call)) + Send + 'static,
) -> Told {
    let (guests, connections) = std::sync::mpsc::channel();
    let dial = Pairs {
        guests,
        refuse: Arc::new(Mutex::new(refuse.iter().copied().collect())),
    };
    let guest = thread::spawn(move || {
        let mut next = || {
            let mut guest = Connection::new(connections.recv().unwrap());
            let request: v1::Request = guest.receive("request", soon()).unwrap().unwrap();
            (guest, request.call.unwrap())
        };
        agent(&mut next);
    });
    let (mut out_reader, out) = io::pipe().unwrap();
    let (mut err_reader, err) = io::pipe().unwrap();
    let collect = thread::spawn(move || {
        let mut bytes = Vec::new();
        out_reader.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut notice = |_: Notice<'_>| {};
    let mut io = Io::new(out.as_fd(), err.as_fd(), &mut notice);
    io.stdin = stdin.map(AsFd::as_fd);
    io.timeout = spec.timeout;
    let outcome = run(spec.session(), &dial, io, patience);
    drop((out, err, dial));
    let mut errors = Vec::new();
    err_reader.read_to_end(&mut errors).unwrap();
    guest.join().unwrap();
    (outcome, collect.join().unwrap(), errors)
}

fn simple(stdin: Option<&UnixStream>, agent: impl FnOnce(&mut Guest) + Send + 'static) -> Told {
    let spec = ExecSpec {
        stdin: stdin.is_some(),
        ..ExecSpec::default()
    };
    run_with(&spec, stdin, &[], Patience::default(), |next| {
        let (mut guest, _) = next();
        agent(&mut guest);
    })
}

fn reply(guest: &mut Guest, result: Answer) {
    let reply = v1::Reply {
        generation: 2,
        result: Some(result),
        ..v1::Reply::default()
    };
    guest.send(&reply, "reply", soon()).unwrap();
}

fn started(guest: &mut Guest) {
    let started = v1::ExecStarted {
        pid: 9,
        id: 3,
        existed: false,
    };
    reply(guest, Answer::Exec(started));
}

fn say(guest: &mut Guest, output: Output) {
    let output = Some(output);
    guest
        .send(&v1::ExecOutput { output }, "output", soon())
        .unwrap();
}

fn end(guest: &mut Guest, code: u32) {
    let how = Some(How::Exited(v1::Exited { code }));
    let end = v1::End {
        how,
        ..v1::End::default()
    };
    say(guest, Output::End(end));
}

#[test]
fn output_and_status_come_out() {
    let (outcome, out, err) = simple(None, |guest| {
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
    let writer = thread::spawn(move || writer.write_all(&[b'i'; 700_000]).unwrap());
    let (outcome, ..) = simple(Some(&input), |guest| {
        started(guest);
        let mut total = 0;
        loop {
            let message: v1::ExecInput = guest.receive("input", soon()).unwrap().unwrap();
            match message.input.unwrap() {
                v1::exec_input::Input::Stdin(bytes) => total += bytes.len(),
                v1::exec_input::Input::StdinEof(_) => break,
                other => panic!("{other:?}"),
            }
            say(guest, Output::InputTaken(total as u64));
        }
        assert_eq!(total, 700_000);
        end(guest, 0);
    });
    writer.join().unwrap();
    assert_eq!(outcome.unwrap().exit_status(), 0);
}

#[test]
fn an_input_that_never_ends_does_not_keep_a_command_that_ends() {
    let (input, _never_closed) = UnixStream::pair().unwrap();
    let (outcome, ..) = simple(Some(&input), |guest| {
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
        let (outcome, ..) = simple(None, move |guest| {
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
fn a_cut_connection_is_taken_up_at_the_byte_where_it_broke() {
    let spec = ExecSpec::default();
    let (outcome, out, _) = run_with(&spec, None, &[], Patience::default(), |next| {
        let (mut guest, call) = next();
        let v1::request::Call::Exec(exec) = call else {
            panic!("{call:?}")
        };
        started(&mut guest);
        say(&mut guest, Output::Stdout(b"one ".to_vec()));
        drop(guest);
        let (mut guest, call) = next();
        let v1::request::Call::Attach(attach) = call else {
            panic!("{call:?}")
        };
        assert_eq!(attach.owner_key, exec.owner_key);
        assert_eq!(attach.input_session, 1);
        let at = Some(v1::position::At::Offset(4));
        assert_eq!(attach.stdout, Some(v1::Position { at }));
        let attached = v1::Attached {
            input_session: 1,
            stdout_from: 4,
            ..v1::Attached::default()
        };
        reply(&mut guest, Answer::Attach(attached));
        say(&mut guest, Output::Stdout(b"two".to_vec()));
        end(&mut guest, 5);
    });
    assert_eq!(outcome.unwrap().exit_status(), 5);
    assert_eq!(out, b"one two");
}

#[test]
fn a_guest_that_cannot_be_reached_again_is_given_up_truthfully() {
    let patience = Patience {
        resume: Duration::from_millis(150),
        ..Patience::default()
    };
    let spec = ExecSpec::default();
    let begin = Instant::now();
    let (outcome, ..) = run_with(&spec, None, &[], patience, |next| {
        let (mut guest, _) = next();
        started(&mut guest);
        drop(guest);
        // Cut before every reply, until nobody comes any more.
        let quiet = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            loop {
                let _ = next();
            }
        }));
        assert!(quiet.is_err());
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, SessionError::Unreachable { .. }), "{error}");
    assert_eq!(error.exit_status(), 125);
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_full_queue_is_tried_again_and_a_guest_that_is_gone_is_not() {
    let spec = ExecSpec::default();
    let busy = [io::ErrorKind::WouldBlock; 3];
    let (outcome, ..) = run_with(&spec, None, &busy, Patience::default(), |next| {
        let (mut guest, _) = next();
        started(&mut guest);
        end(&mut guest, 0);
    });
    assert_eq!(outcome.unwrap().exit_status(), 0);
    let gone = [io::ErrorKind::ConnectionRefused];
    let (outcome, ..) = run_with(&spec, None, &gone, Patience::default(), |_| ());
    assert!(matches!(outcome, Err(SessionError::Gone(_))));
}

#[test]
fn a_guest_that_hangs_does_not_defeat_the_limit() {
    let spec = ExecSpec {
        timeout: Some(Duration::from_millis(1)),
        ..ExecSpec::default()
    };
    let (host, guest) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let (_reader, out) = io::pipe().unwrap();
    let mut guest = Connection::new(guest);
    started(&mut guest);
    let mut notice = |_: Notice<'_>| {};
    let mut io = Io::new(out.as_fd(), out.as_fd(), &mut notice);
    io.timeout = spec.timeout;
    let dial = Once(Mutex::new(Some(host)));
    let patience = Patience {
        grace: Duration::ZERO,
        ..Patience::default()
    };
    let outcome = run(spec.session(), &dial, io, patience).unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    assert_eq!(outcome.exit_status(), 124);
}

/// A connection that was made before.
struct Once(Mutex<Option<UnixStream>>);

impl Dial for Once {
    fn dial(&self) -> io::Result<UnixStream> {
        let stream = self.0.lock().unwrap().take();
        stream.ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }

    fn port(&self) -> Option<u32> {
        None
    }
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
    let mut notice = |_: Notice<'_>| {};
    let mut io = Io::new(out.as_fd(), out.as_fd(), &mut notice);
    io.timeout = Some(Duration::from_millis(1));
    let dial = Once(Mutex::new(Some(host)));
    let patience = Patience {
        grace: Duration::ZERO,
        ..Patience::default()
    };
    let outcome = run(ExecSpec::default().session(), &dial, io, patience).unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    agent.join().unwrap();
}

/// A command that the agent ends, with output that is more than a pipe holds and is never read.
fn ended_before_a_reader_that_stops(how: How, limit: Duration) -> mpsc::Receiver<Outcome> {
    let (host, guest) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let mut guest = Connection::new(guest);
    started(&mut guest);
    say(&mut guest, Output::Stdout(vec![b'x'; 100_000]));
    let end = v1::End {
        how: Some(how),
        ..v1::End::default()
    };
    say(&mut guest, Output::End(end));
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let (_reader, out) = io::pipe().unwrap();
        let mut notice = |_: Notice<'_>| {};
        let mut io = Io::new(out.as_fd(), out.as_fd(), &mut notice);
        io.timeout = Some(limit);
        let patience = Patience {
            grace: Duration::ZERO,
            ..Patience::default()
        };
        let dial = Once(Mutex::new(Some(host)));
        let _ = sender.send(run(ExecSpec::default().session(), &dial, io, patience).unwrap());
        drop(guest);
    });
    receiver
}

#[test]
fn a_reader_that_stops_keeps_a_command_that_ended_but_not_beyond_its_limit() {
    let timed_out = How::TimedOut(v1::TimedOut { killed: true });
    let over = ended_before_a_reader_that_stops(timed_out, Duration::from_millis(1));
    let outcome = over.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(outcome.exit_status(), 124);
    // In time, and whoever pages through what it said may take any time for that.
    let exited = How::Exited(v1::Exited { code: 0 });
    let waits = ended_before_a_reader_that_stops(exited, Duration::from_millis(1));
    let passed = AGENT_PATIENCE + Duration::from_millis(500);
    assert!(waits.recv_timeout(passed).is_err());
}

#[test]
fn a_reader_that_is_gone_ends_it() {
    let (host, guest) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let (reader, out) = io::pipe().unwrap();
    drop(reader);
    let mut guest = Connection::new(guest);
    started(&mut guest);
    say(&mut guest, Output::Stdout(b"x".to_vec()));
    let mut notice = |_: Notice<'_>| {};
    let io = Io::new(out.as_fd(), out.as_fd(), &mut notice);
    let dial = Once(Mutex::new(Some(host)));
    let session = ExecSpec::default().session();
    let outcome = run(session, &dial, io, Patience::default()).unwrap();
    assert_eq!(outcome, Outcome::OutputClosed);
    assert_eq!(outcome.exit_status(), 141);
}
