//! A guest that is full of something: the host still reaches what it needs. `BELLJAR_SOAK=1` opens 1,000
//! terminals instead of 100.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_e2e::{PATIENCE, Sandbox, User};
use belljar_protocol::client::{self, process};
use belljar_protocol::v1::{self, end::How, process_ref::Ref, signal::Scope};
use belljar_protocol::{AGENT_PORT, hybrid};

/// Pings of one measurement. The slowest of a hundred may be slower than the limit.
const PINGS: usize = 100;

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

/// The slowest but one of a hundred pings, connection included.
fn slow_ping(sandbox: &Sandbox<'_>) -> Duration {
    let mut times: Vec<Duration> = (0..PINGS)
        .map(|_| {
            let start = Instant::now();
            client::ping(connect(sandbox), Some(soon())).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[PINGS - 2]
}

fn kill(sandbox: &Sandbox<'_>, name: &str) {
    let signal = v1::Signal {
        process: Some(named(name)),
        number: 9,
        scope: Scope::Tree.into(),
    };
    process::signal(connect(sandbox), signal, Some(soon())).unwrap();
    let wait = process::wait(connect(sandbox), named(name), Some(PATIENCE));
    let end = wait.unwrap().unwrap().end.unwrap();
    assert!(
        matches!(end.how, Some(How::Signalled(_) | How::OutOfMemory(_))),
        "{end:?}"
    );
}

fn output(sandbox: &Sandbox<'_>, script: &str) -> String {
    let exec = client::Exec::start(connect(sandbox), sh(script), Some(soon())).unwrap();
    let (stdout, _, _) = exec.finish(1 << 20, Some(soon())).unwrap();
    String::from_utf8(stdout).unwrap()
}

#[test]
fn ping_and_kill_answer_whatever_the_guest_is_full_of() {
    let user = User::new();
    let sandbox = user.sandbox(&["--memory", "512M", "--disk", "256M"]);
    let at_rest = slow_ping(&sandbox);
    // A machine that does other things as well is no failure.
    let limit = Duration::from_millis(50).max(at_rest * 20);
    for (name, script) in [
        ("processes", "f() { f | f & }; f; sleep 1000"),
        (
            "computing",
            "for n in $(seq 200); do (while :; do :; done) & done; wait",
        ),
        (
            "memory",
            "while :; do python3 -c 'x = []\nwhile 1: x.append(bytearray(1 << 20))'; done",
        ),
        (
            "files-in-memory",
            "while :; do cat /dev/zero > /dev/shm/x; done",
        ),
        ("disk", "while :; do cat /dev/zero > /var/x; done"),
    ] {
        daemon(&sandbox, name, sh(script));
        std::thread::sleep(Duration::from_secs(2));
        let slow = slow_ping(&sandbox);
        eprintln!("{name}: {slow:?}, at rest {at_rest:?}");
        assert!(slow <= limit, "{name}: {slow:?} ({at_rest:?} at rest)");
        kill(&sandbox, name);
        assert_eq!(
            output(&sandbox, "rm -f /dev/shm/x /var/x; echo fine"),
            "fine\n"
        );
    }
    let terminal = v1::Exec {
        argv: ["sleep", "1000"]
            .map(|word| word.as_bytes().to_vec())
            .to_vec(),
        terminal: Some(v1::Terminal::default()),
        ..v1::Exec::default()
    };
    let terminals = if std::env::var_os("BELLJAR_SOAK").is_some() {
        1000
    } else {
        100
    };
    for number in 0..terminals {
        daemon(&sandbox, &format!("t{number}"), terminal.clone());
    }
    let slow = slow_ping(&sandbox);
    eprintln!("{terminals} terminals: {slow:?}, at rest {at_rest:?}");
    assert!(slow <= limit, "{terminals} terminals: {slow:?}");
    assert_eq!(
        output(&sandbox, "ls /dev/pts | wc -l"),
        format!("{}\n", terminals + 1)
    );
    for number in 0..terminals {
        kill(&sandbox, &format!("t{number}"));
    }
    assert_eq!(output(&sandbox, "ls /dev/pts | wc -l"), "1\n");
}
