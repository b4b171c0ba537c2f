//! Programs in a guest that stays: started, found again, read, limited, killed.

use std::io::Write;
use std::time::{Duration, Instant};

use belljar_e2e::{Sandbox, User, eventually};
use serde_json::Value;

fn list(sandbox: &Sandbox<'_>) -> Value {
    let said = sandbox.says("ps", &["-a", "-o", "json"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    serde_json::from_slice(&said.out).unwrap()
}

fn find(sandbox: &Sandbox<'_>, name: &str) -> Value {
    let all = list(sandbox);
    let found = all.as_array().unwrap().iter().find(|it| it["name"] == name);
    found
        .cloned()
        .unwrap_or_else(|| panic!("no {name} in {all}"))
}

/// `belljar exec OPTIONS BOX COMMAND`, to its end.
fn exec(sandbox: &Sandbox<'_>, options: &[&str], command: &[&str]) -> belljar_e2e::Said {
    let mut all = vec!["exec"];
    all.extend(options);
    all.push(sandbox.id());
    all.extend(command);
    sandbox.user().says(&all)
}

#[test]
fn programs_in_a_guest_that_stays() {
    let user = User::new();
    let sandbox = user.sandbox(&["--memory", "512M"]);
    statuses(&sandbox);
    input(&sandbox);
    named_and_detached(&sandbox);
    rings(&sandbox);
    attached_without_input(&sandbox);
    limits(&sandbox);
    descendants(&sandbox);
}

fn statuses(sandbox: &Sandbox<'_>) {
    exec(
        sandbox,
        &[],
        &["sh", "-c", "echo out; echo err >&2; exit 7"],
    )
    .is(7, "out\n");
    exec(sandbox, &[], &["sh", "-c", "kill -TERM $$"]).is(143, "");
    exec(sandbox, &[], &["no-such-program"]).is(127, "");
    exec(sandbox, &[], &["/etc/passwd"]).is(126, "");
    let said = exec(sandbox, &["-u", "no-such-user"], &["true"]);
    said.is(125, "");
    said.explains(&["no-such-user"]);
    let options = ["-u", "nobody", "-w", "/usr", "-e", "A=b", "--group", "12"];
    let script = "id -un; pwd; echo $A; id -G";
    let said = exec(sandbox, &options, &["sh", "-c", script]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let text = said.text();
    assert!(
        text.starts_with("nobody\n/usr\nb\n") && text.trim().ends_with("12"),
        "{text}"
    );
    let begin = Instant::now();
    exec(
        sandbox,
        &["--timeout", "500ms"],
        &["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
    )
    .is(124, "");
    assert!(begin.elapsed() < Duration::from_secs(60));
    // Time enough to clean up, and not for ever.
    let slow = "trap 'sleep 3; echo clean; exit 0' TERM; while :; do sleep 0.1; done";
    let options = ["--timeout", "500ms", "--grace", "100s"];
    exec(sandbox, &options, &["sh", "-c", slow]).is(124, "clean\n");
    let options = ["--timeout", "500ms", "--grace", "100ms"];
    exec(sandbox, &options, &["sh", "-c", slow]).is(124, "");
}

fn input(sandbox: &Sandbox<'_>) {
    // Standard input of the command line is an open pipe here.
    exec(sandbox, &[], &["cat"]).is(0, "");
    exec(sandbox, &["-i"], &["sh", "-c", "exit 3"]).is(3, "");
    exec(sandbox, &["-i", "--timeout", "500ms"], &["cat"]).is(124, "");
    let arguments = ["exec", "-i", sandbox.id(), "sha256sum"];
    let mut running = belljar_e2e::Running::start(&mut sandbox.user().belljar(&arguments));
    let mut stdin = running.child.stdin.take().unwrap();
    stdin.write_all(&vec![b'x'; 3_000_000]).unwrap();
    drop(stdin);
    running.wait().is(
        0,
        "e55b8bdf621ddaa8f462c74745db9680d3bb7536a9cf854f8d6668b34a287890  -\n",
    );
}

fn named_and_detached(sandbox: &Sandbox<'_>) {
    let script = "echo one; echo two >&2; exec sleep 1000";
    let start = ["-d", "--name", "job"];
    exec(sandbox, &start, &["sh", "-c", script]).is(0, "job\n");
    // Again: the same one.
    exec(sandbox, &start, &["sh", "-c", script]).is(0, "job\n");
    let job = find(sandbox, "job");
    assert_eq!(job["state"], "running");
    assert_eq!(job["detached"], true);
    eventually("its output", || {
        find(sandbox, "job")["stderr"]["newest"] == 4
    });
    let said = sandbox.says("logs", &["job"]);
    said.is(0, "one\n");
    assert_eq!(said.err, "two\n");
    sandbox.says("kill", &["job"]).is(0, "");
    eventually("its end", || find(sandbox, "job")["state"] == "ended");
    assert_eq!(find(sandbox, "job")["end"]["exit_status"], 143);
    // Known to whoever comes later.
    sandbox.says("attach", &["job"]).is(143, "one\n");
    exec(sandbox, &["--name", "job", "--replace"], &["echo", "new"]).is(0, "new\n");
    let said = sandbox.says("kill", &["nothing"]);
    assert_eq!(said.code(), 125);
    said.explains(&[
        "no such process",
        &format!("belljar ps -a {}", sandbox.id()),
    ]);
}

fn rings(sandbox: &Sandbox<'_>) {
    let script = "seq 1 20000; exec sleep 1000";
    let start = ["-d", "--name", "long", "--ring", "16K"];
    exec(sandbox, &start, &["sh", "-c", script]).is(0, "long\n");
    eventually("all of it", || {
        sandbox.says("logs", &["--tail", "1", "long"]).text() == "20000\n"
    });
    let said = sandbox.says("logs", &["--from", "0", "long"]);
    let kept = said.text().len();
    assert!(said.text().ends_with("19999\n20000\n"));
    said.explains(&[&format!("{} bytes of output are missing", 108_894 - kept)]);
    sandbox.says("kill", &["-s", "KILL", "long"]).is(0, "");
    eventually("its end", || find(sandbox, "long")["state"] == "ended");
    let said = sandbox.says("attach", &["--from", "0", "long"]);
    assert_eq!((said.code(), said.text().len()), (137, kept));
    said.explains(&[&format!("{} bytes of output are missing", 108_894 - kept)]);
    sandbox
        .says("attach", &["--from", "108888", "long"])
        .is(137, "20000\n");
}

/// Input that is no terminal is passed on with -i only: a closed one ends nothing.
fn attached_without_input(sandbox: &Sandbox<'_>) {
    let script = "read line; echo got $line";
    exec(
        sandbox,
        &["-d", "-i", "--name", "reader"],
        &["sh", "-c", script],
    )
    .is(0, "reader\n");
    let mut viewer = sandbox.start("attach", &["reader"]);
    drop(viewer.child.stdin.take());
    eventually("the viewer", || find(sandbox, "reader")["viewers"] == 1);
    let reader = find(sandbox, "reader");
    assert_eq!(
        (&reader["state"], &reader["stdin_open"]),
        (&"running".into(), &true.into())
    );
    let mut writer = sandbox.start("attach", &["-i", "reader"]);
    let mut stdin = writer.child.stdin.take().unwrap();
    stdin.write_all(b"x\n").unwrap();
    writer.wait().is(0, "got x\n");
    viewer.wait().is(0, "got x\n");
}

fn limits(sandbox: &Sandbox<'_>) {
    let said = exec(
        sandbox,
        &["--ulimit", "nofile=77:99"],
        &["sh", "-c", "ulimit -n; ulimit -Hn"],
    );
    said.is(0, "77\n99\n");
    let grow = "x = bytearray(200 << 20); print(len(x))";
    let said = exec(sandbox, &["--memory", "50M"], &["python3", "-c", grow]);
    said.is(137, "");
    said.explains(&["ran out of memory"]);
    let fork = "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; wait";
    let said = exec(
        sandbox,
        &["--pids", "5", "--timeout", "60s"],
        &["sh", "-c", fork],
    );
    assert_ne!(said.code(), 0);
    said.explains(&["fork"]);
    // What was limited did not harm the others.
    exec(sandbox, &[], &["echo", "fine"]).is(0, "fine\n");
}

fn descendants(sandbox: &Sandbox<'_>) {
    // One that moved into a session of its own, and one of a command that is killed with belljar.
    let script = "setsid sleep 54321 & setsid sh -c 'sleep 54321' & exec sleep 54321";
    exec(sandbox, &["-d", "--name", "tree"], &["sh", "-c", script]).is(0, "tree\n");
    let arguments = ["exec", sandbox.id(), "sh", "-c", script];
    let mut tied = belljar_e2e::Running::start(&mut sandbox.user().belljar(&arguments));
    let left = || exec(sandbox, &[], &["pgrep", "-fc", "^sleep 54321"]).text();
    eventually("both trees", || left() == "6\n");
    tied.child.kill().unwrap();
    let _ = tied.wait();
    eventually("the tied one to be gone", || left() == "3\n");
    sandbox
        .says("kill", &["--tree", "-s", "KILL", "tree"])
        .is(0, "");
    eventually("nothing to be left", || left() == "0\n");
}
