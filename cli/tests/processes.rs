//! exec, ps, logs, attach and kill against an agent on this machine.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use common::{ID, Sandbox, eventually, finish, text};

#[test]
fn commands_behave_as_commands_do() {
    let sandbox = Sandbox::start();
    sandbox.expect(&["exec", ID, "echo", "hello"], 0, "hello\n");
    sandbox.expect(&["exec", "abc", "sh", "-c", "exit 7"], 7, "");
    sandbox.expect(&["exec", ID, "sh", "-c", "kill -TERM $$"], 143, "");
    sandbox.expect(&["exec", ID, "no-such-program"], 127, "");
    sandbox.expect(&["exec", ID, "/etc/passwd"], 126, "");
    sandbox.expect(&["exec", ID, "--", "sh", "-c", "echo $0"], 0, "sh\n");
    sandbox.expect(
        &["exec", ID, "echo", "-it", "--name", "x"],
        0,
        "-it --name x\n",
    );
    sandbox.expect(
        &[
            "exec",
            "-e",
            "A=1",
            "-w",
            "/usr",
            ID,
            "sh",
            "-c",
            "echo $A; pwd",
        ],
        0,
        "1\n/usr\n",
    );
    sandbox.expect(&["exec", "--timeout", "200ms", ID, "sleep", "100"], 124, "");
    sandbox.expect(
        &[
            "exec",
            "--ulimit",
            "nofile=77:99",
            ID,
            "sh",
            "-c",
            "ulimit -n; ulimit -Hn",
        ],
        0,
        "77\n99\n",
    );
    let output = sandbox.says(&["exec", "nobody", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("no sandbox 'nobody'"));
}

#[test]
fn input_is_passed_on_only_when_asked_for_and_never_hangs() {
    let sandbox = Sandbox::start();
    // Standard input is an open pipe that nobody closes.
    let mut quiet = sandbox
        .belljar(&["exec", ID, "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let _open = quiet.stdin.take();
    assert_eq!(finish(quiet).status.code(), Some(0));
    let mut ends = sandbox
        .belljar(&["exec", "-i", ID, "sh", "-c", "exit 3"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let _open = ends.stdin.take();
    assert_eq!(finish(ends).status.code(), Some(3));
    let mut late = sandbox
        .belljar(&["exec", "-i", "--timeout", "200ms", ID, "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let _open = late.stdin.take();
    assert_eq!(finish(late).status.code(), Some(124));

    let mut counts = sandbox
        .belljar(&["exec", "-i", ID, "wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = counts.stdin.take().unwrap();
    stdin.write_all(&vec![b'x'; 5_000_000]).unwrap();
    drop(stdin);
    let output = finish(counts);
    assert_eq!(text(&output.stdout), "5000000\n");
}

#[test]
fn a_detached_process_is_listed_read_and_killed() {
    let sandbox = Sandbox::start();
    let script = "echo one; echo two >&2; sleep 1000 & sleep 1000";
    sandbox.expect(
        &["exec", "-d", "--name", "job", ID, "sh", "-c", script],
        0,
        "job\n",
    );
    // Again: nothing is started.
    sandbox.expect(
        &["exec", "-d", "--name", "job", ID, "sh", "-c", script],
        0,
        "job\n",
    );
    let list = || -> serde_json::Value {
        serde_json::from_slice(&sandbox.says(&["ps", "-a", ID]).stdout).unwrap()
    };
    let all = list();
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    assert_eq!(all[0]["name"], "job");
    assert_eq!(all[0]["detached"], true);
    eventually("its output", || list()[0]["stdout"]["newest"] == 4);
    let output = sandbox.says(&["logs", ID, "job"]);
    assert_eq!(text(&output.stdout), "one\n");
    assert_eq!(text(&output.stderr), "two\n");
    sandbox.expect(&["logs", "--from", "2:9", ID, "job"], 0, "e\n");
    sandbox.expect(&["logs", "--tail", "0", ID, "job"], 0, "");
    sandbox.expect(&["kill", "--tree", "-s", "KILL", ID, "job"], 0, "");
    eventually("its end", || list()[0]["state"] == "ended");
    assert_eq!(list()[0]["end"]["exit_status"], 137);
    sandbox.expect(&["kill", ID, "job"], 0, "");
    let output = sandbox.says(&["kill", ID, "nothing"]);
    assert_eq!(output.status.code(), Some(125));
    // Its output is still there, and its end is told to whoever comes later.
    sandbox.expect(&["logs", "-f", ID, "job"], 0, "one\n");
    sandbox.expect(&["attach", ID, "job"], 137, "one\n");
    let again = &["exec", "--name", "job", ID, "echo", "new"];
    sandbox.expect(again, 137, "one\n");
    let replaced = &["exec", "--name", "job", "--replace", ID, "echo", "new"];
    sandbox.expect(replaced, 0, "new\n");
}

#[test]
fn a_ring_keeps_the_last_bytes_and_tells_what_is_missing() {
    let sandbox = Sandbox::start();
    let script = "seq 1 20000; sleep 1000";
    sandbox.expect(
        &[
            "exec", "-d", "--name", "long", "--ring", "16K", ID, "sh", "-c", script,
        ],
        0,
        "long\n",
    );
    eventually("all of it", || {
        text(&sandbox.says(&["logs", "--tail", "1", ID, "long"]).stdout) == "20000\n"
    });
    let output = sandbox.says(&["logs", "--from", "0", ID, "long"]);
    let kept = text(&output.stdout);
    assert!(kept.ends_with("19999\n20000\n"), "{kept}");
    let err = text(&output.stderr);
    let missing = 108_894 - kept.len();
    assert!(
        err.contains(&format!("{missing} bytes of output are missing")),
        "{err}"
    );
    sandbox.expect(&["kill", "-s", "9", ID, "long"], 0, "");
}

#[test]
fn a_command_dies_with_belljar_and_gets_its_signals() {
    let sandbox = Sandbox::start();
    let running = || text(&sandbox.says(&["ps", "-q", ID]).stdout);
    let mut killed = sandbox
        .belljar(&["exec", ID, "sleep", "1000"])
        .spawn()
        .unwrap();
    eventually("it runs", || !running().is_empty());
    killed.kill().unwrap();
    killed.wait().unwrap();
    eventually("it is gone", || running().is_empty());

    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.01; done";
    let mut command = sandbox.belljar(&["exec", ID, "sh", "-c", script]);
    let mut caught = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = caught.stdout.take().unwrap();
    let mut ready = [0; 6];
    out.read_exact(&mut ready).unwrap();
    let pid = rustix::process::Pid::from_child(&caught);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(finish(caught).status.code(), Some(9));
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "caught\n");
}

/// A worker that dies again and again costs no byte, neither way.
#[test]
fn a_worker_may_die_at_any_moment() {
    let sandbox = Sandbox::start();
    let mut cat = sandbox
        .belljar(&["exec", "-i", ID, "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let sent: Vec<u8> = (0..1_500_000_u32)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let mut stdin = cat.stdin.take().unwrap();
    let to_send = sent.clone();
    let writer = thread::spawn(move || {
        for piece in to_send.chunks(100_000) {
            stdin.write_all(piece).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
    });
    let mut stdout = cat.stdout.take().unwrap();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        stdout.read_to_end(&mut got).unwrap();
        got
    });
    let mut killed = 0;
    while !writer.is_finished() {
        sandbox.replace_worker();
        killed += 1;
        thread::sleep(Duration::from_millis(10));
    }
    writer.join().unwrap();
    let got = reader.join().unwrap();
    assert_eq!(finish(cat).status.code(), Some(0));
    assert!(killed >= 3, "{killed}");
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
}

/// Connections that break cost a reader no byte.
#[test]
fn a_reader_takes_up_where_the_connection_broke() {
    let sandbox = Sandbox::start();
    let script = "seq 1 100000; sleep 0.3; echo end";
    let start = [
        "exec", "-d", "--name", "talk", "--ring", "2M", ID, "sh", "-c", script,
    ];
    sandbox.expect(&start, 0, "talk\n");
    // More than a frame, or nobody would ever get on.
    sandbox.cut_after.store(80_000, Ordering::Relaxed);
    let before = sandbox.connections.load(Ordering::Relaxed);
    let begin = Instant::now();
    let output = sandbox.says(&["logs", "-f", ID, "talk"]);
    let mut expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    expected.push_str("end\n");
    assert!(text(&output.stdout) == expected, "{}", output.stdout.len());
    assert!(sandbox.connections.load(Ordering::Relaxed) - before > 6);
    assert!(begin.elapsed() < Duration::from_secs(10));
}
