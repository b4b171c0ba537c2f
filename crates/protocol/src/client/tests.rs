use std::thread;

use super::*;
use crate::v1::{end::How, exec_output::Output, reply::Result as Answer};

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(5))
}

/// An agent that reads one request, writes `bytes` and hangs up.
fn agent(bytes: Vec<u8>) -> UnixStream {
    let (host, guest) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut guest = Connection::new(guest);
        let _: Option<v1::Request> = guest.receive("request", soon()).unwrap();
        guest.stream.write_all(&bytes).unwrap();
    });
    host
}

fn reply(result: Answer) -> Vec<u8> {
    let mut bytes = Vec::new();
    let reply = v1::Reply {
        generation: 7,
        abilities: vec![v1::Ability::Exec as i32, 999],
        degraded: String::new(),
        result: Some(result),
    };
    frame::encode(&reply, &mut bytes).unwrap();
    bytes
}

fn output(output: Output, bytes: &mut Vec<u8>) {
    let output = Some(output);
    frame::encode(&v1::ExecOutput { output }, bytes).unwrap();
}

#[test]
fn a_later_agent_is_understood() {
    let bytes = reply(Answer::Pong(v1::Pong {
        boottime_ns: 5,
        ..v1::Pong::default()
    }));
    let (info, pong) = ping(agent(bytes), soon()).unwrap();
    assert_eq!((info.generation, pong.boottime_ns), (7, 5));
    assert!(info.has(v1::Ability::Exec));
    assert!(!info.has(v1::Ability::Shutdown));
}

#[test]
fn refusals_and_spawn_failures_are_typed() {
    let error = v1::Error {
        code: v1::error::Code::Busy.into(),
        message: "full".to_owned(),
        ..v1::Error::default()
    };
    let refused = ping(agent(reply(Answer::Error(error))), soon()).unwrap_err();
    assert!(matches!(
        refused,
        CallError::Refused { code: v1::error::Code::Busy, ref message, .. } if message == "full"
    ));
    let failure = v1::SpawnFailure {
        kind: v1::spawn_failure::Kind::NotFound.into(),
        errno: 2,
        message: "no such program: x".to_owned(),
    };
    let bytes = reply(Answer::SpawnFailure(failure.clone()));
    let failed = Exec::start(agent(bytes), v1::Exec::default(), soon()).unwrap_err();
    assert!(matches!(failed, CallError::SpawnFailed(ref got) if *got == failure));
}

#[test]
fn exec_collects_both_streams_and_the_end() {
    let mut bytes = reply(Answer::Exec(v1::ExecStarted {
        pid: 42,
        ..v1::ExecStarted::default()
    }));
    output(Output::Stdout(b"ab".to_vec()), &mut bytes);
    output(Output::Stderr(b"E".to_vec()), &mut bytes);
    output(Output::Stdout(b"cd".to_vec()), &mut bytes);
    let how = How::Exited(v1::Exited { code: 3 });
    output(
        Output::End(v1::End {
            how: Some(how),
            ..v1::End::default()
        }),
        &mut bytes,
    );
    let exec = Exec::start(agent(bytes), v1::Exec::default(), soon()).unwrap();
    assert_eq!(exec.pid(), 42);
    let (stdout, stderr, how) = exec.finish(1 << 20, soon()).unwrap();
    assert_eq!(
        (stdout.as_slice(), stderr.as_slice()),
        (&b"abcd"[..], &b"E"[..])
    );
    assert_eq!(how, How::Exited(v1::Exited { code: 3 }));
}

#[test]
fn a_cut_stream_is_lost_wherever_it_is_cut() {
    let mut whole = reply(Answer::Exec(v1::ExecStarted {
        pid: 42,
        ..v1::ExecStarted::default()
    }));
    let head = whole.len();
    output(Output::Stdout(vec![b'x'; 300]), &mut whole);
    for cut in [head, head + 1, head + 5, whole.len()] {
        let mut exec =
            Exec::start(agent(whole[..cut].to_vec()), v1::Exec::default(), soon()).unwrap();
        if cut == whole.len() {
            let event = exec.next(soon()).unwrap();
            assert_eq!(event, Some(ExecEvent::Stdout(vec![b'x'; 300])));
        }
        let event = exec.next(soon()).unwrap();
        assert!(
            matches!(event, Some(ExecEvent::Ended(How::Lost(_)))),
            "{event:?}"
        );
        assert_eq!(exec.next(soon()).unwrap(), None);
    }
}

#[test]
fn a_hang_up_before_the_reply_is_no_time_out() {
    let error = ping(agent(Vec::new()), soon()).unwrap_err();
    assert!(matches!(error, CallError::Closed { .. }), "{error}");
}

#[test]
fn silence_ends_at_the_deadline() {
    let (host, _guest) = UnixStream::pair().unwrap();
    let deadline = Some(Instant::now() + Duration::from_millis(30));
    let error = ping(host, deadline).unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");
}

#[test]
fn a_trickling_agent_cannot_stretch_the_deadline() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        // A frame of 100 bytes, one byte every 20 ms.
        for byte in [100_u8; 100] {
            if guest.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let start = Instant::now();
    let error = ping(host, Some(start + Duration::from_millis(100))).unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn an_oversized_frame_is_an_error() {
    let error = ping(agent(vec![0xff, 0xff, 0xff, 0x7f]), soon()).unwrap_err();
    assert!(matches!(error, CallError::Frame { .. }), "{error}");
}

#[test]
fn an_agent_that_does_not_know_a_call_is_named_by_its_generation() {
    let error = v1::Error {
        code: v1::error::Code::Unimplemented.into(),
        ..v1::Error::default()
    };
    let refused = process::list(agent(reply(Answer::Error(error))), true, soon()).unwrap_err();
    assert!(refused.to_string().contains("generation 7"), "{refused}");
}

#[test]
fn waiting_tells_a_limit_from_an_end() {
    let by_name = v1::ProcessRef {
        r#ref: Some(v1::process_ref::Ref::Name("job".to_owned())),
    };
    let late = v1::Error {
        code: v1::error::Code::Deadline.into(),
        ..v1::Error::default()
    };
    let limit = Some(Duration::from_secs(1));
    let got = process::wait(agent(reply(Answer::Error(late))), by_name.clone(), limit).unwrap();
    assert_eq!(got, None);
    let info = v1::ProcessInfo {
        id: 3,
        ..v1::ProcessInfo::default()
    };
    let bytes = reply(Answer::WaitEnd(info.clone()));
    let got = process::wait(agent(bytes), by_name.clone(), limit).unwrap();
    assert_eq!(got, Some(info));
    let bytes = reply(Answer::Forget(v1::Forgotten {}));
    let wrong = process::wait(agent(bytes), by_name, limit).unwrap_err();
    assert!(matches!(wrong, CallError::Unexpected(_)), "{wrong}");
}
