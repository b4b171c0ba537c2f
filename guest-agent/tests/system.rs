//! The guest as a whole, and waiting for something in it. What changes the machine itself (its clock, its
//! random pool, frozen file systems) is tested in a real guest.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, Connection, ping, process, system};
use belljar_protocol::v1::{
    self, r#await::What, error::Code, event::What as Happened, request::Call,
};

use common::{Agent, kill, sh, soon, wait_until};

fn wait_for(agent: &Agent, what: What, limit_ms: u64) -> Result<v1::Awaited, CallError> {
    let wanted = v1::Await {
        time_limit_ms: limit_ms,
        what: Some(what),
    };
    system::wait_for(agent.connect(), wanted, soon())
}

fn code<T: std::fmt::Debug>(result: Result<T, CallError>) -> (Code, String) {
    match result {
        Err(CallError::Refused { code, message, .. }) => (code, message),
        other => panic!("not refused: {other:?}"),
    }
}

/// Runs `cause` after a while; returns how long after its end `effect` returns.
fn delay_of(cause: impl FnOnce() + Send + 'static, effect: impl FnOnce()) -> Duration {
    let causing = thread::spawn(|| {
        thread::sleep(Duration::from_millis(100));
        cause();
        Instant::now()
    });
    effect();
    let noticed = Instant::now();
    noticed.saturating_duration_since(causing.join().unwrap())
}

/// Far more than 5 ms: this machine does other things, too.
const NOTICED: Duration = Duration::from_secs(2);

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn named(agent: &Agent, name: &str, script: &str) -> v1::ProcessRef {
    let exec = v1::Exec {
        name: name.to_owned(),
        detached: true,
        ..sh(script)
    };
    agent.exec(exec).unwrap();
    v1::ProcessRef {
        r#ref: Some(v1::process_ref::Ref::Name(name.to_owned())),
    }
}

fn output(process: &v1::ProcessRef, pattern: &str) -> What {
    What::Output(v1::OutputMatch {
        process: Some(process.clone()),
        pattern: pattern.to_owned(),
        ..v1::OutputMatch::default()
    })
}

#[test]
fn a_port_that_begins_to_listen_is_noticed() {
    let agent = Agent::start();
    let port = free_port();
    let (kept, keep) = std::sync::mpsc::channel();
    let delay = delay_of(
        move || {
            kept.send(TcpListener::bind(("127.0.0.1", port)).unwrap())
                .unwrap();
        },
        || drop(wait_for(&agent, What::Port(port.into()), 0).unwrap()),
    );
    assert!(delay < NOTICED, "{delay:?}");
    drop(keep);
    let (code_, message) = code(wait_for(&agent, What::Port(free_port().into()), 50));
    assert_eq!(code_, Code::Deadline);
    assert!(message.contains("nothing listens"), "{message}");
    for port in [0, 65_536] {
        assert_eq!(
            code(wait_for(&agent, What::Port(port), 50)).0,
            Code::Invalid
        );
    }
}

#[test]
fn a_file_that_appears_is_noticed() {
    let agent = Agent::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ready");
    let what = What::Path(path.as_os_str().as_encoded_bytes().to_vec());
    assert_eq!(code(wait_for(&agent, what.clone(), 50)).0, Code::Deadline);
    let delay = delay_of(
        move || fs::write(path, "").unwrap(),
        || drop(wait_for(&agent, what, 0).unwrap()),
    );
    assert!(delay < NOTICED, "{delay:?}");
    assert_eq!(
        code(wait_for(&agent, What::Path(Vec::new()), 50)).0,
        Code::Invalid
    );
}

#[test]
fn an_http_status_is_waited_for() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let http = |port: u32, from: u32, to: u32| {
        What::Http(v1::HttpAnswer {
            port,
            path: "/health".to_owned(),
            status_from: from,
            status_to: to,
            ..v1::HttpAnswer::default()
        })
    };
    let serving = thread::spawn(move || {
        let answers = [
            &b"garbage"[..],
            b"HTTP/1.1 503 No\r\n\r\n",
            b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 204 Yes\r\n\r\n",
        ];
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let got = stream.read(&mut request).unwrap();
            assert!(request[..got].starts_with(b"GET /health HTTP/1.1\r\nHost: localhost:"));
            stream.write_all(answer).unwrap();
        }
        listener
    });
    assert_eq!(wait_for(&agent, http(port, 0, 0), 0).unwrap().status, 204);
    let listener = serving.join().unwrap();
    // One that takes a request and says nothing.
    let (code_, message) = code(wait_for(&agent, http(port, 500, 599), 100));
    assert_eq!(code_, Code::Deadline);
    assert!(
        message.contains("no answer") || message.contains("not so by then"),
        "{message}"
    );
    drop(listener);
    let (code_, message) = code(wait_for(&agent, http(port, 0, 0), 100));
    assert_eq!(code_, Code::Deadline);
    assert!(message.contains("refused"), "{message}");
    for invalid in [http(0, 0, 0), http(port, 300, 200)] {
        assert_eq!(code(wait_for(&agent, invalid, 50)).0, Code::Invalid);
    }
}

#[test]
fn output_is_searched_as_it_comes() {
    let agent = Agent::start();
    let process = named(
        &agent,
        "talker",
        "printf 'star'; sleep 0.2; echo ted; read x </dev/zero",
    );
    let found = wait_for(&agent, output(&process, "^started$"), 0).unwrap();
    assert_eq!(
        (found.offset, found.matched.as_slice()),
        (7, &b"started"[..])
    );
    // It was there before; and what is not is not invented.
    assert_eq!(
        wait_for(&agent, output(&process, "t.d"), 0).unwrap().offset,
        7
    );
    assert_eq!(
        code(wait_for(&agent, output(&process, "never"), 50)).0,
        Code::Deadline
    );
    assert_eq!(
        code(wait_for(&agent, output(&process, "("), 50)).0,
        Code::Invalid
    );
    let only_stderr = v1::OutputMatch {
        process: Some(process),
        pattern: "started".to_owned(),
        stream: v1::Stream::Stderr.into(),
        ..v1::OutputMatch::default()
    };
    assert_eq!(
        code(wait_for(&agent, What::Output(only_stderr), 50)).0,
        Code::Deadline
    );

    let brief = named(&agent, "brief", "sleep 0.1; echo over >&2");
    assert!(
        wait_for(&agent, output(&brief, "ready"), 0)
            .unwrap()
            .ended_without
    );
    assert_eq!(
        wait_for(&agent, output(&brief, "over"), 0).unwrap().matched,
        b"over"
    );
    let nobody = v1::ProcessRef {
        r#ref: Some(v1::process_ref::Ref::Name("nobody".to_owned())),
    };
    assert_eq!(
        code(wait_for(&agent, output(&nobody, "x"), 50)).0,
        Code::NotFound
    );
}

#[test]
fn whoever_hangs_up_waits_no_longer() {
    let agent = Agent::start();
    let before = agent.settled_descriptors();
    let port = free_port();
    let given_up = |what: What| {
        let wanted = v1::Await {
            time_limit_ms: 0,
            what: Some(what),
        };
        let deadline = Some(Instant::now() + Duration::from_millis(30));
        // The agent hears of this deadline, too: it is not what ends the wait.
        let stream = agent.connect();
        let call = v1::request::Call::Await(wanted);
        let request = v1::Request {
            generation: 2,
            deadline_ms: 0,
            call: Some(call),
        };
        let mut connection = belljar_protocol::client::Connection::new(stream);
        connection.send(&request, "wait", deadline).unwrap();
        thread::sleep(Duration::from_millis(10));
    };
    let process = named(&agent, "silent", "sleep 1000");
    for _ in 0..20 {
        given_up(What::Port(port.into()));
        given_up(What::Path(b"/no/such/file".to_vec()));
        given_up(output(&process, "x"));
    }
    process::signal(
        agent.connect(),
        v1::Signal {
            process: Some(process),
            number: 9,
            ..v1::Signal::default()
        },
        soon(),
    )
    .unwrap();
    // Some channels between the two processes are kept for later calls.
    wait_until("nothing is left of them", || {
        agent.settled_descriptors() <= before + 20
    });
}

#[test]
fn figures_are_those_of_the_machine() {
    let agent = Agent::start();
    named(&agent, "worker", "while :; do :; done");
    let first = system::metrics(agent.connect(), true, soon()).unwrap();
    let cpus = thread::available_parallelism().unwrap().get();
    assert!(first.cpus as usize >= cpus, "{first:?}");
    assert!(first.memory_available > 0 && first.memory_available <= first.memory_total);
    assert!(first.disk_total > 0 && first.disk_available <= first.disk_total);
    assert!(first.pids > 0);
    assert!(
        (1 << 20..64 << 20).contains(&first.agent_memory),
        "{first:?}"
    );
    assert_eq!(first.processes.len(), 1);
    assert_eq!(first.processes[0].name, "worker");
    assert!(
        system::metrics(agent.connect(), false, soon())
            .unwrap()
            .processes
            .is_empty()
    );
    wait_until("the CPU was used", || {
        let now = system::metrics(agent.connect(), false, soon()).unwrap();
        assert!(now.boottime_ns > first.boottime_ns);
        now.cpu_busy_us > first.cpu_busy_us
    });
}

#[test]
fn looking_is_no_activity_and_the_last_one_outlives_the_worker() {
    let agent = Agent::start();
    let last = || ping(agent.connect(), soon()).unwrap().1.last_activity_ns;
    let begin = last();
    assert!(begin > 0);
    system::metrics(agent.connect(), true, soon()).unwrap();
    process::list(agent.connect(), true, soon()).unwrap();
    assert_eq!(last(), begin);
    thread::sleep(Duration::from_millis(60));
    system::touch(agent.connect(), soon()).unwrap();
    let touched = last();
    assert!(touched > begin);
    kill(agent.worker_pid().unwrap());
    wait_until("another worker answers", || {
        ping(agent.connect(), soon()).is_ok_and(|(_, pong)| pong.worker_restarts == 1)
    });
    assert_eq!(last(), touched);
}

#[test]
fn events_are_told_from_any_number_on() {
    let agent = Agent::start();
    agent.run(sh("exit 3"));
    let mut events = system::Events::start(agent.connect(), 0, false, soon()).unwrap();
    let mut all = Vec::new();
    while let Some(event) = events.next(soon()).unwrap() {
        all.push(event);
    }
    assert!(matches!(all[0].what, Some(Happened::Started(_))), "{all:?}");
    assert!(matches!(all[1].what, Some(Happened::Ended(_))), "{all:?}");
    assert_eq!(events.started().next, all[1].sequence + 1);

    let mut following =
        system::Events::start(agent.connect(), all[1].sequence + 1, true, soon()).unwrap();
    agent.run(sh("true"));
    let next = following.next(soon()).unwrap().unwrap();
    assert_eq!(next.sequence, all[1].sequence + 1);
    assert!(matches!(next.what, Some(Happened::Started(_))));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let agent = Agent::start();
    for seed in [Vec::new(), vec![0; 513]] {
        assert_eq!(
            code(system::reseed(agent.connect(), seed, soon())).0,
            Code::Invalid
        );
    }
    // Without cgroups nothing can be frozen.
    let frozen = system::freeze(agent.connect(), Duration::from_secs(1), false, soon());
    assert_eq!(code(frozen).0, Code::System);
    system::sync(agent.connect(), soon()).unwrap();
    assert!(agent.is_alive());
}

#[test]
fn programs_are_frozen_and_thawed() {
    let Some(agent) = Agent::start_with_cgroups() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("count");
    let script = format!("while :; do echo x >> {}; done", file.display());
    let process = named(&agent, "busy", &script);
    let size = || fs::metadata(&file).map_or(0, |file| file.len());
    wait_until("it writes", || size() > 0);
    match system::freeze(agent.connect(), Duration::from_secs(5), false, soon()) {
        Ok(()) => {}
        // Not every kernel of a build machine can.
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    }
    let frozen = size();
    assert!(agent.is_alive());
    // A worker that takes the place of another knows it.
    let worker = agent.worker_pid().unwrap();
    kill(worker);
    wait_until("another worker", || {
        agent.worker_pid().is_some_and(|pid| pid != worker) && agent.is_alive()
    });
    let is_frozen = || ping(agent.connect(), soon()).unwrap().1.frozen;
    assert!(is_frozen());
    let made = Connection::new(agent.connect()).call(
        Call::MakeDirectory(v1::MakeDirectory {
            path: folder
                .path()
                .join("new")
                .into_os_string()
                .into_encoded_bytes(),
            ..v1::MakeDirectory::default()
        }),
        "make a directory",
        soon(),
    );
    assert_eq!(code(made).0, Code::Conflict);
    thread::sleep(Duration::from_millis(100));
    assert_eq!(size(), frozen);
    // Nothing can be started: it would not run.
    assert_eq!(code(agent.exec(sh("true"))).0, Code::Conflict);
    system::freeze(agent.connect(), Duration::from_secs(5), false, soon()).unwrap();
    // Killing needs no thaw.
    system::thaw(agent.connect(), soon()).unwrap();
    wait_until("it writes again", || size() > frozen);
    assert!(!is_frozen());
    system::freeze(agent.connect(), Duration::from_secs(5), false, soon()).unwrap();
    let signal = v1::Signal {
        process: Some(process.clone()),
        number: 9,
        ..v1::Signal::default()
    };
    process::signal(agent.connect(), signal, soon()).unwrap();
    process::wait(agent.connect(), process, Some(Duration::from_secs(10)))
        .unwrap()
        .unwrap();
    system::thaw(agent.connect(), soon()).unwrap();
    agent.run(sh("true"));
}
