//! The worker is killed again and again; no byte is lost, repeated or changed.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use belljar_protocol::client::Connection;
use belljar_protocol::v1::{
    self, exec_input::Input, exec_output::Output, position::At, reply::Result as Answer,
    request::Call,
};

use common::stream::{at, attach, by_name};
use common::{Agent, exited, sh, wait_until};

/// Tries a call until a worker answers it.
fn insist(agent: &Agent, call: &Call) -> (Connection<std::os::unix::net::UnixStream>, Answer) {
    let start = Instant::now();
    loop {
        let mut connection = Connection::new(agent.connect());
        match connection.call(call.clone(), "test", common::soon()) {
            Ok((_, answer)) => return (connection, answer),
            Err(error) => assert!(start.elapsed() < common::PATIENCE, "{error}"),
        }
    }
}

/// Reads a process to its end, over as many connections as it takes, and feeds it input meanwhile.
/// Returns what it wrote to stdout.
fn follow(agent: &Agent, name: &str, exec: v1::Exec, input: &[u8]) -> Vec<u8> {
    let exec = v1::Exec {
        name: name.to_owned(),
        owner_key: name.as_bytes().to_vec(),
        ..exec
    };
    let has_input = exec.stdin() == v1::exec::Stdin::Stream || exec.terminal.is_some();
    // A start whose reply was lost is found by its name.
    let mut first = Some(insist(agent, &Call::Exec(exec)));
    let mut got: Vec<u8> = Vec::new();
    let mut session = 0;
    loop {
        let call = Call::Attach(v1::Attach {
            stdout: at(At::Offset(got.len() as u64)),
            owner_key: name.as_bytes().to_vec(),
            input_session: session,
            // Everything is sent again: what was taken is dropped.
            input_offset: 0,
            ..attach(by_name(name))
        });
        let (mut connection, answer) = insist(agent, &call);
        let Answer::Attach(attached) = answer else {
            panic!("{answer:?}")
        };
        session = attached.input_session;
        // It is not the owner any more.
        drop(first.take());
        let stream = connection.get_ref().try_clone().unwrap();
        let ended = std::thread::scope(|scope| {
            if has_input {
                scope.spawn(move || send_all(&stream, input));
            }
            loop {
                match connection.receive::<v1::ExecOutput>("output", common::soon()) {
                    Ok(Some(message)) => match message.output.unwrap() {
                        Output::Stdout(bytes) => got.extend(bytes),
                        Output::End(end) => return Some(end),
                        Output::Gap(gap) => panic!("{name}: {gap:?}"),
                        _ => {}
                    },
                    Ok(None) | Err(_) => {
                        let _ = connection.get_ref().shutdown(std::net::Shutdown::Both);
                        return None;
                    }
                }
            }
        });
        if let Some(end) = ended {
            assert_eq!(end.how, Some(exited(0)), "{name}");
            return got;
        }
    }
}

fn send_all(stream: &std::os::unix::net::UnixStream, input: &[u8]) {
    use std::io::Write;
    let mut stream = stream;
    let mut bytes = Vec::new();
    for chunk in input.chunks(10_000) {
        bytes.clear();
        belljar_protocol::frame::encode_chunk(1, chunk, &mut bytes);
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
    let input = Some(Input::StdinEof(v1::StdinEof {}));
    bytes.clear();
    belljar_protocol::frame::encode(&v1::ExecInput { input }, &mut bytes).unwrap();
    let _ = stream.write_all(&bytes);
}

fn numbers(rounds: usize) -> Vec<u8> {
    (0..rounds)
        .flat_map(|round| (1..=2000).map(move |n| format!("{round} {n}\n")))
        .collect::<String>()
        .into_bytes()
}

fn check(name: &str, got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        got == expected,
        "{name}: {} bytes of {}, first difference at {differs:?}",
        got.len(),
        expected.len()
    );
}

#[test]
fn no_byte_is_lost_or_repeated_when_workers_die() {
    const ROUNDS: usize = 40;
    let agent = Agent::start();
    let script = format!(
        "r=0; while [ $r -lt {ROUNDS} ]; do seq 1 2000 | sed \"s/^/$r /\"; sleep 0.02; r=$((r+1)); done"
    );
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n ^ (n >> 7)) as u8).collect();
    let expected = numbers(ROUNDS);
    let done = AtomicBool::new(false);
    let left = AtomicUsize::new(0);
    let mut kills = 0_u32;
    std::thread::scope(|scope| {
        for number in 0..8_usize {
            let (agent, data, expected, script, left) = (&agent, &data, &expected, &script, &left);
            left.fetch_add(1, Ordering::Relaxed);
            scope.spawn(move || {
                let name = format!("p{number}");
                let terminal = Some(v1::Terminal { columns: 80, rows: 24 });
                match number % 4 {
                    0 | 1 => check(&name, &follow(agent, &name, sh(script), &[]), expected),
                    2 => {
                        let exec = v1::Exec {
                            terminal,
                            ..sh(&format!("stty raw -echo; {script}"))
                        };
                        check(&name, &follow(agent, &name, exec, &[]), expected);
                    }
                    _ => {
                        let exec = v1::Exec {
                            stdin: v1::exec::Stdin::Stream.into(),
                            ..sh("while dd bs=50000 count=1 2>/dev/null | grep -c . >/dev/null; do :; done; cat")
                        };
                        let exec = v1::Exec { argv: common::argv(&["cat"]).argv, ..exec };
                        check(&name, &follow(agent, &name, exec, data), data);
                    }
                }
                left.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let mut pause = 7_u64;
        while left.load(Ordering::Relaxed) > 0 && kills < 60 {
            pause = pause * 31 % 97;
            std::thread::sleep(Duration::from_millis(20 + pause));
            if let Some(worker) = agent.worker_pid() {
                common::kill(worker);
                kills += 1;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(kills > 10, "{kills} kills: the programs were too quick");
    wait_until("all is reaped", || agent.children().is_empty());
}

#[test]
fn the_next_worker_answers_at_once() {
    let agent = Agent::start();
    let mut times = Vec::new();
    for _ in 0..5 {
        // Longer than what counts as a short life.
        std::thread::sleep(Duration::from_millis(200));
        let worker = agent.worker_pid().unwrap();
        let start = Instant::now();
        rustix_kill(worker);
        assert!(agent.is_alive() || agent.is_alive());
        times.push(start.elapsed());
    }
    times.sort();
    assert!(times[2] < Duration::from_millis(50), "{times:?}");
}

fn rustix_kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
