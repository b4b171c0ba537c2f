//! `belljar ls`.

use belljar_node::registry::{self, Listed};
use belljar_node::state::StateRoot;
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::has_labels;
use crate::output::{self, Format, OutputOption, Table, escaped};
use crate::values::{self, Label};

/// List the sandboxes of this user
///
/// Without options: those that run, and those that something is wrong with.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar ls                         what runs
  belljar ls -a                      all, stopped ones too
  belljar ls -a -l team=web          those with a label
  belljar ls -qa | xargs belljar rm  -q prints ids alone")]
pub(crate) struct Args {
    /// Stopped sandboxes too
    #[arg(short, long)]
    all: bool,

    /// Print nothing but ids, one a line
    #[arg(short, long)]
    quiet: bool,

    /// Print nothing but names, or ids of those that have none, one a line
    #[arg(long, conflicts_with = "quiet")]
    names: bool,

    /// Only sandboxes with this label; several must all be there
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    label: Vec<Label>,

    /// Only sandboxes in this state: running, paused, stopped, created, crashed, …
    #[arg(long, value_name = "STATE")]
    state: Option<String>,

    #[command(flatten)]
    output: OutputOption,
}

/// Returns the exit status.
pub(crate) fn ls(args: &Args) -> u8 {
    status_of(list(args))
}

fn list(args: &Args) -> Result<u8, Failure> {
    let mut listed = registry::list(&StateRoot::locate()?)?;
    listed.retain(|listed| is_wanted(args, listed));
    if args.quiet || args.names {
        let word = |listed: &Listed| match args.names {
            true => format!("{}\n", escaped(listed.called())),
            false => format!("{}\n", listed.found.id()),
        };
        output::print(&listed.iter().map(word).collect::<String>());
        return Ok(0);
    }
    match args.output.format() {
        Format::Table => output::print(&table(&listed)),
        Format::Json => {
            let all: Vec<Value> = listed.iter().map(summary).collect();
            output::print_json(&all);
        }
    }
    Ok(0)
}

fn is_wanted(args: &Args, listed: &Listed) -> bool {
    let by_state = match &args.state {
        Some(state) => listed.state.word() == state,
        None => args.all || !matches!(listed.state.word(), "stopped" | "created"),
    };
    by_state && has_labels(listed, &args.label)
}

/// What programs read about one sandbox in a list.
pub(crate) fn summary(listed: &Listed) -> Value {
    let spec = listed.spec.as_ref();
    json!({
        "id": listed.found.id(),
        "name": spec.and_then(|spec| spec.name.as_deref()),
        "state": listed.state,
        "reason": listed.state.reason(),
        "remedy": listed.state.remedy(listed.found.id()),
        "created_ms": listed.created_ms(),
        "life": spec.map(|spec| spec.life),
        "cpus": spec.map(|spec| spec.vcpus),
        "cpu_limit_milli": spec.and_then(|spec| spec.cpu_limit_milli),
        "memory": spec.map(|spec| spec.memory),
        "disk": spec.and_then(|spec| spec.disk),
        "labels": spec.map(|spec| &spec.labels),
    })
}

fn table(listed: &[Listed]) -> String {
    let mut table = Table::new(&[
        "ID", "NAME", "STATE", "CPUS", "MEMORY", "AGE", "LABELS", "WHY",
    ]);
    for listed in listed {
        let spec = listed.spec.as_ref();
        let labels: Vec<String> = spec
            .iter()
            .flat_map(|spec| &spec.labels)
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        table.row(&[
            listed.found.id(),
            spec.and_then(|spec| spec.name.as_deref()).unwrap_or("-"),
            listed.state.word(),
            &spec.map_or("-".to_owned(), cpus),
            &spec.map_or("-".to_owned(), |spec| output::size(spec.memory)),
            &output::age(listed.created_ms()),
            &labels.join(","),
            &why(listed),
        ]);
    }
    table.render()
}

/// `2`, or `0.5` of one.
fn cpus(spec: &belljar_node::state::spec::SandboxSpec) -> String {
    match spec.cpu_limit_milli {
        Some(milli) => format!("{}", f64::from(milli) / 1000.0),
        None => spec.vcpus.to_string(),
    }
}

fn why(listed: &Listed) -> String {
    let reason = listed.state.reason();
    match listed.state.remedy(listed.found.id()) {
        Some(remedy) => format!("{reason}; {remedy}"),
        None => reason,
    }
}
