//! How soon a call that waits for something notices it. The time begins before the thing is asked for, so what
//! making it takes is in the figure, too.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use belljar_protocol::client::{ExecStdin, files, system};
use belljar_protocol::v1::{self, r#await::What, process_ref::Ref};

use crate::failure::{Attempt, Failure, Result};
use crate::report::Samples;
use crate::session::{Sandbox, TOOL, argv, soon, us};

/// Until the call waits in the guest, and its first look is over.
const BEGUN: Duration = Duration::from_millis(20);
/// Added to that from one to the next, so that they meet the agent at different times between two looks.
const SHIFT: Duration = Duration::from_micros(370);
const FIRST_PORT: u32 = 7000;

/// A port that is listened on, a file, a line of output: `count` times each.
pub(crate) fn measure(sandbox: &Sandbox<'_>, count: usize) -> Result<Vec<Samples>> {
    Ok(vec![
        ports(sandbox, count)?,
        paths(sandbox, count)?,
        output(sandbox, count)?,
    ])
}

/// The time from `make` to the answer of a call that waits for `what`.
fn noticed(
    sandbox: &Sandbox<'_>,
    number: usize,
    what: What,
    make: impl FnOnce() -> Result<()>,
) -> Result<f64> {
    let stream = sandbox.connect()?;
    let wanted = v1::Await {
        what: Some(what),
        ..v1::Await::default()
    };
    let waiting = thread::spawn(move || (system::wait_for(stream, wanted, soon()), Instant::now()));
    let shift = SHIFT.saturating_mul(u32::try_from(number).unwrap_or(0));
    thread::sleep(BEGUN.saturating_add(shift));
    let start = Instant::now();
    make()?;
    let waited = waiting.join();
    let (answer, end) = waited.map_err(|_| Failure("the waiting thread panicked".to_owned()))?;
    answer.attempt("waiting")?;
    Ok(us(end.saturating_duration_since(start)))
}

fn samples(measure: &str, values: Vec<f64>) -> Samples {
    Samples {
        measure: measure.to_owned(),
        unit: "us",
        values,
        counts: None,
    }
}

fn ports(sandbox: &Sandbox<'_>, count: usize) -> Result<Samples> {
    let values = (0..count).map(|number| {
        let port = FIRST_PORT.saturating_add(u32::try_from(number).unwrap_or(0));
        let mut exec = argv(&[TOOL, "--listen", &port.to_string()]);
        exec.stdin = v1::exec::Stdin::Stream.into();
        let program = sandbox.start_program(exec)?;
        let mut keys = program.stdin().attempt("input of a program")?;
        noticed(sandbox, number, What::Port(port), || {
            keys.write(b"\n").attempt("telling a program to listen")
        })
    });
    Ok(samples("session.wait_port", values.collect::<Result<_>>()?))
}

fn paths(sandbox: &Sandbox<'_>, count: usize) -> Result<Samples> {
    let values = (0..count).map(|number| {
        let path = format!("/tmp/awaited-{number}").into_bytes();
        let stream = sandbox.connect()?;
        noticed(sandbox, number, What::Path(path.clone()), || {
            let call = v1::MakeDirectory {
                path,
                ..v1::MakeDirectory::default()
            };
            files::make_directory(stream, call, soon())
                .map(drop)
                .attempt("making a directory")
        })
    });
    Ok(samples("session.wait_path", values.collect::<Result<_>>()?))
}

fn output(sandbox: &Sandbox<'_>, count: usize) -> Result<Samples> {
    let mut exec = argv(&["cat"]);
    exec.name = "said".to_owned();
    exec.stdin = v1::exec::Stdin::Stream.into();
    let program = sandbox.start_program(exec)?;
    let mut keys: ExecStdin<UnixStream> = program.stdin().attempt("input of a program")?;
    let values = (0..count).map(|number| {
        let what = What::Output(v1::OutputMatch {
            process: Some(v1::ProcessRef {
                r#ref: Some(Ref::Name("said".to_owned())),
            }),
            pattern: format!("^line {number}$"),
            ..v1::OutputMatch::default()
        });
        noticed(sandbox, number, what, || {
            keys.write(format!("line {number}\n").as_bytes())
                .attempt("a line for a program")
        })
    });
    Ok(samples(
        "session.wait_output",
        values.collect::<Result<_>>()?,
    ))
}
