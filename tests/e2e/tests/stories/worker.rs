//! A worker of the agent that dies: processes go on, and no byte is lost.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::ChildStdin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use belljar_e2e::endurance::Random;
use belljar_e2e::{PATIENCE, Running, Sandbox, User, eventually};
use belljar_protocol::client::{self, Connection, ExecEvent};
use belljar_protocol::v1::{
    self, end::How, exec_output::Output, position::At, process_ref::Ref, reply::Result as Answer,
    request::Call,
};
use belljar_protocol::{AGENT_PORT, hybrid};

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn connect(sandbox: &Sandbox<'_>) -> UnixStream {
    hybrid::connect(&sandbox.dir().join("v.sock"), AGENT_PORT, soon()).unwrap()
}

fn named(name: &str) -> v1::ProcessRef {
    let r#ref = Some(Ref::Name(name.to_owned()));
    v1::ProcessRef { r#ref }
}

fn sh(script: &str) -> v1::Exec {
    v1::Exec {
        argv: ["sh", "-c", script]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        ..v1::Exec::default()
    }
}

/// Starts a script that outlives the connection.
fn daemon(sandbox: &Sandbox<'_>, name: &str, exec: v1::Exec) {
    let exec = v1::Exec {
        name: name.to_owned(),
        detached: true,
        ..exec
    };
    client::Exec::start(connect(sandbox), exec, Some(soon())).unwrap();
}

#[test]
fn a_worker_that_is_killed_costs_no_process_and_no_byte() {
    // By the shell alone: it leaves the zeros between arguments out.
    const KILL: &str = "for p in /proc/[0-9]*; do c=; read -r c < $p/cmdline; \
        case $c in belljar-agent--worker) kill -KILL ${p#/proc/};; esac; done";
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    let script = "for n in $(seq 100); do seq $n 200; sleep 0.05; done";
    let expected: String = (1..=100)
        .flat_map(|from| (from..=200).map(|n| format!("{n}\n")))
        .collect();
    daemon(&sandbox, "counts", sh(script));
    let (_, before) = client::ping(connect(&sandbox), Some(soon())).unwrap();
    let mut got: Vec<u8> = Vec::new();
    let mut cuts = 0;
    let end = loop {
        let attach = v1::Attach {
            process: Some(named("counts")),
            stdout: Some(v1::Position {
                at: Some(At::Offset(got.len() as u64)),
            }),
            follow: true,
            ..v1::Attach::default()
        };
        let mut connection = Connection::new(connect(&sandbox));
        let start = Instant::now();
        match connection.call(Call::Attach(attach), "attach", Some(soon())) {
            Ok((_, Answer::Attach(attached))) => assert_eq!(attached.stdout_from, got.len() as u64),
            // Another one has died meanwhile.
            Err(client::CallError::Closed { .. }) => continue,
            other => panic!("{other:?}"),
        }
        if cuts > 0 {
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        // Somebody in the guest who may do everything.
        if cuts < 8 {
            cuts += 1;
            let killer = client::Exec::start(connect(&sandbox), sh(KILL), Some(soon())).unwrap();
            // It is cut with the others.
            drop(std::thread::spawn(move || {
                let mut killer = killer;
                while let Ok(Some(ExecEvent::Stdout(_) | ExecEvent::Stderr(_))) =
                    killer.next(Some(soon()))
                {}
            }));
        }
        let end = loop {
            match connection.receive::<v1::ExecOutput>("output", Some(soon())) {
                Ok(Some(message)) => match message.output {
                    Some(Output::Stdout(bytes)) => got.extend(bytes),
                    Some(Output::End(end)) => break Some(end),
                    Some(Output::Gap(gap)) => panic!("{gap:?}"),
                    _ => {}
                },
                Ok(None) | Err(client::CallError::Closed { .. }) => break None,
                Err(error) => panic!("{error}"),
            }
        };
        if let Some(end) = end {
            break end;
        }
    };
    assert_eq!(end.how, Some(How::Exited(v1::Exited { code: 0 })));
    assert!(
        String::from_utf8(got).unwrap() == expected,
        "not the bytes that were written"
    );
    let (_, after) = client::ping(connect(&sandbox), Some(soon())).unwrap();
    // The last ones may have come when all was over.
    let restarts = after.worker_restarts - before.worker_restarts;
    assert!((2..=cuts).contains(&restarts), "{restarts}");
    // The command line notices nothing either.
    let said = user.says(&["exec", sandbox.id(), "echo", "still here"]);
    said.is(0, "still here\n");
}

/// Kills the agent's worker, and waits until there is another one.
fn kill_worker(sandbox: &Sandbox<'_>) {
    let restarts = || {
        let pong = client::ping(connect(sandbox), Some(soon()));
        pong.map_or(0, |(_, pong)| pong.worker_restarts)
    };
    let before = restarts();
    let script = "kill -KILL $(pgrep -f -- '--worker$')";
    let detached = ["exec", "-d", sandbox.id(), "sh", "-c", script];
    assert_eq!(sandbox.user().says(&detached).code(), 0);
    eventually("a new worker", || restarts() > before);
}

/// Types pieces of what repeats nowhere until `stop`; returns all that was typed.
fn type_on(mut stdin: ChildStdin, stop: &AtomicBool) -> Vec<u8> {
    let mut random = Random::new(11);
    let mut typed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let length = 1 + random.below(4096);
        let piece: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
        stdin.write_all(&piece).unwrap();
        typed.extend(piece);
        std::thread::sleep(Duration::from_millis(20));
    }
    typed
}

#[test]
fn streams_of_the_command_line_outlive_three_workers() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    let counts = "n=0; while [ ! -e /run/stop ]; do n=$((n+1)); echo $n; sleep 0.02; done";
    let counter = ["exec", "-d", "--name", "counts", sandbox.id(), "sh", "-c"];
    user.says(&[&counter[..], &[counts]].concat())
        .is(0, "counts\n");
    let follows = sandbox.start("logs", &["-f", "counts"]);
    let echo = ["exec", "-i", sandbox.id(), "tee", "/root/typed"];
    let mut echo = Running::start(&mut user.belljar(&echo));
    let stdin = echo.child.stdin.take().unwrap();

    let stop = AtomicBool::new(false);
    let typed = std::thread::scope(|scope| {
        let typist = scope.spawn(|| type_on(stdin, &stop));
        let goes_on = || {
            let (told, came_back) = (follows.out_so_far().len(), echo.out_so_far().len());
            eventually("both streams to go on", || {
                follows.out_so_far().len() > told && echo.out_so_far().len() > came_back
            });
        };
        goes_on();
        for _ in 0..3 {
            kill_worker(&sandbox);
            goes_on();
        }
        stop.store(true, Ordering::Relaxed);
        typist.join().unwrap()
    });
    let said = echo.wait();
    assert_eq!(said.code(), 0, "{}", said.err);
    assert_eq!(said.out.len(), typed.len());
    assert!(said.out == typed, "not the bytes that were typed");
    let file = user.home().join("typed");
    std::fs::write(&file, &typed).unwrap();
    let here = std::process::Command::new("sha256sum")
        .stdin(std::fs::File::open(&file).unwrap())
        .output()
        .unwrap();
    let there = ["exec", sandbox.id(), "sh", "-c", "sha256sum </root/typed"];
    user.says(&there)
        .is(0, &String::from_utf8(here.stdout).unwrap());

    let end = ["exec", sandbox.id(), "touch", "/run/stop"];
    user.says(&end).is(0, "");
    let said = follows.wait();
    assert_eq!(said.code(), 0, "{}", said.err);
    let told = said.text();
    let expected: String = (1..=told.lines().count())
        .map(|n| format!("{n}\n"))
        .collect();
    assert!(told == expected, "not the lines that were written:\n{told}");
    // The last line was told, too.
    sandbox.says("logs", &["counts"]).is(0, &told);

    // Whoever is not attached to anything that exists is told so by any worker.
    let said = sandbox.says("logs", &["-f", "nothing"]);
    assert_eq!(said.code(), 125);
    said.explains(&["no such process"]);
}
