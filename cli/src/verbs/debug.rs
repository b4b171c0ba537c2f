//! `belljar debug`.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use belljar_node::logs::{self, Log};
use belljar_node::pipe::{self, Everything, PipeEnd};
use belljar_node::registry::Found;
use belljar_node::symptoms::{self, Symptoms};
use belljar_node::vmm;
use serde_json::json;

use crate::failure::{Failure, status_of};
use crate::options::{BoxArg, connect_deadline};
use crate::output::{self, Format, OutputOption, Table, escaped};
use crate::report;

/// Look at a guest from outside, above all at one that hangs
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar debug state box                        what is the matter, and what to do about it
  belljar debug log box                          the console's log; --vmm: the VMM's
  belljar debug api box /vm/config               ask the VMM's API
  belljar debug vsock box 1024 <request >reply   raw bytes to and from a vsock port of the guest")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    State(StateArgs),
    Log(LogArgs),
    Api(ApiArgs),
    Vsock(VsockArgs),
}

/// Say what the host sees of the guest, and what that means
///
/// Asks nothing that could hang: VMM and agent have a few seconds to answer. Exit status 1 if the guest
/// is not well.
#[derive(Debug, clap::Args)]
struct StateArgs {
    #[command(flatten)]
    sandbox: BoxArg,

    #[command(flatten)]
    output: OutputOption,
}

/// Print what the guest wrote to its console, as far as it was kept
///
/// At least the last 512 KiB. Control characters are shown as they are only with --raw.
#[derive(Debug, clap::Args)]
struct LogArgs {
    #[command(flatten)]
    sandbox: BoxArg,

    /// The VMM's own log instead
    #[arg(long)]
    vmm: bool,

    /// Bytes as they are, which may do things to a terminal
    #[arg(long)]
    raw: bool,
}

/// Ask the VMM's control API, and print its answer
#[derive(Debug, clap::Args)]
struct ApiArgs {
    #[command(flatten)]
    sandbox: BoxArg,

    /// Path of the API: /, /vm/config, /machine-config, /balloon/statistics, …
    #[arg(value_name = "PATH", default_value = "/")]
    path: String,
}

/// Connect standard input and output with a vsock port of the guest
///
/// Bytes are passed on as they are. The end of the input closes that direction only; the connection ends when
/// the guest closes it.
#[derive(Debug, clap::Args)]
struct VsockArgs {
    #[command(flatten)]
    sandbox: BoxArg,

    /// The guest's port
    #[arg(value_name = "PORT")]
    port: u32,
}

/// Returns the exit status.
pub(crate) fn debug(args: &Args) -> u8 {
    status_of(match &args.what {
        What::State(args) => state(args),
        What::Log(args) => log(args),
        What::Api(args) => api(args),
        What::Vsock(args) => vsock(args),
    })
}

fn state(args: &StateArgs) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let symptoms = symptoms::look(&found);
    let called = found.called();
    let verdict = symptoms.verdict(&called);
    match args.output.format() {
        Format::Table => output::print(&text(&symptoms, &called)),
        Format::Json => {
            output::print_json(&json!({"id": found.id(), "verdict": verdict, "seen": symptoms}));
        }
    }
    Ok(u8::from(!symptoms.is_well()))
}

fn text(symptoms: &Symptoms, called: &str) -> String {
    let verdict = symptoms.verdict(called);
    let mut text = format!(
        "{}\n  {} {}\n\n",
        escaped(&verdict.what),
        "what to do:",
        verdict.remedy
    );
    let why = match symptoms.reason.as_str() {
        "" => String::new(),
        reason => format!(" ({})", escaped(reason)),
    };
    let _ = writeln!(text, "sandbox  {}{why}", symptoms.state.word());
    if let Some(vmm) = &symptoms.vmm {
        let answer = |answer: &Result<f64, String>| match answer {
            Ok(millis) => format!("answers in {millis:.1} ms"),
            Err(error) => format!("does not answer: {}", escaped(error)),
        };
        let _ = writeln!(text, "VMM      pid {}, {}", vmm.pid, answer(&vmm.api));
        let frozen = if vmm.frozen {
            "; all programs are frozen"
        } else {
            ""
        };
        let _ = writeln!(text, "agent    {}{frozen}\n", answer(&vmm.agent));
        let mut table = Table::new(&["THREAD", "BUSY", "STATE", "WAITS IN"]);
        for thread in &vmm.threads {
            table.row(&[
                &thread.name,
                &format!("{:.0}%", thread.busy * 100.0),
                &thread.state.to_string(),
                &thread.waits_in,
            ]);
        }
        text.push_str(&table.render());
    }
    text.push('\n');
    report::quote(
        &mut text,
        "last lines of the guest's console",
        &symptoms.console,
    );
    report::quote(&mut text, "last lines of the VMM's log", &symptoms.log);
    text
}

fn log(args: &LogArgs) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let log = if args.vmm { Log::Vmm } else { Log::Console };
    let bytes = logs::read(&found, log).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            Failure::with_remedy(
                format!("sandbox {} has no such log yet", found.called()),
                "it begins with the first thing that is said",
            )
        } else {
            Failure::new(format!("the log of {}: {error}", found.called()))
        }
    })?;
    let shown = if args.raw {
        bytes
    } else {
        output::printable_lines(&bytes).into_bytes()
    };
    // Nobody to tell if standard output is closed.
    let _ = std::io::stdout().write_all(&shown);
    Ok(0)
}

/// The API answers from a thread of its own.
const API_LIMIT: Duration = Duration::from_secs(25);

fn api(args: &ApiArgs) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let path = &args.path;
    let fits = path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic());
    if !fits {
        return Err(Failure::new(format!("'{path}' is no path of the API")));
    }
    let mut stream = found.api().map_err(|error| no_vmm(&found, &error))?;
    let response = vmm::request(&mut stream, "GET", path, b"", Instant::now() + API_LIMIT)
        .map_err(Failure::new)?;
    let body = String::from_utf8_lossy(&response.body);
    output::print(&format!("{}\n", escaped(&body)));
    Ok(0)
}

fn no_vmm(found: &Found, error: &std::io::Error) -> Failure {
    let state = found.state();
    let called = found.called();
    Failure::with_remedy(
        format!("the VMM of {called} cannot be asked: {error}; the sandbox is {state}"),
        state
            .remedy(&called)
            .unwrap_or_else(|| format!("'belljar debug state {called}' tells more")),
    )
}

fn vsock(args: &VsockArgs) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let stream = found.connect(args.port, connect_deadline())?;
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let end = pipe::connect(
        &stream,
        Some(stdin.as_fd()),
        stdout.as_fd(),
        None,
        &mut Everything,
    );
    match end.map_err(Failure::new)? {
        PipeEnd::OutputClosed => Ok(128 + 13),
        _ => Ok(0),
    }
}
