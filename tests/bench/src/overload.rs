//! A guest that is full of something: how long a ping takes then, and the end of the culprit.

use std::thread;
use std::time::{Duration, Instant};

use belljar_protocol::client::{self, process};
use belljar_protocol::v1::{self, process_ref::Ref, signal::Scope};

use crate::failure::{Attempt, Failure, Result};
use crate::report::Samples;
use crate::session::{Programs, Sandbox, argv, ms, soon};

/// What the guest is filled with: a name, and a script that never ends.
const CULPRITS: [(&str, &str); 6] = [
    ("fork_bomb", "f() { f | f & }; f; sleep 1000"),
    (
        "computing",
        "for n in $(seq 200); do (while :; do :; done) & done; wait",
    ),
    (
        "memory",
        "while :; do python3 -c 'x = []\nwhile 1: x.append(bytearray(1 << 20))'; done",
    ),
    (
        "files_in_memory",
        "while :; do cat /dev/zero > /dev/shm/x; done",
    ),
    ("disk", "while :; do cat /dev/zero > /var/x; done"),
    ("pids", "while :; do sleep 1000 & done 2>/dev/null"),
];
/// Pings while each of them runs: enough for the slowest of a hundred.
const PINGS: usize = 200;
/// A thousand terminals with a program each need more than half a GiB.
const MEMORY: &str = "1G";
/// So long a culprit runs before it is measured.
const AT_WORK: Duration = Duration::from_secs(2);
/// Between pings, so that they meet all that a culprit does.
const PAUSE: Duration = Duration::from_millis(7);

/// Pings at rest and beside each culprit, and beside `terminals` open terminals.
pub(crate) fn measure(programs: &Programs, terminals: usize) -> Result<Vec<Samples>> {
    let sandbox = Sandbox::start(programs, MEMORY)?;
    let mut all = vec![pings(&sandbox, "at_rest")?];
    for (name, script) in CULPRITS {
        detach(&sandbox, name, argv(&["sh", "-c", script]))?;
        thread::sleep(AT_WORK);
        all.push(pings(&sandbox, name)?);
        all.push(end(&sandbox, name)?);
        let script = "rm -f /dev/shm/x /var/x";
        let tidied = sandbox.start_program(argv(&["sh", "-c", script]))?;
        tidied.finish(1 << 10, soon()).attempt("tidying up")?;
    }
    for number in 0..terminals {
        let mut exec = argv(&["sleep", "1000"]);
        exec.terminal = Some(v1::Terminal::default());
        detach(&sandbox, &format!("terminal-{number}"), exec)?;
    }
    all.push(pings(&sandbox, &format!("{terminals}_terminals"))?);
    Ok(all)
}

fn detach(sandbox: &Sandbox<'_>, name: &str, exec: v1::Exec) -> Result<()> {
    let exec = v1::Exec {
        name: name.to_owned(),
        detached: true,
        ..exec
    };
    sandbox.start_program(exec).map(drop)
}

/// Connection included.
fn pings(sandbox: &Sandbox<'_>, beside: &str) -> Result<Samples> {
    let mut values = Vec::new();
    for _ in 0..PINGS {
        thread::sleep(PAUSE);
        let start = Instant::now();
        client::ping(sandbox.connect()?, soon()).attempt(format!("ping beside {beside}"))?;
        values.push(ms(start.elapsed()));
    }
    values.sort_by(f64::total_cmp);
    let p99 = values.get(PINGS.saturating_sub(PINGS / 100 + 1)).copied();
    eprintln!(
        "ping beside {beside}: p99 {:.2} ms",
        p99.unwrap_or(f64::NAN)
    );
    Ok(Samples {
        measure: format!("overload.ping.{beside}"),
        unit: "ms",
        values,
        counts: None,
    })
}

/// From the call that kills it to the word that it has ended.
fn end(sandbox: &Sandbox<'_>, name: &str) -> Result<Samples> {
    let named = || v1::ProcessRef {
        r#ref: Some(Ref::Name(name.to_owned())),
    };
    let start = Instant::now();
    let signal = v1::Signal {
        process: Some(named()),
        number: 9,
        scope: Scope::Tree.into(),
    };
    process::signal(sandbox.connect()?, signal, soon()).attempt(format!("killing {name}"))?;
    let ended = process::wait(sandbox.connect()?, named(), Some(Duration::from_secs(60)))
        .attempt(format!("the end of {name}"))?;
    if ended.is_none() {
        return Err(Failure(format!("{name} did not end")));
    }
    let took = ms(start.elapsed());
    Ok(Samples::one(format!("overload.kill.{name}"), "ms", took))
}
