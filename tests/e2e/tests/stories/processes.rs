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

#[test]
fn what_programs_said_and_used_is_kept_for_a_while() {
    let user = User::new();
    let sandbox = user.sandbox(&["--memory", "512M"]);
    followed(&sandbox);
    since_a_moment(&sandbox);
    a_reader_that_stops(&sandbox);
    forgotten(&sandbox);
    one_process_alone(&sandbox);
    what_it_used(&sandbox);
}

/// Starts a script that goes on by itself.
fn background(sandbox: &Sandbox<'_>, name: &str, options: &[&str], script: &str) {
    let mut all = vec!["-d", "--name", name];
    all.extend(options);
    exec(sandbox, &all, &["sh", "-c", script]).is(0, &format!("{name}\n"));
}

/// A script that waits for `touch FILE`.
fn until(file: &str) -> String {
    format!("while [ ! -e {file} ]; do sleep 0.05; done")
}

fn touch(sandbox: &Sandbox<'_>, file: &str) {
    exec(sandbox, &[], &["touch", file]).is(0, "");
}

fn followed(sandbox: &Sandbox<'_>) {
    let script = format!(
        "echo one; {}; echo two; echo bad >&2; exit 3",
        until("/run/a")
    );
    background(sandbox, "talks", &[], &script);
    let follows = sandbox.start("logs", &["-f", "talks"]);
    eventually("the first line", || follows.out_so_far() == b"one\n");
    // Without -f only what there is.
    sandbox.says("logs", &["talks"]).is(0, "one\n");
    touch(sandbox, "/run/a");
    let said = follows.wait();
    said.is(0, "one\ntwo\n");
    assert_eq!(said.err, "bad\n");
    let said = sandbox.says("logs", &["-f", "nobody"]);
    assert_eq!(said.code(), 125);
    said.explains(&["no such process"]);
}

fn since_a_moment(sandbox: &Sandbox<'_>) {
    let script = format!("echo early; {}; echo late", until("/run/b"));
    background(sandbox, "slow", &[], &script);
    eventually("the first line", || {
        sandbox.says("logs", &["slow"]).text() == "early\n"
    });
    let moment = exec(sandbox, &[], &["date", "+%s.%N"]).text();
    touch(sandbox, "/run/b");
    sandbox.says("wait", &["--end", "slow"]).is(0, "0\n");
    let since = |moment: &str| sandbox.says("logs", &["--since", moment, "slow"]);
    since(moment.trim()).is(0, "late\n");
    since("1h").is(0, "early\nlate\n");
    let said = since("yesterday");
    assert_eq!(said.code(), 125);
    said.explains(&["yesterday"]);
}

/// Neither the program nor another reader waits for it.
fn a_reader_that_stops(sandbox: &Sandbox<'_>) {
    let script = format!("echo begin; {}; seq 1 300000", until("/run/c"));
    background(sandbox, "much", &["--ring", "64K"], &script);
    let stopped = sandbox.start("logs", &["-f", "much"]);
    eventually("it to read", || stopped.out_so_far() == b"begin\n");
    stopped.signal(rustix::process::Signal::STOP);
    let other = sandbox.start("logs", &["-f", "much"]);
    touch(sandbox, "/run/c");
    sandbox.says("wait", &["--end", "much"]).is(0, "0\n");
    let said = other.wait();
    assert_eq!(said.code(), 0);
    assert!(said.text().ends_with("\n300000\n"));
    stopped.signal(rustix::process::Signal::CONT);
    let said = stopped.wait();
    assert_eq!(said.code(), 0);
    said.explains(&["bytes of output are missing"]);
    assert!(said.text().starts_with("begin\n"));
    assert!(said.text().ends_with("\n300000\n"));
}

fn forgotten(sandbox: &Sandbox<'_>) {
    let brief = ["--name", "brief", "--keep", "500ms"];
    exec(sandbox, &brief, &["echo", "x"]).is(0, "x\n");
    let long = ["--name", "long-kept", "--keep", "1h"];
    exec(sandbox, &long, &["echo", "y"]).is(0, "y\n");
    eventually("it to be forgotten", || {
        let said = sandbox.says("logs", &["brief"]);
        said.code() == 125 && said.err.contains("no such process")
    });
    sandbox.says("logs", &["long-kept"]).is(0, "y\n");
    // The name is free again.
    exec(sandbox, &brief, &["echo", "again"]).is(0, "again\n");
    assert_eq!(
        exec(sandbox, &["--keep", "long"], &["true"]).code(),
        125,
        "that is no time"
    );
}

fn one_process_alone(sandbox: &Sandbox<'_>) {
    let script = "trap 'echo caught' USR1; sleep 98765 & echo begun; \
        while kill -0 $! 2>&-; do wait $!; done; echo over";
    background(sandbox, "parent", &[], script);
    let said = |text: &str| {
        eventually(text, || {
            sandbox.says("logs", &["parent"]).text().ends_with(text)
        });
    };
    said("begun\n");
    let usr1 = |more: &[&str]| {
        let mut all = vec!["-s", "USR1"];
        all.extend(more);
        all.push("parent");
        sandbox.says("kill", &all).is(0, "");
    };
    // The child would not survive it.
    usr1(&["--process"]);
    said("caught\n");
    exec(sandbox, &[], &["pgrep", "-c", "-x", "-f", "sleep 98765"]).is(0, "1\n");
    usr1(&[]);
    said("over\n");
    sandbox.says("wait", &["--end", "parent"]).is(0, "0\n");
    let said = sandbox.says("kill", &["-s", "NOSUCH", "parent"]);
    assert_eq!(said.code(), 125);
    said.explains(&["NOSUCH"]);
}

fn what_it_used(sandbox: &Sandbox<'_>) {
    let work = "import time\nx = bytearray(60 << 20)\nwhile time.process_time() < 0.3: pass";
    exec(sandbox, &["--name", "works"], &["python3", "-c", work]).is(0, "");
    exec(sandbox, &["--name", "rests"], &["sleep", "0.3"]).is(0, "");
    let number = |name: &str, path: &str| {
        let all = find(sandbox, name);
        let number = all.pointer(path).and_then(Value::as_u64);
        number.unwrap_or_else(|| panic!("no {path} in {all}"))
    };
    assert!(number("works", "/end/usage/cpu_us") >= 300_000);
    assert!(number("works", "/end/wall_us") >= 300_000);
    assert!((60 << 20..200 << 20).contains(&number("works", "/end/usage/memory_peak")));
    assert!(number("rests", "/end/usage/cpu_us") < number("works", "/end/usage/cpu_us"));
    assert!(number("rests", "/end/usage/memory_peak") < 60 << 20);

    // One that takes more than it may: told at once, later, and as an event.
    let hog = "x = bytearray(200 << 20)";
    let limited = ["--name", "hog", "--memory", "50M"];
    let said = exec(sandbox, &limited, &["python3", "-c", hog]);
    said.is(137, "");
    said.explains(&["ran out of memory"]);
    assert_eq!(find(sandbox, "hog")["end"]["how"], "out_of_memory");
    let peak = number("hog", "/end/usage/memory_peak");
    assert!((30 << 20..=50 << 20).contains(&peak), "{peak}");
    let said = sandbox.says("events", &["-o", "json"]);
    let told: Vec<Value> = said
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|event: &Value| event["process_name"] == "hog")
        .collect();
    let has = |word: &str| told.iter().any(|event| event["event"] == word);
    assert!(has("started") && has("out_of_memory"), "{told:?}");
    let end = told.iter().find(|event| event["event"] == "ended").unwrap();
    assert_eq!(end["out_of_memory"], true);
    assert_eq!(end["status"], 137);
}
