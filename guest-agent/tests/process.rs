//! Processes that have names, outlive connections and workers, and are looked at by several.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::time::Duration;

use belljar_protocol::v1::{
    self, end::How, exec_input::Input, exec_output::Output, position::At, reply::Result as Answer,
    request::Call,
};

use common::stream::{Stream, at, attach, by_id, by_name, call, daemon, how, kill, refused, wait};
use common::{Agent, argv, exited, is_running, sh, wait_until};

#[test]
fn a_detached_process_goes_on_and_its_end_is_known_later() {
    let agent = Agent::start();
    let exec = Stream::open(
        &agent,
        Call::Exec(daemon("d", "sleep 0.3; echo hi; exit 5")),
    );
    let started = *exec.started();
    drop(exec);
    let info = wait(&agent, by_name("d"));
    assert_eq!(how(&info), exited(5));
    assert_eq!((info.id, info.pid), (started.id, started.pid));
    let end = info.end.unwrap();
    assert!(end.wall_us >= 300_000, "{end:?}");
    assert!(end.usage.unwrap().memory_peak > 0);
    // Whoever comes later still reads it all, and the end.
    for _ in 0..2 {
        let mut late = Stream::open(&agent, Call::Attach(attach(by_id(started.id))));
        let (stdout, others) = late.rest();
        assert_eq!(stdout, b"hi\n");
        assert!(matches!(others.last(), Some(Output::End(_))), "{others:?}");
    }
    let forget = |process| Call::Forget(v1::Forget { process });
    assert!(call(&agent, forget(by_name("d"))).is_ok());
    assert_eq!(
        refused(&agent, forget(by_name("d"))),
        v1::error::Code::NotFound
    );
}

#[test]
fn a_name_is_started_once() {
    let agent = Agent::start();
    let first = Stream::open(&agent, Call::Exec(daemon("one", "echo run; sleep 0.2")));
    let second = Stream::open(&agent, Call::Exec(daemon("one", "echo other")));
    assert!(!first.started().existed);
    assert!(second.started().existed);
    assert_eq!(first.started().id, second.started().id);
    wait(&agent, by_name("one"));
    let again = Stream::open(&agent, Call::Exec(daemon("one", "echo other")));
    assert!(again.started().existed);
    let anew = v1::Exec {
        replace_ended: true,
        ..daemon("one", "echo anew")
    };
    let anew = Stream::open(&agent, Call::Exec(anew));
    assert!(!anew.started().existed);
    assert_ne!(anew.started().id, first.started().id);
    wait(&agent, by_name("one"));
    let (stdout, _) = Stream::open(&agent, Call::Attach(attach(by_name("one")))).rest();
    assert_eq!(stdout, b"anew\n");
}

/// A program that nobody can open, and so not start, until this is dropped.
struct Held {
    _directory: tempfile::TempDir,
    program: String,
    holder: std::process::Child,
}

impl Held {
    fn new() -> Self {
        const HOLD: &str = "import fcntl, signal, sys; signal.signal(signal.SIGIO, signal.SIG_IGN); \
            file = open(sys.argv[1], 'rb'); fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK); \
            print(flush=True); sys.stdin.read()";
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        std::fs::copy("/bin/sleep", &program).unwrap();
        let mut holder = std::process::Command::new("python3")
            .args(["-c", HOLD])
            .arg(&program)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
        let program = program.to_str().unwrap().to_owned();
        Self {
            _directory: directory,
            program,
            holder,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

#[test]
fn a_name_that_is_being_started_is_waited_for() {
    let agent = Agent::start();
    let held = Held::new();
    let exec = v1::Exec {
        name: "slow".to_owned(),
        detached: true,
        ..argv(&[&held.program, "30"])
    };
    std::thread::scope(|scope| {
        let start = || *Stream::open(&agent, Call::Exec(exec.clone())).started();
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(start)).collect();
        // Others are not held up meanwhile.
        let other = Stream::open(&agent, Call::Exec(daemon("other", "true")));
        assert!(!other.started().existed);
        std::thread::sleep(Duration::from_millis(100));
        assert!(
            !clients
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        );
        drop(held);
        let started: Vec<_> = clients.into_iter().map(|it| it.join().unwrap()).collect();
        assert!(
            started.iter().all(|it| it.id == started[0].id),
            "{started:?}"
        );
        assert_eq!(
            started.iter().filter(|it| !it.existed).count(),
            1,
            "{started:?}"
        );
    });
    assert!(!kill(&agent, by_name("slow")));
}

#[test]
fn readers_have_their_own_places() {
    let agent = Agent::start();
    let script = "printf 'one\\ntwo\\nthree\\n'; sleep 30";
    drop(Stream::open(&agent, Call::Exec(daemon("r", script))));
    let read = |stdout, follow| {
        let attach = v1::Attach {
            stdout,
            follow,
            ..attach(by_name("r"))
        };
        Stream::open(&agent, Call::Attach(attach))
    };
    wait_until("all is written", || read(None, false).rest().0.len() == 14);
    assert_eq!(read(at(At::Offset(4)), false).rest().0, b"two\nthree\n");
    assert_eq!(read(at(At::Lines(1)), false).rest().0, b"three\n");
    let (stdout, others) = read(at(At::Newest(true)), false).rest();
    assert!(stdout.is_empty());
    assert!(matches!(others.last(), Some(Output::Detached(_))));
    assert_eq!(read(at(At::Newest(true)), false).attached().stdout_from, 14);
    assert_eq!(read(at(At::SinceUnixNs(0)), false).rest().0.len(), 14);
    // A follower is told when it has caught up, and goes when it wants to.
    let mut follower = read(None, true);
    follower.until("three\n");
    assert!(matches!(follower.next(), Some(Output::CaughtUp(_))));
    follower.send(Input::Detach(v1::Detach {}));
    assert!(matches!(follower.next(), Some(Output::Detached(_))));
    kill(&agent, by_name("r"));
}

#[test]
fn a_ring_keeps_the_last_bytes_and_tells_the_gap() {
    let agent = Agent::start();
    let exec = v1::Exec {
        ring_bytes: 8192,
        ..daemon("gap", "head -c 100000 /dev/zero; echo end")
    };
    drop(Stream::open(&agent, Call::Exec(exec)));
    let info = wait(&agent, by_name("gap"));
    wait_until("all is read", || {
        matches!(call(&agent, Call::Inspect(v1::Inspect { process: by_name("gap") })),
            Ok(Answer::Process(info)) if info.stdout.is_some_and(|it| it.newest == 100_004))
    });
    assert_eq!(how(&info), exited(0));
    let from_start = v1::Attach {
        stdout: at(At::Offset(0)),
        ..attach(by_name("gap"))
    };
    let (stdout, others) = Stream::open(&agent, Call::Attach(from_start)).rest();
    let Some(Output::Gap(gap)) = others.first() else {
        panic!("{others:?}")
    };
    assert_eq!((gap.from, gap.to), (0, 100_004 - 8192));
    assert_eq!(stdout.len(), 8192);
    assert!(stdout.ends_with(b"end\n"));
}

#[test]
fn a_reader_that_stops_slows_nobody_else() {
    let agent = Agent::start();
    let exec = v1::Exec {
        ring_bytes: 65536,
        ..daemon("fast", "head -c 30000000 /dev/zero; exit 3")
    };
    drop(Stream::open(&agent, Call::Exec(exec)));
    let stopped = Stream::open(&agent, Call::Attach(attach(by_name("fast"))));
    assert_eq!(how(&wait(&agent, by_name("fast"))), exited(3));
    drop(stopped);
}

#[test]
fn input_comes_from_several_and_is_resumed_without_repetition() {
    let agent = Agent::start();
    let exec = v1::Exec {
        stdin: v1::exec::Stdin::Stream.into(),
        ..daemon("cat", "cat")
    };
    drop(Stream::open(&agent, Call::Exec(exec)));
    let mut first = Stream::open(&agent, Call::Attach(attach(by_name("cat"))));
    first.send(Input::Stdin(b"hello ".to_vec()));
    first.until("hello ");
    let session = first.attached().input_session;
    drop(first);
    let again = v1::Attach {
        input_session: session,
        input_offset: 3,
        ..attach(by_name("cat"))
    };
    let mut second = Stream::open(&agent, Call::Attach(again));
    assert_eq!(second.attached().input_taken, 6);
    second.send(Input::Stdin(b"lo world".to_vec()));
    let mut reader = v1::Attach {
        read_only: true,
        ..attach(by_name("cat"))
    };
    reader.stdout = at(At::Newest(true));
    let mut reader = Stream::open(&agent, Call::Attach(reader));
    reader.send(Input::Stdin(b"not this".to_vec()));
    second.until("hello world");
    second.send(Input::StdinEof(v1::StdinEof {}));
    let (_, others) = second.rest();
    assert!(matches!(others.last(), Some(Output::End(_))), "{others:?}");
    let (all, _) = Stream::open(&agent, Call::Attach(attach(by_name("cat")))).rest();
    assert_eq!(all, b"hello world");
}

#[test]
fn processes_are_listed_inspected_and_signalled() {
    let agent = Agent::start();
    let exec = v1::Exec {
        user: "daemon".to_owned(),
        cwd: b"/usr".to_vec(),
        ..daemon("a", "trap 'exit 9' USR1; while :; do sleep 0.05; done")
    };
    let a = Stream::open(&agent, Call::Exec(exec)).started().id;
    let b = Stream::open(&agent, Call::Exec(daemon("b", "sleep 40 & wait")))
        .started()
        .id;
    let list = |ended| match call(&agent, Call::ListProcesses(v1::ListProcesses { ended })) {
        Ok(Answer::Processes(list)) => list.processes,
        other => panic!("{other:?}"),
    };
    let ids: Vec<_> = list(false).iter().map(|info| info.id).collect();
    assert_eq!(ids, [a, b]);
    let info = &list(false)[0];
    assert_eq!((info.name.as_str(), info.user.as_str()), ("a", "daemon"));
    assert_eq!((info.cwd.as_slice(), info.detached), (&b"/usr"[..], true));
    assert_eq!(info.argv[0], b"sh");
    std::thread::sleep(Duration::from_millis(200));
    let usr1 = v1::Signal {
        process: by_id(a),
        number: 10,
        scope: v1::signal::Scope::Process.into(),
    };
    assert!(call(&agent, Call::Signal(usr1)).is_ok());
    assert_eq!(how(&wait(&agent, by_id(a))), exited(9));
    assert_eq!(list(false).len(), 1);
    assert_eq!(list(true).len(), 2);
    let none = v1::Signal {
        number: 0,
        ..usr1_of(b)
    };
    assert_eq!(
        refused(&agent, Call::Signal(none)),
        v1::error::Code::Invalid
    );
    assert!(!kill(&agent, by_id(b)));
    assert!(matches!(how(&wait(&agent, by_id(b))), How::Signalled(_)));
    assert_eq!(
        refused(
            &agent,
            Call::Inspect(v1::Inspect {
                process: by_name("c")
            })
        ),
        v1::error::Code::NotFound
    );
    let soon = v1::WaitEnd {
        process: by_id(b),
        time_limit_ms: 1,
    };
    assert!(call(&agent, Call::WaitEnd(soon)).is_ok());
}

fn usr1_of(id: u64) -> v1::Signal {
    v1::Signal {
        process: by_id(id),
        number: 10,
        scope: v1::signal::Scope::Group.into(),
    }
}

#[test]
fn waiting_has_a_limit() {
    let agent = Agent::start();
    drop(Stream::open(&agent, Call::Exec(daemon("w", "sleep 30"))));
    let wait = v1::WaitEnd {
        process: by_name("w"),
        time_limit_ms: 50,
    };
    assert_eq!(
        refused(&agent, Call::WaitEnd(wait)),
        v1::error::Code::Deadline
    );
    kill(&agent, by_name("w"));
}

#[test]
fn a_terminal_has_a_size_a_foreground_group_and_an_end_of_file() {
    let agent = Agent::start();
    let exec = v1::Exec {
        terminal: Some(v1::Terminal {
            columns: 100,
            rows: 30,
        }),
        ..argv(&["sh", "-i"])
    };
    let exec = v1::Exec {
        env: vec![b"PS1=$ ".to_vec()],
        name: "t".to_owned(),
        ..exec
    };
    let mut shell = Stream::open(&agent, Call::Exec(exec));
    shell.send(Input::Stdin(b"stty size; tty; echo $TERM\n".to_vec()));
    let said = String::from_utf8(shell.until("xterm-256color")).unwrap();
    assert!(said.contains("30 100"), "{said}");
    assert!(said.contains("/dev/pts/"), "{said}");
    let mut viewer = v1::Attach {
        size: Some(v1::Terminal {
            columns: 61,
            rows: 17,
        }),
        ..attach(by_name("t"))
    };
    viewer.stdout = at(At::Newest(true));
    let mut viewer = Stream::open(&agent, Call::Attach(viewer));
    viewer.send(Input::Stdin(b"stty size\n".to_vec()));
    viewer.until("17 61");
    // It was told to the other one, too; and who types last has the right size.
    let mut told = None;
    while told.is_none() {
        match shell.next() {
            Some(Output::Resized(size)) => told = Some(size),
            Some(_) => {}
            None => panic!("not told"),
        }
    }
    assert_eq!(
        told,
        Some(v1::Terminal {
            columns: 61,
            rows: 17
        })
    );
    shell.send(Input::Stdin(b"stty size; sleep 50\n".to_vec()));
    shell.until("30 100");
    wait_until("it sleeps", || {
        std::thread::sleep(Duration::from_millis(50));
        true
    });
    shell.send(Input::Signal(2));
    shell.send(Input::Stdin(b"echo af''ter\n".to_vec()));
    shell.until("after\r\n");
    shell.send(Input::StdinEof(v1::StdinEof {}));
    let (_, others) = shell.rest();
    assert!(matches!(others.last(), Some(Output::End(_))), "{others:?}");
}

#[test]
fn the_screen_of_a_terminal_is_drawn() {
    let agent = Agent::start();
    let script = "seq 1 40; printf '\\033[?1049h\\033[3;5Hhello'; sleep 0.2; \
        printf '\\033[?1049l'; echo bye; sleep 30";
    let exec = v1::Exec {
        terminal: Some(v1::Terminal {
            columns: 40,
            rows: 10,
        }),
        ..daemon("s", script)
    };
    drop(Stream::open(&agent, Call::Exec(exec)));
    let screen = |formatted| {
        let screen = v1::GetScreen {
            process: by_name("s"),
            scrollback: 5,
            formatted,
        };
        match call(&agent, Call::Screen(screen)).unwrap() {
            Answer::Screen(screen) => screen,
            other => panic!("{other:?}"),
        }
    };
    wait_until("it is in the alternate screen", || screen(false).alternate);
    let other = screen(false);
    assert_eq!(other.content, b"\n\n    hello");
    assert_eq!((other.cursor_row, other.cursor_column), (2, 9));
    wait_until("it is back", || screen(false).content.ends_with(b"bye"));
    let back = screen(false);
    assert_eq!((back.columns, back.rows, back.alternate), (40, 10, false));
    assert!(back.content.starts_with(b"33\n"), "{back:?}");
    assert_eq!(back.scrollback, b"28\n29\n30\n31\n32");
    assert!(screen(true).content.contains(&0x1b));
    // Reading may go on where the screen ends.
    let info = v1::Inspect {
        process: by_name("s"),
    };
    let Answer::Process(info) = call(&agent, Call::Inspect(info)).unwrap() else {
        panic!()
    };
    assert_eq!(info.stdout.unwrap().newest, back.offset);
    drop(Stream::open(&agent, Call::Exec(daemon("plain", "sleep 1"))));
    let none = v1::GetScreen {
        process: by_name("plain"),
        ..v1::GetScreen::default()
    };
    assert_eq!(
        refused(&agent, Call::Screen(none)),
        v1::error::Code::Invalid
    );
    kill(&agent, by_name("s"));
}

#[test]
fn a_worker_that_is_killed_is_replaced_and_processes_go_on() {
    let agent = Agent::start();
    let mut exec = Stream::open(
        &agent,
        Call::Exec(v1::Exec {
            name: "p".to_owned(),
            owner_key: b"key".to_vec(),
            ..sh("i=0; while [ $i -lt 300 ]; do echo $i; i=$((i+1)); sleep 0.005; done; exit 4")
        }),
    );
    let unowned = Stream::open(&agent, Call::Exec(argv(&["sleep", "50"])));
    let unowned_pid = unowned.started().pid;
    let mut got = exec.until("20\n");
    let worker = agent.worker_pid().unwrap();
    common::kill(worker);
    // Nothing more comes on this connection.
    while let Some(output) = exec.next() {
        if let Output::Stdout(bytes) = output {
            got.extend(bytes);
        }
    }
    let back = v1::Attach {
        owner_key: b"key".to_vec(),
        stdout: at(At::Offset(got.len() as u64)),
        ..attach(by_name("p"))
    };
    let mut back = Stream::open(&agent, Call::Attach(back));
    assert_eq!(back.attached().stdout_from, got.len() as u64);
    let (rest, others) = back.rest();
    got.extend(rest);
    let expected: String = (0..300).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8(got).unwrap(), expected);
    assert!(
        matches!(others.last(), Some(Output::End(end)) if end.how == Some(exited(4))),
        "{others:?}"
    );
    // What nobody can come back for is killed.
    wait_until("it is killed", || !is_running(unowned_pid));
    let Answer::Pong(pong) = call(&agent, Call::Ping(v1::Ping {})).unwrap() else {
        panic!()
    };
    assert_eq!(pong.worker_restarts, 1);
    assert_ne!(agent.worker_pid(), Some(worker));
}

#[test]
fn starts_in_a_frozen_guest_wait_and_hold_nothing_up() {
    let Some(agent) = Agent::start_with_cgroups() else {
        eprintln!("skipped: no writable cgroup v2 here");
        return;
    };
    let agent = &agent;
    agent.run(argv(&["true"]));
    let freeze = |how: &str| {
        let file = agent.cgroup().unwrap().join("user/cgroup.freeze");
        std::fs::write(file, how).unwrap();
    };
    freeze("1");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| agent.run(sh("echo thawed; exit 6")));
        let missing = scope.spawn(|| agent.exec(argv(&["no-such-program"])).map(|it| it.pid()));
        let start_named = || {
            let stream = Stream::open(agent, Call::Exec(daemon("cold", "exit 3")));
            stream.started().id
        };
        let named = [scope.spawn(start_named), scope.spawn(start_named)];
        // One that gives up.
        {
            let mut connection = belljar_protocol::client::Connection::new(agent.connect());
            let request = v1::Request {
                generation: 2,
                deadline_ms: 0,
                call: Some(Call::Exec(sh("sleep 50"))),
            };
            connection.send(&request, "exec", common::soon()).unwrap();
            std::thread::sleep(Duration::from_millis(200));
        }
        assert!(agent.is_alive());
        // The one that was given up is listed between its death and the moment in which that is known.
        wait_until("no process is listed", || {
            let all = Call::ListProcesses(v1::ListProcesses { ended: false });
            let Answer::Processes(list) = call(agent, all).unwrap() else {
                panic!()
            };
            list.processes.is_empty()
        });
        assert!(!waiting.is_finished() && !missing.is_finished());
        assert!(!named.iter().any(std::thread::ScopedJoinHandle::is_finished));
        freeze("0");
        let (stdout, _, how) = waiting.join().unwrap();
        assert_eq!((stdout.as_slice(), how), (&b"thawed\n"[..], exited(6)));
        assert!(missing.join().unwrap().is_err());
        let [one, other] = named.map(|it| it.join().unwrap());
        assert_eq!(one, other);
    });
    assert_eq!(how(&wait(agent, by_name("cold"))), exited(3));
    wait_until("nothing is left", || agent.children().is_empty());
}

#[test]
fn limits_hold() {
    let Some(agent) = Agent::start_with_cgroups() else {
        eprintln!("skipped: no writable cgroup v2 here");
        return;
    };
    let rlimit = |name: &str, soft, hard| v1::Rlimit {
        name: name.to_owned(),
        soft,
        hard,
    };
    let exec = v1::Exec {
        rlimits: vec![rlimit("nofile", 77, 88), rlimit("core", 0, u64::MAX)],
        ..sh("ulimit -n; ulimit -Hn; ulimit -c; ulimit -Hc")
    };
    assert_eq!(agent.run(exec).0, b"77\n88\n0\nunlimited\n");
    for bad in [rlimit("files", 1, 1), rlimit("nofile", 2, 1)] {
        let exec = v1::Exec {
            rlimits: vec![bad],
            ..sh("true")
        };
        assert_eq!(refused(&agent, Call::Exec(exec)), v1::error::Code::Invalid);
    }
    // Controllers are not to be had everywhere; a limit that cannot be set is an error then.
    let controllers = agent.cgroup().unwrap().join("user/cgroup.subtree_control");
    let controllers = std::fs::read_to_string(controllers).unwrap();
    let exec = v1::Exec {
        limits: Some(v1::Limits {
            pids: 3,
            ..v1::Limits::default()
        }),
        ..sh("sleep 0.1 & sleep 0.1 & sleep 0.1 & sleep 0.1 & wait; echo done")
    };
    if controllers.contains("pids") {
        let (_, stderr, _) = agent.run(exec);
        assert!(!stderr.is_empty());
    } else {
        assert_eq!(refused(&agent, Call::Exec(exec)), v1::error::Code::Invalid);
    }
}

#[test]
fn a_small_ring_does_not_stop_a_program_of_few_words() {
    let agent = Agent::start();
    let script = "i=0; while [ $i -lt 2000 ]; do echo 0123456789; i=$((i+1)); done";
    let exec = v1::Exec {
        ring_bytes: 4096,
        owner_key: b"key".to_vec(),
        ..sh(script)
    };
    let (stdout, _, end) = agent.run(exec);
    assert_eq!((stdout.len(), end), (22_000, exited(0)));
}

#[test]
fn a_terminal_is_given_back_when_its_program_ends_and_its_record_is_kept() {
    let agent = Agent::start();
    let before = agent.settled_descriptors();
    for number in 0..10 {
        let exec = v1::Exec {
            terminal: Some(v1::Terminal::default()),
            ..daemon(&format!("t{number}"), "echo hi; exec sleep 1000")
        };
        let mut terminal = Stream::open(&agent, Call::Exec(exec));
        terminal.until("hi");
        kill(&agent, by_name(&format!("t{number}")));
        wait(&agent, by_name(&format!("t{number}")));
    }
    // Channels that are kept for the next calls are no terminals.
    wait_until("the terminals are closed", || {
        agent.settled_descriptors() < before + 10
    });
    let (stdout, _) = Stream::open(&agent, Call::Attach(attach(by_name("t3")))).rest();
    assert_eq!(stdout, b"hi\r\n");
}
