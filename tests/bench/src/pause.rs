//! How long a sandbox stands still for a snapshot or a fork, as its user sees it: by the command line, with keeper,
//! layered disk and a guest whose memory is full of what it has written.

use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::report::Samples;
use crate::session::{NAME, Programs, Sandbox};

/// What the sandbox has of memory.
const SIZE: &str = "256M";
const FORK: &str = "bench-fork";
/// How often each is measured.
const TIMES: usize = 3;
/// Before the snapshots of each kind, and so many of these.
const BEFORE: [(&str, &str); 4] = [
    ("disk_32m", "head -c 33554432 /dev/urandom >/root/x && sync"),
    ("80m", "head -c 83886080 /dev/urandom >/dev/shm/x"),
    (
        "8m",
        "dd if=/dev/urandom of=/dev/shm/x bs=1M count=8 conv=notrunc 2>/dev/null",
    ),
    ("nothing", "true"),
];
/// Of an answer, in microseconds.
const TIMES_TOLD: [&str; 2] = ["paused", "frozen"];
const PHASES: [&str; 5] = ["stop", "state", "scan", "copy", "layers"];

/// A full snapshot, increments after changes of several sizes, a fork; what is there after it is compared.
pub(crate) fn measure(programs: &Programs) -> Result<Vec<Samples>> {
    let sandbox = Sandbox::start(programs, SIZE)?;
    let mut all = Vec::new();
    let mut add = |what: &str, answer: &Value| {
        let phases = PHASES.map(|name| (name, answer.get("phases").unwrap_or(answer)));
        for (name, from) in TIMES_TOLD
            .map(|name| (name, answer))
            .into_iter()
            .chain(phases)
        {
            // A fork tells no phases.
            let us = from.get(format!("{name}_us")).and_then(Value::as_f64);
            let measure = format!("pause.{what}.{name}");
            if let Some(us) = us {
                all.push(Samples::one(measure, "ms", us / 1e3));
            }
        }
    };
    sandbox.says(&[
        "exec",
        NAME,
        "--",
        "sh",
        "-c",
        "head -c 33554432 /dev/urandom >/root/x",
    ])?;
    add("full", &snapshot(&sandbox)?);
    for (what, script) in BEFORE {
        for _ in 0..TIMES {
            sandbox.says(&["exec", NAME, "--", "sh", "-c", script])?;
            add(what, &snapshot(&sandbox)?);
        }
    }
    let fork = sandbox.answers(&["fork", NAME, "--name", FORK, "-o", "json"])?;
    add("fork", &parsed(&fork)?);
    let sums = |name| {
        let sum = ["exec", name, "--", "sha256sum", "/root/x", "/dev/shm/x"];
        sandbox.answers(&sum)
    };
    if sums(NAME)? != sums(FORK)? {
        return Err(Failure("the fork has other files".to_owned()));
    }
    sandbox.says(&["rm", "-f", FORK])?;
    Ok(all)
}

fn snapshot(sandbox: &Sandbox<'_>) -> Result<Value> {
    parsed(&sandbox.answers(&["snapshot", NAME, "--wait", "-o", "json"])?)
}

fn parsed(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| Failure(format!("belljar said {text:?}: {error}")))
}
