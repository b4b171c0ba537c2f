//! Agents of every generation that was ever released, built from their own commits, and today's client.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, Connection, Exec, ExecEvent, ping, shutdown};
use belljar_protocol::v1::{self, end::How, request::Call};

const PATIENCE: Duration = Duration::from_secs(30);

fn soon() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

struct Agent {
    process: Child,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Agent {
    /// Builds it if that was never done on this machine.
    fn of_generation(number: u32) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/generations/agent");
        let built = Command::new(script)
            .arg(number.to_string())
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        assert!(built.status.success(), "it cannot be built");
        let binary = String::from_utf8(built.stdout).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let process = Command::new(binary.trim())
            .arg("--serve-unix")
            .arg(&path)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self {
            process,
            path,
            _folder: folder,
        };
        let begin = Instant::now();
        while UnixStream::connect(&agent.path).is_err() {
            assert!(begin.elapsed() < PATIENCE, "it does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A request that uses what only later generations know, beside what the first one knew.
fn modern_exec(script: &str) -> v1::Exec {
    v1::Exec {
        argv: ["sh", "-c", script]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        env: vec![b"GREETING=hello".to_vec()],
        name: "greeter".into(),
        owner_key: vec![7; 16],
        ring_bytes: 4096,
        keep_ms: Some(1000),
        rlimits: vec![v1::Rlimit {
            name: "nofile".into(),
            soft: 64,
            hard: 64,
        }],
        limits: Some(v1::Limits {
            memory: 1 << 30,
            ..v1::Limits::default()
        }),
        ..v1::Exec::default()
    }
}

#[test]
fn the_first_generation_says_who_it_is_and_runs_programs() {
    let agent = Agent::of_generation(1);
    let (info, pong) = ping(agent.connect(), soon()).unwrap();
    assert_eq!(info.generation, 1);
    assert!(info.has(v1::Ability::Exec) && !info.has(v1::Ability::Processes));
    assert!(pong.boottime_ns > 0);
    // A field that it never sent reads as "not said".
    assert_eq!((pong.last_activity_ns, pong.worker_restarts), (0, 0));

    let exec = Exec::start(
        agent.connect(),
        modern_exec("echo $GREETING; echo oh >&2; exit 7"),
        soon(),
    )
    .unwrap();
    assert_eq!(exec.info().generation, 1);
    let (out, err, how) = exec.finish(1 << 20, soon()).unwrap();
    assert_eq!((&*out, &*err), (&b"hello\n"[..], &b"oh\n"[..]));
    assert_eq!(how, How::Exited(v1::Exited { code: 7 }));
}

#[test]
fn the_first_generation_takes_input_and_ends_what_is_hung_up_on() {
    let agent = Agent::of_generation(1);
    let mut request = modern_exec("cat");
    request.stdin = v1::exec::Stdin::Stream.into();
    let mut exec = Exec::start(agent.connect(), request, soon()).unwrap();
    let mut stdin = exec.stdin().unwrap();
    stdin.write(b"over there\n").unwrap();
    let mut echoed = Vec::new();
    while echoed.len() < b"over there\n".len() {
        match exec.next(soon()).unwrap() {
            Some(ExecEvent::Stdout(bytes)) => echoed.extend(bytes),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(echoed, b"over there\n");
    stdin.close().unwrap();
    let (_, _, how) = exec.finish(1 << 20, soon()).unwrap();
    assert_eq!(how, How::Exited(v1::Exited { code: 0 }));
}

#[test]
fn the_first_generation_refuses_later_calls_in_words() {
    let agent = Agent::of_generation(1);
    let later = [
        Call::ListProcesses(v1::ListProcesses { ended: true }),
        Call::Attach(v1::Attach::default()),
        Call::Stat(v1::Stat::default()),
        Call::Watch(v1::Watch::default()),
        Call::Connect(v1::Connect::default()),
        Call::Metrics(v1::GetMetrics::default()),
    ];
    for call in later {
        let refused = Connection::new(agent.connect()).call(call.clone(), "later call", soon());
        match refused {
            Err(CallError::TooOld { generation, .. }) => assert_eq!(generation, 1, "{call:?}"),
            other => panic!("{call:?}: {other:?}"),
        }
    }
}

#[test]
fn the_first_generation_can_be_shut_down() {
    let mut agent = Agent::of_generation(1);
    let mode = v1::shutdown::Mode::PowerOff;
    shutdown(agent.connect(), mode, Some(Duration::ZERO), soon()).unwrap();
    let begin = Instant::now();
    while agent.process.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_generation_without_a_commit_is_an_error_in_words() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/generations/agent");
    let output = Command::new(script).arg("99").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("generation 99"), "{text}");
}
