//! A guest as a whole: figures, events, clock, randomness, standing still.

use std::time::Duration;

use belljar_e2e::pty::OnTerminal;
use belljar_e2e::{Said, Sandbox, User, eventually};
use serde_json::Value;

fn json(said: &Said) -> Value {
    assert_eq!(said.code(), 0, "{}", said.err);
    serde_json::from_slice(&said.out).unwrap_or_else(|error| panic!("{error}: {}", said.text()))
}

fn system(sandbox: &Sandbox<'_>, action: &str, more: &[&str]) -> Said {
    let mut all = vec!["system", action, sandbox.id()];
    all.extend(more);
    sandbox.user().says(&all)
}

fn background(sandbox: &Sandbox<'_>, name: &str, script: &str) {
    let all = [
        "exec",
        "-d",
        "--name",
        name,
        sandbox.id(),
        "sh",
        "-c",
        script,
    ];
    let said = sandbox.user().says(&all);
    assert_eq!(said.code(), 0, "{}", said.err);
}

fn events(sandbox: &Sandbox<'_>, more: &[&str]) -> Vec<Value> {
    let mut all = vec!["-o", "json"];
    all.extend(more);
    let said = sandbox.says("events", &all);
    assert_eq!(said.code(), 0, "{}", said.err);
    said.text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn what_a_guest_uses_is_shown_beside_what_the_host_counts() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    an_agent_at_rest_is_small(&sandbox);
    background(&sandbox, "busy", "while :; do :; done");
    let stats = || json(&sandbox.says("stats", &["-o", "json"]))[0].clone();
    let first = stats();
    let number =
        |stats: &Value, path: &str| stats.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    for path in [
        "/guest/memory_total",
        "/guest/disk_total",
        "/guest/tasks",
        "/guest/agent_memory",
        "/host/vcpus_us/0",
    ] {
        assert!(number(&first, path) > 0, "{path}: {first}");
    }
    assert_eq!(number(&first, "/guest/cpus"), 1);
    assert_eq!(first["guest"]["processes"][0]["name"], "busy");
    eventually("both counts of processor time to grow", || {
        let now = stats();
        [
            "/guest/cpu_busy_us",
            "/guest/user/cpu_us",
            "/guest/processes/0/usage/cpu_us",
            "/host/vcpus_us/0",
        ]
        .iter()
        .all(|path| number(&now, path) > number(&first, path))
    });
    let said = user.says(&["stats", "-o", "table"]);
    assert!(
        said.text().contains(sandbox.id()) && said.text().contains("VCPU"),
        "{}",
        said.text()
    );
    assert_eq!(user.says(&["stats", "no-such-box"]).code(), 125);

    // Once and plain, and on a terminal until q.
    let said = sandbox.says("top", &[]);
    assert_eq!(said.code(), 0, "{}", said.err);
    assert!(
        said.text().contains("host: ") && said.text().contains("busy"),
        "{}",
        said.text()
    );
    assert!(!said.text().contains('\x1b'));
    let mut terminal = OnTerminal::start(&sandbox.belljar("top", &["-i", "200ms"]), 100, 30);
    terminal.shows("busy");
    assert!(terminal.is_raw());
    terminal.press(b"q");
    assert_eq!(terminal.wait().code(), Some(0));
    assert!(terminal.is_as_before());

    // What has happened is remembered.
    let known = events(&sandbox, &[]);
    let busy = known.iter().find(|event| event["process_name"] == "busy");
    assert_eq!(busy.unwrap()["event"], "started");
    let next = (known.last().unwrap()["sequence"].as_u64().unwrap() + 1).to_string();
    let following = sandbox.start("events", &["-f", "-o", "json", "--from", &next]);
    assert_eq!(sandbox.says("exec", &["sh", "-c", "exit 9"]).code(), 9);
    eventually("the end to be told", || {
        let text = String::from_utf8_lossy(&following.out_so_far()).into_owned();
        text.lines()
            .any(|line| line.contains("\"ended\"") && line.contains("\"status\":9"))
    });
    // A worker that is replaced is told to whoever follows, and cuts nobody off.
    background(&sandbox, "killer", "kill -9 $(pgrep -f -- '--worker$')");
    eventually("the new worker to be told", || {
        String::from_utf8_lossy(&following.out_so_far()).contains("worker_replaced")
    });
    following.signal(rustix::process::Signal::KILL);
    assert_eq!(following.wait().code(), -1);
}

/// Looking is no activity, a touch is; a guest that does not answer is told.
fn activity(sandbox: &Sandbox<'_>) {
    // Of the last activity, in the guest's time.
    let last = || {
        let ping = json(&system(sandbox, "ping", &["-o", "json"]));
        let field = |name: &str| {
            ping[name]
                .as_u64()
                .unwrap_or_else(|| panic!("{name}: {ping}"))
        };
        field("up_us") - field("idle_us")
    };
    let first = last();
    assert_eq!(sandbox.says("ps", &["-a"]).code(), 0);
    // Microseconds are rounded twice.
    assert!(last().abs_diff(first) <= 2);
    system(sandbox, "touch", &[]).is(0, "");
    assert!(last() > first + 2);
    let said = system(sandbox, "ping", &["-o", "table"]);
    assert!(said.text().contains("last activity"), "{}", said.text());
    assert_eq!(sandbox.says("pause", &[]).code(), 0);
    for action in ["ping", "touch"] {
        let said = system(sandbox, action, &[]);
        assert_eq!(said.code(), 125);
        said.explains(&["is paused", "belljar resume"]);
    }
    assert_eq!(sandbox.says("resume", &[]).code(), 0);
}

/// Of agent and worker together, bytes.
const AGENT_MAX: u64 = 4 << 20;

/// Before anything has run: by the agent's own count, and by the guest's kernel.
fn an_agent_at_rest_is_small(sandbox: &Sandbox<'_>) {
    let stats = json(&sandbox.says("stats", &["-o", "json"]));
    let said = stats[0]["guest"]["agent_memory"].as_u64().unwrap();
    assert!((1..=AGENT_MAX).contains(&said), "{said} bytes");
    let script =
        "grep -h VmRSS: /proc/1/status $(pgrep -f -- '--worker$' | sed 's,.*,/proc/&/status,')";
    let counted = sandbox.says("exec", &["sh", "-c", script]);
    assert_eq!(counted.code(), 0, "{}", counted.err);
    let kib: Vec<u64> = counted
        .text()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    assert_eq!(kib.len(), 2, "agent and worker: {}", counted.text());
    let counted = kib.iter().sum::<u64>() * 1024;
    assert!(counted <= AGENT_MAX, "{kib:?} KiB");
}

#[test]
fn a_guest_is_frozen_thawed_set_right_and_reseeded() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    let inside = |script: &str| {
        let said = sandbox.says("exec", &["sh", "-c", script]);
        assert_eq!(said.code(), 0, "{script}: {}", said.err);
        said.text().trim().to_owned()
    };

    // A year off, and right again.
    let said = system(&sandbox, "clock", &["--to", "1700000000.5"]);
    assert!(
        said.code() == 0 && said.text().starts_with("1700000000."),
        "{}",
        said.err
    );
    assert!(inside("date +%s").parse::<u64>().unwrap() - 1_700_000_000 < 600);
    assert_eq!(system(&sandbox, "clock", &[]).code(), 0);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(inside("date +%s").parse::<u64>().unwrap().abs_diff(now) < 600);
    assert!(
        events(&sandbox, &[])
            .iter()
            .filter(|event| event["event"] == "clock_set")
            .count()
            == 2
    );
    assert_eq!(system(&sandbox, "clock", &["--to", "x"]).code(), 125);

    activity(&sandbox);

    system(&sandbox, "reseed", &[]).is(0, "");
    assert_eq!(inside("head -c 32 /dev/urandom | wc -c"), "32");
    system(&sandbox, "sync", &[]).is(0, "");

    // Stopped with its file system: nothing moves, and what looks and ends still works.
    background(&sandbox, "writer", "while :; do echo x >> /root/log; done");
    let cpu = || {
        let stats = json(&sandbox.says("stats", &["-o", "json"]));
        stats[0]["guest"]["user"]["cpu_us"].as_u64().unwrap()
    };
    let before = cpu();
    eventually("the writer to run", || cpu() > before);
    for flags in [&["-f"][..], &[]] {
        system(&sandbox, "freeze", flags).is(0, "");
        let frozen = cpu();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(cpu(), frozen);
        assert_eq!(sandbox.state(), "running");
        let said = sandbox.says("exec", &["true"]);
        assert_eq!(said.code(), 125);
        said.explains(&["frozen", "belljar system thaw"]);
        let arguments = ["debug", "state", sandbox.id(), "-o", "table"];
        let said = sandbox.user().says(&arguments);
        assert_eq!(said.code(), 1, "{}", said.text());
        for part in ["programs are frozen", "belljar system thaw"] {
            assert!(said.text().contains(part), "{}", said.text());
        }
        // Twice is once; a new worker knows how to thaw, too.
        system(&sandbox, "freeze", flags).is(0, "");
        system(&sandbox, "thaw", &[]).is(0, "");
        eventually("the writer to go on", || cpu() > frozen);
        inside("echo more >> /root/log; sync");
    }
    system(&sandbox, "thaw", &[]).is(0, "");
    let told = events(&sandbox, &[]);
    assert!(told.iter().any(|event| event["event"] == "frozen"));
    assert!(told.iter().any(|event| event["event"] == "thawed"));

    // What is frozen can be killed, and the guest can be stopped.
    system(&sandbox, "freeze", &["-f"]).is(0, "");
    sandbox.says("kill", &["writer", "-s", "KILL"]).is(0, "");
    sandbox.says("wait", &["--end", "writer"]).is(0, "137\n");
    let said = sandbox.says("stop", &[]);
    assert_eq!((said.code(), said.err.as_str()), (0, ""));
    assert_eq!(system(&sandbox, "ping", &[]).code(), 125);
}
