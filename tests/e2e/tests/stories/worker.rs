//! A worker of the agent that dies: processes go on, and no byte is lost.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_e2e::{PATIENCE, Sandbox, User};
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
