//! `belljar port`.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use belljar_node::poll::PollSet;
use belljar_node::ports::{self, Forward, Forwarding, Note};
use belljar_node::registry::Found;
use belljar_node::supervisor::control::{self, Request};
use belljar_node::sys::{SIGHUP, SIGINT, SIGTERM, SignalFd};
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output::{self, Format, OutputOption, Table};
use crate::report;

/// How often it is looked whether the sandbox still runs.
const LOOK: Duration = Duration::from_secs(2);

/// Reach a port of a sandbox from this machine, or list what listens in it
///
/// Connections to PORT of this machine go to GUESTPORT of the sandbox (the same number unless given), on its
/// loopback interface or any GUESTHOST it can reach, until Ctrl-C. They are taken on 127.0.0.1 unless a HOST
/// is given.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar port box                          what listens in the sandbox
  belljar port box 8080                     127.0.0.1:8080 is port 8080 of the sandbox
  belljar port box 8080:80 5433:5432        two at once
  belljar port box 0:80                     any free port; it is printed
  belljar port box 0.0.0.0:8080:80          for other machines, too
  belljar port box 8080:/run/docker.sock    a Unix socket of the sandbox; @NAME is an abstract one
  belljar port box 8080:127.0.0.2:80        another address of the sandbox, or one that it can reach
  belljar port box /tmp/web.sock:80         a Unix socket of this machine
  belljar port -d box 8080:80               stays with the sandbox until that stops
  belljar port --forwards box               what stays so; --remove 8080 ends it

A port that nobody listens on in the sandbox yet is no error: connections to it are reset, and the reason is
printed, until somebody does.")]
pub(crate) struct Args {
    #[command(flatten)]
    sandbox: BoxArg,

    /// Ports to forward; none: list the ports on which something listens
    #[arg(value_name = "[HOST:]PORT[:[GUESTHOST:]GUESTPORT]")]
    forward: Vec<Forward>,

    /// Leave the forwarding to the sandbox's supervisor, and return
    #[arg(short, long, requires = "forward")]
    detach: bool,

    /// List what the sandbox's supervisor forwards
    #[arg(long, conflicts_with = "forward")]
    forwards: bool,

    /// End what the sandbox's supervisor forwards from this port, address or socket of this machine
    #[arg(long, value_name = "LISTEN", conflicts_with_all = ["forward", "forwards"])]
    remove: Vec<String>,

    #[command(flatten)]
    output: OutputOption,
}

/// Returns the exit status.
pub(crate) fn port(args: &Args) -> u8 {
    let found = args.sandbox.find();
    status_of(found.and_then(|found| {
        if args.detach || args.forwards || !args.remove.is_empty() {
            leave_to_supervisor(&found, args)
        } else if args.forward.is_empty() {
            list(&found, args.output.format())
        } else {
            forward(&found, args)
        }
    }))
}

fn list(found: &Found, format: Format) -> Result<u8, Failure> {
    let ports = ports::list(found)?;
    match format {
        Format::Table => {
            let mut table = Table::new(&["PORT", "ADDRESS", "PID", "PROGRAM"]);
            for port in &ports {
                let pid = match port.pid {
                    0 => "-".to_owned(),
                    pid => pid.to_string(),
                };
                let program = output::escaped_bytes(&port.program);
                table.row(&[&port.port.to_string(), &port.address, &pid, &program]);
            }
            output::print(&table.render());
        }
        Format::Json => {
            let all: Vec<Value> = ports
                .iter()
                .map(|port| {
                    json!({
                        "port": port.port,
                        "address": port.address,
                        "pid": (port.pid != 0).then_some(port.pid),
                        "program": String::from_utf8_lossy(&port.program),
                    })
                })
                .collect();
            output::print_json(&all);
        }
    }
    Ok(0)
}

fn leave_to_supervisor(found: &Found, args: &Args) -> Result<u8, Failure> {
    let add = args.forward.iter().map(|forward| Request::Add {
        forward: forward.to_string(),
    });
    let remove = args.remove.iter().map(|listen| Request::Remove {
        listen: listen.clone(),
    });
    let list = args.forwards.then_some(Request::List {});
    if args.detach {
        // That the guest answers is worth knowing before one relies on it.
        ports::list(found)?;
    }
    let mut told = Vec::new();
    for request in add.chain(remove).chain(list) {
        told.extend(
            control::ask(found, &request).map_err(|error| match error.remedy() {
                Some(remedy) => Failure::with_remedy(&error, remedy),
                None => Failure::new(&error),
            })?,
        );
    }
    match args.output.format() {
        Format::Json => output::print_json(&told),
        Format::Table => {
            let mut table = Table::new(&["LISTENS ON", "GUEST", "OPEN", "TAKEN"]);
            for forward in &told {
                let (open, total) = (forward.open.to_string(), forward.total.to_string());
                table.row(&[&forward.listen, &forward.target, &open, &total]);
            }
            output::print(&table.render());
        }
    }
    Ok(0)
}

fn forward(found: &Found, args: &Args) -> Result<u8, Failure> {
    let signals = SignalFd::new(&[SIGINT, SIGTERM, SIGHUP]).map_err(Failure::new)?;
    // That it runs is checked once; later it is only looked at.
    ports::list(found)?;
    let forwardings = args
        .forward
        .iter()
        .map(|forward| start(found, forward))
        .collect::<Result<Vec<Forwarding>, Failure>>()?;
    tell(&forwardings, args.output.format());
    loop {
        let mut set = PollSet::default();
        let signalled = set.readable(signals.as_fd());
        let polled = set
            .wait(Some(Instant::now() + LOOK))
            .map_err(Failure::new)?;
        if polled.is_ready(signalled) {
            return Ok(0);
        }
        let state = found.state();
        if !state.is_up() {
            let id = found.called();
            return Err(Failure::new(format!(
                "sandbox {id} does not run any more: it is {state}"
            )));
        }
    }
}

fn start(found: &Found, forward: &Forward) -> Result<Forwarding, Failure> {
    let to = forward.to_string();
    let note = move |note: Note| match note {
        Note::Refused(error) => report::failure(&format!("{to}: {error}"), None),
        Note::Accept(error) => {
            report::failure(&format!("{to}: cannot take a connection: {error}"), None);
        }
    };
    Forwarding::start(found.clone(), forward, note).map_err(|error| match error.remedy() {
        Some(remedy) => Failure::with_remedy(&error, remedy),
        None => Failure::new(&error),
    })
}

/// One line, or one document, for each: whoever reads them from a pipe learns the chosen ports.
fn tell(forwardings: &[Forwarding], format: Format) {
    for forwarding in forwardings {
        let (listen, target) = (forwarding.listen(), forwarding.target());
        match format {
            Format::Table => output::print(&format!("{listen} -> {target}\n")),
            Format::Json => output::print_json(
                &json!({"listen": listen.to_string(), "target": target.to_string()}),
            ),
        }
    }
    if io::stderr().is_terminal() {
        let _ = writeln!(io::stderr(), "Ctrl-C ends.");
    }
}
