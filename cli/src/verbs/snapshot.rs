//! `belljar snapshot` and `belljar snapshots`.

use belljar_node::snapshots::{self, Capture, Captured, Stores, keeper};
use belljar_node::state::StateRoot;
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::{self, KeeperOptions};
use crate::output::{self, Format, OutputOption, Table};
use crate::progress::Bar;
use crate::report;
use crate::values::{self, Label};

/// Take a snapshot of a running or paused sandbox, and let it go on
///
/// Prints the snapshot's id. The guest stands still until its memory and disk are frozen; a frozen copy
/// of its memory is written and stored behind the resumed guest: all of it the first time, what has changed since
/// then. Until it is durable, a crash of this machine loses the snapshot and
/// nothing else.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar snapshot box                       memory and disk
  belljar snapshot box --tag ready --wait    wait until it is durable
  belljar snapshot box --disk-only           restoring it boots a guest with this disk
  belljar restore ready                      a sandbox that goes on from there")]
pub(crate) struct Args {
    /// Id or name of the sandbox, or the beginning of either
    #[arg(value_name = "BOX")]
    sandbox: String,

    /// A name for the snapshot; it leaves the snapshot that had it
    #[arg(short, long, visible_alias = "name", value_name = "TAG")]
    tag: Vec<String>,

    /// A label to find it by; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = values::label)]
    label: Vec<Label>,

    /// Never remove it to make room
    #[arg(long)]
    pin: bool,

    /// Save the disk alone
    #[arg(long)]
    disk_only: bool,

    /// Return when the snapshot is durable, and say what it took
    #[arg(short, long)]
    wait: bool,

    /// json: the id and what it took, in microseconds
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,

    #[command(flatten)]
    keeper: KeeperOptions,
}

/// Returns the exit status.
pub(crate) fn snapshot(args: &Args) -> u8 {
    status_of(take(args))
}

fn take(args: &Args) -> Result<u8, Failure> {
    let root = StateRoot::locate()?;
    let found = options::find(&args.sandbox)?;
    let options = Capture {
        tags: args.tag.clone(),
        labels: values::labels(&args.label),
        pinned: args.pin,
        disk_only: args.disk_only,
        wait: args.wait,
    };
    let mut bar = Bar::new(false);
    let captured = snapshots::capture(&found, &args.keeper.keeper(&root), &options, |done, all| {
        bar.tell(done, Some(all));
    });
    bar.finish();
    let captured = captured?;
    if let Some(Format::Json) = args.output {
        output::print_json(&what_it_took(&captured));
    } else {
        output::print(&format!("{}\n", captured.id));
        report::aside(&told(&captured));
    }
    Ok(0)
}

/// What it took, for programs.
fn what_it_took(captured: &Captured) -> Value {
    let (kept, phases) = (captured.kept.as_ref(), captured.phases);
    json!({
        "id": captured.id,
        "base": captured.base,
        "frozen_us": output::micros(captured.frozen),
        "paused_us": output::micros(captured.paused),
        "phases": {
            "stop_us": phases.stop_us,
            "state_us": phases.state_us,
            "scan_us": phases.scan_us,
            "copy_us": phases.copy_us,
            "layers_us": phases.layers_us,
        },
        "data_bytes": kept.map(|kept| kept.data_bytes),
        "new_bytes": kept.map(|kept| kept.new_bytes),
        "stored_bytes": kept.map(|kept| kept.stored_bytes),
        "durable_us": kept.map(|kept| kept.took_ms.saturating_mul(1000)),
    })
}

/// What it took, for people.
fn told(captured: &Captured) -> String {
    let mut text = format!(
        "programs stood still for {}, processors for {}{}",
        output::ms(captured.frozen),
        output::ms(captured.paused),
        if captured.base.is_some() {
            "; what has changed was saved"
        } else {
            ""
        }
    );
    if let Some(kept) = &captured.kept {
        text.push_str(&format!(
            "; {} of data, {} new, {} on disk, durable after {} ms",
            output::size(kept.data_bytes),
            output::size(kept.new_bytes),
            output::size(kept.stored_bytes),
            kept.took_ms
        ));
    }
    text
}

/// List the snapshots, oldest first
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar snapshots
  belljar snapshots -l stage=ready
  belljar snapshots -q                       ids alone")]
pub(crate) struct ListArgs {
    /// Print nothing but ids, one a line
    #[arg(short, long)]
    quiet: bool,

    /// Only snapshots with this label; several must all be there
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    label: Vec<Label>,

    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    keeper: KeeperOptions,
}

/// Returns the exit status.
pub(crate) fn snapshots(args: &ListArgs) -> u8 {
    status_of(list(args))
}

fn list(args: &ListArgs) -> Result<u8, Failure> {
    let mut all = Stores::connect(&args.keeper.keeper(&StateRoot::locate()?))?.list()?;
    all.retain(|snapshot| {
        args.label.iter().all(|label| {
            let value = snapshot.labels.get(&label.key);
            value.is_some_and(|is| label.value.as_ref().is_none_or(|wanted| wanted == is))
        })
    });
    if args.quiet {
        let ids = all.iter().map(|snapshot| format!("{}\n", snapshot.id));
        output::print(&ids.collect::<String>());
        return Ok(0);
    }
    match args.output.format() {
        Format::Table => output::print(&table(&all)),
        Format::Json => {
            output::print_json(&all.iter().map(summary).collect::<Vec<Value>>());
        }
    }
    Ok(0)
}

fn table(all: &[keeper::Snapshot]) -> String {
    let mut table = Table::new(&["ID", "TAGS", "AGE", "SIZE", "DATA", "PINNED", "LABELS"]);
    for snapshot in all {
        let labels: Vec<String> = snapshot
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let (age, pinned) = if snapshot.pending {
            ("storing".to_owned(), "-")
        } else {
            (output::age(snapshot.created_ms), yes(snapshot.pinned))
        };
        table.row(&[
            snapshot.id.get(..12).unwrap_or(&snapshot.id),
            &snapshot.tags.join(","),
            &age,
            &output::size(snapshot.bytes),
            &output::size(snapshot.data_bytes),
            pinned,
            &labels.join(","),
        ]);
    }
    table.render()
}

const fn yes(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "-" }
}

/// What programs read about one snapshot.
pub(crate) fn summary(snapshot: &keeper::Snapshot) -> Value {
    json!({
        "id": snapshot.id,
        "tags": snapshot.tags,
        "labels": snapshot.labels,
        "parents": snapshot.parents,
        "created_ms": snapshot.created_ms,
        "pinned": snapshot.pinned,
        "bytes": snapshot.bytes,
        "data_bytes": snapshot.data_bytes,
        "durable": !snapshot.pending,
    })
}
