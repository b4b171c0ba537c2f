//! Programs run by an agent as the host sees them. The agent runs here as an ordinary process on a
//! Unix socket; what it does is the same as in a guest.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, ExecEvent};
use belljar_protocol::v1::{self, end::How, spawn_failure::Kind};

use common::{Agent, argv, exited, is_running, sh, soon, wait_until};

fn spawn_failure(agent: &Agent, exec: v1::Exec) -> v1::SpawnFailure {
    match agent.exec(exec) {
        Err(CallError::SpawnFailed(failure)) => failure,
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("it was started"),
    }
}

#[test]
fn output_and_status_come_back() {
    let agent = Agent::start();
    let (stdout, stderr, how) = agent.run(sh("echo out; echo err >&2; exit 3"));
    assert_eq!(stdout, b"out\n");
    assert_eq!(stderr, b"err\n");
    assert_eq!(how, exited(3));
}

#[test]
fn environment_directory_and_arguments_are_as_asked() {
    let agent = Agent::start();
    let exec = v1::Exec {
        env: vec![b"GREETING=hi \xff".to_vec(), b"HOME=/nowhere".to_vec()],
        cwd: b"/usr".to_vec(),
        ..argv(&[
            "sh",
            "-c",
            "printf '%s|%s|%s|%s' \"$GREETING\" \"$HOME\" \"$PWD\" \"$1\"",
            "x",
            "a b",
        ])
    };
    let (stdout, _, how) = agent.run(exec);
    assert_eq!(stdout, b"hi \xff|/nowhere|/usr|a b");
    assert_eq!(how, exited(0));
}

#[test]
fn nothing_of_the_agent_leaks_into_programs() {
    let agent = Agent::start();
    let (stdout, _, _) = agent.run(argv(&["env"]));
    let text = String::from_utf8(stdout).unwrap();
    let mut names: Vec<_> = text
        .lines()
        .map(|line| line.split('=').next().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["HOME", "LOGNAME", "PATH", "USER"]);
    // No more than what the agent itself was started with: 0 to 2, in a guest.
    let own = Command::new("ls").arg("/proc/self/fd").output().unwrap();
    let (stdout, _, _) = agent.run(argv(&["ls", "/proc/self/fd"]));
    assert_eq!(stdout, own.stdout);
    // No signal is blocked, and none ignored (beyond what this test itself was started with).
    let status = ["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"];
    let own = Command::new(status[0]).args(&status[1..]).output().unwrap();
    assert_eq!(agent.run(argv(&status)).0, own.stdout);
}

#[test]
fn every_program_leads_its_own_session() {
    let agent = Agent::start();
    let (stdout, _, _) = agent.run(sh("cut -d' ' -f1,5,6 /proc/$$/stat"));
    let text = String::from_utf8(stdout).unwrap();
    let ids: Vec<_> = text.split_whitespace().collect();
    assert!(
        ids.len() == 3 && ids.iter().all(|id| *id == ids[0]),
        "{ids:?}"
    );
}

#[test]
fn a_signal_is_told_as_a_signal() {
    let agent = Agent::start();
    let (_, _, how) = agent.run(sh("kill -SEGV $$"));
    assert!(
        matches!(how, How::Signalled(v1::Signalled { number: 11, .. })),
        "{how:?}"
    );
    // A shell's convention is no signal.
    assert_eq!(agent.run(sh("exit 139")).2, exited(139));
}

#[test]
fn a_signal_of_the_host_reaches_the_group_even_behind_unread_input() {
    let agent = Agent::start();
    let script = "trap 'echo got; exit 8' INT; echo up; while :; do sleep 0.05; done";
    let mut exec = agent
        .exec(v1::Exec {
            stdin: v1::exec::Stdin::Stream.into(),
            ..sh(script)
        })
        .unwrap();
    assert_eq!(
        exec.next(soon()).unwrap(),
        Some(ExecEvent::Stdout(b"up\n".to_vec()))
    );
    exec.stdin().unwrap().write(&[b'x'; 150_000]).unwrap();
    let mut socket = exec.get_ref().try_clone().unwrap();
    for number in [0, 65, u32::MAX, 2] {
        let input = Some(v1::exec_input::Input::Signal(number));
        let mut bytes = Vec::new();
        belljar_protocol::frame::encode(&v1::ExecInput { input }, &mut bytes).unwrap();
        socket.write_all(&bytes).unwrap();
    }
    let (stdout, _, how) = exec.finish(1 << 20, soon()).unwrap();
    assert_eq!((stdout.as_slice(), how), (&b"got\n"[..], exited(8)));
}

#[test]
fn failures_to_start_are_typed() {
    let agent = Agent::start();
    let failure = spawn_failure(&agent, argv(&["no-such-program"]));
    assert_eq!(failure.kind(), Kind::NotFound);
    assert!(
        failure.message.contains("no-such-program"),
        "{}",
        failure.message
    );
    assert_eq!(
        spawn_failure(&agent, argv(&["/no/such"])).kind(),
        Kind::NotFound
    );
    assert_eq!(spawn_failure(&agent, argv(&[""])).kind(), Kind::NotFound);
    for not_executable in ["/etc/passwd", "/etc"] {
        let failure = spawn_failure(&agent, argv(&[not_executable]));
        assert_eq!(failure.kind(), Kind::NotExecutable);
        assert_eq!(failure.errno, 13);
    }
    let bad_cwd = v1::Exec {
        cwd: b"/no/such".to_vec(),
        ..argv(&["true"])
    };
    assert_eq!(spawn_failure(&agent, bad_cwd).kind(), Kind::BadCwd);
    for (user, kind) in [
        ("nobody-here", Kind::UnknownUser),
        ("0:nothing", Kind::UnknownGroup),
    ] {
        let exec = v1::Exec {
            user: user.to_owned(),
            ..argv(&["true"])
        };
        assert_eq!(spawn_failure(&agent, exec).kind(), kind);
    }
    let format = tempfile::tempdir().unwrap();
    let file = format.path().join("garbage");
    std::fs::write(&file, b"\x7fnot a program").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&file, mode).unwrap();
    let failure = spawn_failure(&agent, argv(&[file.to_str().unwrap()]));
    assert_eq!((failure.kind(), failure.errno), (Kind::NotExecutable, 8));
    // The answer does not wait for the child that failed to be reaped.
    wait_until("all are reaped", || agent.children().is_empty());
}

#[test]
fn invalid_calls_are_refused() {
    let agent = Agent::start();
    for exec in [
        argv(&[]),
        argv(&["a\0b"]),
        v1::Exec {
            env: vec![b"NOVALUE".to_vec()],
            ..argv(&["true"])
        },
    ] {
        let refused = agent.exec(exec).map(|exec| exec.pid());
        assert!(
            matches!(
                refused,
                Err(CallError::Refused {
                    code: v1::error::Code::Invalid,
                    ..
                })
            ),
            "{refused:?}"
        );
    }
}

#[test]
fn another_user_gets_ids_groups_and_home() {
    if !rustix::process::getuid().is_root() {
        return;
    }
    let agent = Agent::start();
    let exec = v1::Exec {
        user: "daemon".to_owned(),
        ..sh("id -u; id -g; echo $USER $HOME > /dev/stdout; grep CapEff /proc/self/status")
    };
    let (stdout, stderr, how) = agent.run(exec);
    let text = String::from_utf8(stdout).unwrap();
    assert_eq!(how, exited(0), "{}", String::from_utf8_lossy(&stderr));
    assert!(text.starts_with("1\n1\ndaemon /usr/sbin\n"), "{text}");
    assert!(text.ends_with("0000000000000000\n"), "{text}");
    let exec = v1::Exec {
        user: "4242:4343".to_owned(),
        ..argv(&["id", "-G"])
    };
    assert_eq!(agent.run(exec).0, b"4343\n");
}

#[test]
fn stdin_closed_is_end_of_file() {
    let agent = Agent::start();
    let (stdout, _, how) = agent.run(sh("cat; echo done"));
    assert_eq!((stdout.as_slice(), how), (&b"done\n"[..], exited(0)));
}

#[test]
fn stdin_is_streamed_until_its_end() {
    let agent = Agent::start();
    let mut exec = agent
        .exec(v1::Exec {
            stdin: v1::exec::Stdin::Stream.into(),
            ..argv(&["cat"])
        })
        .unwrap();
    let mut stdin = exec.stdin().unwrap();
    stdin.write(b"one").unwrap();
    assert_eq!(
        exec.next(soon()).unwrap(),
        Some(ExecEvent::Stdout(b"one".to_vec()))
    );
    // More than the pipes and sockets on the way hold, so that each of them is full at some time.
    let data: Vec<u8> = (0..4_000_000_u32).map(|n| (n % 251) as u8).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        stdin.write(&sent).unwrap();
        stdin.close().unwrap();
    });
    let (stdout, _, how) = exec.finish(1 << 30, soon()).unwrap();
    writer.join().unwrap();
    assert!(stdout == data, "{} of {} bytes", stdout.len(), data.len());
    assert_eq!(how, exited(0));
}

#[test]
fn stdin_that_nobody_reads_holds_nothing_up() {
    let agent = Agent::start();
    let exec = agent
        .exec(v1::Exec {
            stdin: v1::exec::Stdin::Stream.into(),
            ..sh("exec <&-; sleep 0.1; exit 7")
        })
        .unwrap();
    let mut stdin = exec.stdin().unwrap();
    let writer = std::thread::spawn(move || while stdin.write(&[0; 65536]).is_ok() {});
    assert_eq!(exec.finish(0, soon()).unwrap().2, exited(7));
    writer.join().unwrap();
}

#[test]
fn an_open_stdin_does_not_keep_an_ended_program() {
    let agent = Agent::start();
    let exec = agent
        .exec(v1::Exec {
            stdin: v1::exec::Stdin::Stream.into(),
            ..argv(&["true"])
        })
        .unwrap();
    assert_eq!(exec.finish(0, soon()).unwrap().2, exited(0));
}

#[test]
fn much_output_on_both_streams_arrives_whole() {
    let agent = Agent::start();
    let script = "head -c 20000000 /dev/zero & head -c 10000000 /dev/zero >&2; wait";
    let (stdout, stderr, how) = agent.run(sh(script));
    assert_eq!((stdout.len(), stderr.len()), (20_000_000, 10_000_000));
    assert_eq!(how, exited(0));
}

#[test]
fn the_last_bytes_before_the_end_arrive() {
    let agent = Agent::start();
    for _ in 0..50 {
        let (stdout, _, _) = agent.run(sh("head -c 60000 /dev/zero"));
        assert_eq!(stdout.len(), 60_000);
    }
}

#[test]
fn a_grandchild_that_holds_the_pipes_does_not_keep_the_call() {
    let agent = Agent::start();
    let start = Instant::now();
    let (stdout, _, how) = agent.run(sh("sleep 20 & echo $!; exit 4"));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(how, exited(4));
    // It lives on, as after a shell's `&`; it was not killed with its parent.
    let pid: u32 = String::from_utf8(stdout).unwrap().trim().parse().unwrap();
    assert!(is_running(pid));
    agent.run(sh(&format!("kill {pid}")));
    wait_until("the agent has reaped it", || {
        !is_running(pid) && agent.children().is_empty()
    });
}

#[test]
fn a_grandchild_that_writes_for_ever_does_not_keep_the_call() {
    let agent = Agent::start();
    let (stdout, _, how) = agent.run(sh("yes & echo $! >&2; sleep 0.2; exit 5"));
    assert_eq!(how, exited(5));
    assert!(!stdout.is_empty());
}

#[test]
fn a_time_limit_ends_with_term_or_kill() {
    let agent = Agent::start();
    let limited = |script: &str, grace_ms| v1::Exec {
        time_limit_ms: 200,
        grace_ms: Some(grace_ms),
        ..sh(script)
    };
    let (_, _, how) = agent.run(limited("sleep 30", 20_000));
    assert_eq!(how, How::TimedOut(v1::TimedOut { killed: false }));
    let (_, _, how) = agent.run(limited("trap '' TERM; while :; do sleep 1; done", 200));
    assert_eq!(how, How::TimedOut(v1::TimedOut { killed: true }));
    let (_, _, how) = agent.run(limited("sleep 30", 0));
    assert_eq!(how, How::TimedOut(v1::TimedOut { killed: true }));
    // A program that is quick enough is not touched.
    assert_eq!(agent.run(limited("exit 9", 0)).2, exited(9));
    wait_until("all are reaped", || agent.children().is_empty());
}

#[test]
fn a_cut_connection_kills_the_program_and_its_children() {
    let agent = Agent::start();
    let mut exec = agent.exec(sh("sleep 30 & echo $!; wait")).unwrap();
    let Some(ExecEvent::Stdout(line)) = exec.next(soon()).unwrap() else {
        panic!("no output")
    };
    let child: u32 = String::from_utf8(line).unwrap().trim().parse().unwrap();
    let parent = exec.pid();
    assert!(is_running(child) && is_running(parent));
    drop(exec);
    wait_until("both are gone", || {
        !is_running(child) && !is_running(parent)
    });
    wait_until("both are reaped", || agent.children().is_empty());
}

#[test]
fn a_host_that_does_not_read_stalls_only_itself() {
    let agent = Agent::start();
    let stalled: Vec<_> = (0..4)
        .map(|_| agent.exec(argv(&["yes"])).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let before = agent.resident_kib();
    assert_eq!(agent.run(sh("echo hi")).0, b"hi\n");
    std::thread::sleep(Duration::from_millis(200));
    assert!(
        agent.resident_kib() < before + 512,
        "it buffers without bound"
    );
    drop(stalled);
    wait_until("all are reaped", || agent.children().is_empty());
}

#[test]
fn cgroups_leave_no_descendant() {
    let Some(agent) = Agent::start_with_cgroups() else {
        eprintln!("skipped: no writable cgroup v2 here");
        return;
    };
    // A descendant in a session of its own, which a signal to the group does not reach.
    let script = "setsid sh -c 'echo $$; exec sleep 30' & wait; sleep 30";
    let mut exec = agent.exec(sh(script)).unwrap();
    let Some(ExecEvent::Stdout(line)) = exec.next(soon()).unwrap() else {
        panic!("no output")
    };
    let child: u32 = String::from_utf8(line).unwrap().trim().parse().unwrap();
    assert!(is_running(child));
    drop(exec);
    wait_until("it is gone", || !is_running(child));
    let limited = v1::Exec {
        time_limit_ms: 200,
        ..sh("setsid sleep 30 & setsid sleep 30 & sleep 30")
    };
    let (_, _, how) = agent.run(limited);
    assert!(matches!(how, How::TimedOut(_)), "{how:?}");
    wait_until("nothing is left", || agent.children().is_empty());
    assert_eq!(agent.run(sh("exit 6")).2, exited(6));
}

/// `BELLJAR_SOAK=1` makes it long.
#[test]
fn a_thousand_programs_leave_nothing_behind() {
    let programs = match std::env::var_os("BELLJAR_SOAK") {
        Some(_) => 100_000,
        None => 1000,
    };
    let agent = Agent::start();
    let run_some = |count: u32| {
        for round in 0..count {
            let exec = sh(&format!("echo {round}; exit {}", round % 256));
            let (stdout, _, how) = agent.run(exec);
            assert_eq!(stdout, format!("{round}\n").as_bytes());
            assert_eq!(how, exited(round % 256));
        }
    };
    // Until there are as many records of ended programs, and events, as are kept.
    run_some(1500);
    let (descriptors, memory) = (agent.settled_descriptors(), agent.resident_kib());
    run_some(programs);
    // A channel or two more may be kept for the next calls.
    wait_until("all is closed", || {
        agent.open_descriptors() <= descriptors + 16
    });
    assert!(agent.children().is_empty());
    assert!(
        agent.resident_kib() < memory + 256,
        "{:?} KiB after {memory} KiB",
        agent.resident_kib_of_each()
    );
}

#[test]
fn many_programs_at_a_time_end_each_with_its_own_status() {
    let agent = Agent::start();
    let running: Vec<_> = (0..60_u32)
        .map(|code| {
            (
                code,
                agent
                    .exec(sh(&format!("sleep 0.3; echo {code}; exit {code}")))
                    .unwrap(),
            )
        })
        .collect();
    for (code, exec) in running {
        let (stdout, _, how) = exec.finish(1 << 20, soon()).unwrap();
        assert_eq!(
            (stdout, how),
            (format!("{code}\n").into_bytes(), exited(code))
        );
    }
}

#[test]
fn the_limit_of_programs_is_told_and_ping_still_answers() {
    let agent = Agent::start();
    let mut running = Vec::new();
    let refused = loop {
        match agent.exec(argv(&["sleep", "60"])) {
            Ok(exec) => running.push(exec),
            Err(error) => break error,
        }
        assert!(running.len() < 2000);
    };
    let CallError::Refused { code, .. } = refused else {
        panic!("{refused}")
    };
    assert_eq!(code, v1::error::Code::Busy);
    assert!(agent.is_alive());
    running.clear();
    wait_until("all are reaped", || agent.children().is_empty());
    assert_eq!(agent.run(argv(&["true"])).2, exited(0));
}

#[test]
fn silent_connections_make_room_for_calls() {
    let agent = Agent::start();
    let mut silent: Vec<_> = (0..300).map(|_| agent.connect()).collect();
    assert!(agent.is_alive());
    assert_eq!(agent.run(sh("exit 2")).2, exited(2));
    // Half a request is as silent.
    for stream in &mut silent {
        let _ = stream.write_all(&[200]);
    }
    assert!(agent.is_alive());
}

#[test]
fn shutdown_ends_programs_and_then_the_agent() {
    let mut agent = Agent::start();
    let polite = agent
        .exec(sh("trap 'exit 33' TERM; echo up; sleep 30 & wait"))
        .unwrap();
    let mut polite = polite;
    assert_eq!(
        polite.next(soon()).unwrap(),
        Some(ExecEvent::Stdout(b"up\n".to_vec()))
    );
    let stubborn = agent
        .exec(sh("trap '' TERM; while :; do sleep 1; done"))
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let grace = Some(Duration::from_millis(500));
    let mode = v1::shutdown::Mode::PowerOff;
    belljar_protocol::client::shutdown(agent.connect(), mode, grace, soon()).unwrap();
    let refused = agent.exec(argv(&["true"])).map(|exec| exec.pid());
    assert!(
        matches!(
            refused,
            Err(CallError::Refused {
                code: v1::error::Code::ShuttingDown,
                ..
            })
        ),
        "{refused:?}"
    );
    assert_eq!(polite.finish(0, soon()).unwrap().2, exited(33));
    let (_, _, how) = stubborn.finish(0, soon()).unwrap();
    assert!(
        matches!(how, How::Signalled(v1::Signalled { number: 9, .. })),
        "{how:?}"
    );
    assert!(agent.wait().success());
}

#[test]
fn a_shutdown_waits_a_moment_for_its_reply_to_be_taken() {
    let mut agent = Agent::start();
    let connection = agent.connect();
    let held = connection.try_clone().unwrap();
    let began = Instant::now();
    let mode = v1::shutdown::Mode::PowerOff;
    belljar_protocol::client::shutdown(connection, mode, Some(Duration::ZERO), soon()).unwrap();
    assert!(agent.wait().success());
    let time = began.elapsed();
    assert!(time >= Duration::from_millis(200), "{time:?}");
    drop(held);
}

#[test]
fn a_shutdown_gives_time_to_what_runs_outside_of_all_groups_too() {
    let mut agent = Agent::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("done");
    let script = format!(
        "setsid sh -c 'exec >/dev/null 2>&1; sleep 0.7; touch {}' & exit 0",
        file.display()
    );
    assert_eq!(agent.run(sh(&script)).2, exited(0));
    let mode = v1::shutdown::Mode::PowerOff;
    belljar_protocol::client::shutdown(agent.connect(), mode, Some(common::PATIENCE), soon())
        .unwrap();
    agent.wait();
    assert!(file.exists());
}

#[test]
fn no_program_gets_the_cgroup_of_another() {
    let Some(agent) = Agent::start_with_cgroups() else {
        return;
    };
    let own = "sed -n 's/^0:://p' /proc/self/cgroup";
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..6 {
        let (stdout, _, end) = agent.run(sh(own));
        assert_eq!(end, exited(0));
        let path = String::from_utf8(stdout).unwrap();
        assert!(path.contains("/user/"), "{path:?}");
        assert!(seen.insert(path), "{seen:?}");
    }
    // Of those that are over none is left, and some are ready.
    let user = agent.cgroup().unwrap().join("user");
    let left = || {
        let names = seen
            .iter()
            .filter_map(|path| path.trim().rsplit('/').next());
        names.filter(|name| user.join(name).is_dir()).count()
    };
    common::wait_until("the old ones are removed", || left() == 0);
    let folders = std::fs::read_dir(&user).unwrap().flatten();
    let ready = folders.filter(|entry| entry.path().is_dir()).count();
    assert!((1..=8).contains(&ready), "{ready}");
}
