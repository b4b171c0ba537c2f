//! An agent that says anything at all.

use proptest::prelude::*;

use super::super::*;

fn reply(result: Answer) -> Vec<u8> {
    let mut bytes = Vec::new();
    let reply = v1::Reply {
        generation: 2,
        result: Some(result),
        ..v1::Reply::default()
    };
    frame::encode(&reply, &mut bytes).unwrap();
    bytes
}

fn output(output: Output) -> Vec<u8> {
    let mut bytes = Vec::new();
    let output = Some(output);
    frame::encode(&v1::ExecOutput { output }, &mut bytes).unwrap();
    bytes
}

fn streaming() -> Session {
    let exec = v1::Exec {
        owner_key: vec![1; 16],
        name: "x".into(),
        ..v1::Exec::default()
    };
    let mut session = Session::exec(exec, None);
    session.connected(None).unwrap();
    let sent = session.unsent().len();
    session.sent(sent);
    let started = reply(Answer::Exec(v1::ExecStarted {
        pid: 1,
        id: 1,
        existed: false,
    }));
    session.receive(&started, |_| ()).unwrap();
    session
}

fn any_output() -> impl Strategy<Value = Output> {
    let number = prop_oneof![0_u64..100, Just(u64::MAX), any::<u64>()];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..50).prop_map(Output::Stdout),
        proptest::collection::vec(any::<u8>(), 0..50).prop_map(Output::Stderr),
        (any::<i32>(), number.clone(), number.clone())
            .prop_map(|(stream, from, to)| Output::Gap(v1::Gap { stream, from, to })),
        number.prop_map(Output::InputTaken),
        (any::<u32>(), any::<u32>())
            .prop_map(|(columns, rows)| Output::Resized(v1::Terminal { columns, rows })),
        Just(Output::CaughtUp(v1::CaughtUp {})),
    ]
}

proptest! {
    #[test]
    fn any_bytes_end_in_events_or_an_error(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        begun in any::<bool>(),
        greeting in any::<bool>(),
    ) {
        let mut session = if begun {
            streaming()
        } else {
            let mut session = Session::attach(v1::Attach::default());
            session.connected(greeting.then_some(1024)).unwrap();
            session
        };
        if session.receive(&bytes, |_| ()).is_err() {
            prop_assert!(session.disconnected().is_err());
        }
    }

    /// Offsets only grow, and what is held for the guest stays bounded.
    #[test]
    fn any_frames_keep_the_counts_right(
        outputs in proptest::collection::vec(any_output(), 0..60),
        resumed_at in prop_oneof![0_u64..3000, any::<u64>()],
        taken in prop_oneof![0_u64..3000, any::<u64>()],
        typed in 0_usize..400,
    ) {
        let mut session = streaming();
        for (number, message) in outputs.iter().enumerate() {
            session.input(&vec![b'i'; typed]);
            let count = session.unsent().len() / 2;
            session.sent(count);
            if number == 20 {
                session.disconnected().unwrap();
                session.connected(None).unwrap();
                let attached = reply(Answer::Attach(v1::Attached {
                    input_session: 1,
                    input_taken: taken,
                    stdout_from: resumed_at,
                    ..v1::Attached::default()
                }));
                if session.receive(&attached, |_| ()).is_err() {
                    return Ok(());
                }
            }
            if session.receive(&output(message.clone()), |_| ()).is_err() {
                prop_assert!(session.disconnected().is_err());
                return Ok(());
            }
            prop_assert!(session.unsent().len() <= UNSENT_MAX + frame::MAX_CHUNK + 16);
        }
    }
}

#[test]
fn frames_of_the_wrong_place_are_refused() {
    let mut session = streaming();
    // A second head.
    let wrong = reply(Answer::Pong(v1::Pong::default()));
    let _ = session.receive(&wrong, |_| ());
    let mut session = Session::attach(v1::Attach::default());
    session.connected(None).unwrap();
    let error = session
        .receive(&reply(Answer::Pong(v1::Pong::default())), |_| ())
        .unwrap_err();
    assert!(matches!(error, SessionError::Unexpected), "{error}");
}

#[test]
fn more_input_than_was_sent_cannot_be_taken() {
    let mut session = streaming();
    session.input(b"abc");
    let _ = session.unsent().len();
    session
        .receive(&output(Output::InputTaken(3)), |_| ())
        .unwrap();
    let error = session
        .receive(&output(Output::InputTaken(4)), |_| ())
        .unwrap_err();
    assert!(matches!(error, SessionError::Offset), "{error}");
}

#[test]
fn input_that_nobody_takes_is_not_collected_for_ever() {
    let mut session = streaming();
    let mut total = 0;
    while session.wants_input() {
        session.input(&[0; 60_000]);
        total += 60_000;
        let count = session.unsent().len();
        session.sent(count);
    }
    assert!(total < 500_000);
}

#[test]
fn what_follows_the_end_is_not_looked_at() {
    let mut session = streaming();
    let mut bytes = output(Output::End(v1::End::default()));
    bytes.extend_from_slice(&[0xff; 40]);
    let step = session.receive(&bytes, |_| ()).unwrap();
    assert_eq!(step, Step::Over);
    assert!(session.is_over());
}

#[test]
fn a_vmm_that_answers_otherwise_is_quoted_in_bounds() {
    for answer in [&b"HTTP/1.1 400\n"[..], &[b'x'; 100], b"OK x\n", b"OK \n"] {
        let mut session = Session::attach(v1::Attach::default());
        session.connected(Some(1024)).unwrap();
        let error = session.receive(answer, |_| ()).unwrap_err();
        assert!(matches!(error, SessionError::Greeting(_)), "{error}");
    }
}
