//! `belljar store`: what is stored, and how much room it takes.

use std::fs::File;
use std::io::{IsTerminal, stdin, stdout};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use belljar_node::size::Size;
use belljar_node::snapshots::{self, Stores, keeper};
use belljar_node::state::StateRoot;
use serde_json::json;

use super::snapshot::summary;
use crate::failure::{Failure, each_of, status_of};
use crate::options::KeeperOptions;
use crate::output::{self, Format, OutputOption, Table};
use crate::progress::Bar;
use crate::report;
use crate::values::{self, Label};

/// See to the store of snapshots
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar store du                           what takes how much
  belljar store rm old && belljar store gc --now
  belljar store budget 20G && belljar store gc --evict
  belljar store export ready >ready.bjs      on another machine: belljar store import <ready.bjs")]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List the snapshots, as 'belljar snapshots' does
    Ls(super::snapshot::ListArgs),
    /// Tell what takes how much room
    Du(Du),
    /// Read everything, and compare it with its checksum
    Verify(Common),
    /// Remove what no snapshot needs any more
    Gc(Gc),
    /// Remove snapshots from the list; their room comes back with 'gc'
    Rm(Rm),
    /// Give a snapshot tags or labels, or take them away
    Tag(Tag),
    /// Never remove a snapshot to make room
    Pin(One),
    /// Undo 'pin'
    Unpin(One),
    /// Tell or set how many bytes the store may take; 'none' for no limit
    Budget(Budget),
    /// Write a snapshot as one stream
    Export(Export),
    /// Take a snapshot from such a stream
    Import(Import),
}

#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    keeper: KeeperOptions,
}

#[derive(Debug, clap::Args)]
struct Du {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct One {
    /// Tag or id of the snapshot, or the beginning of the id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    #[command(flatten)]
    keeper: KeeperOptions,
}

#[derive(Debug, clap::Args)]
struct Rm {
    /// Tags or ids of snapshots, or the beginnings of ids
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,

    /// Take its tags and its pin away first
    #[arg(short, long)]
    force: bool,

    #[command(flatten)]
    keeper: KeeperOptions,
}

#[derive(Debug, clap::Args)]
struct Tag {
    /// Tag or id of the snapshot, or the beginning of the id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    /// Tags to give; they leave the snapshots that had them
    #[arg(value_name = "TAG")]
    tags: Vec<String>,

    /// A tag to take away
    #[arg(long, value_name = "TAG")]
    remove: Vec<String>,

    /// A label to set; KEY alone takes it away
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    label: Vec<Label>,

    #[command(flatten)]
    keeper: KeeperOptions,
}

#[derive(Debug, clap::Args)]
struct Gc {
    /// Delete at once what would wait for an hour in case it is needed again
    #[arg(long)]
    now: bool,

    /// Also remove snapshots without tag or pin that no sandbox comes from, oldest first, until the budget suffices
    #[arg(long)]
    evict: bool,

    /// Only say what would be evicted
    #[arg(long, requires = "evict")]
    dry_run: bool,

    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Budget {
    /// 20G, 500M, none
    #[arg(value_name = "SIZE", value_parser = budget_size)]
    size: Option<Size>,

    #[command(flatten)]
    keeper: KeeperOptions,
}

#[derive(Debug, clap::Args)]
struct Export {
    /// Tag or id of the snapshot, or the beginning of the id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    /// A new file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Begin at this record: 'belljar store import --received ID' of the other side tells
    #[arg(long, value_name = "RECORD", default_value = "0")]
    from: u64,

    #[command(flatten)]
    keeper: KeeperOptions,
}

#[derive(Debug, clap::Args)]
struct Import {
    /// The stream's file [default: standard input]
    #[arg(value_name = "FILE", conflicts_with = "received")]
    file: Option<PathBuf>,

    /// Tell at which record an import of this snapshot that broke off goes on
    #[arg(long, value_name = "ID")]
    received: Option<String>,

    #[command(flatten)]
    keeper: KeeperOptions,
}

/// What waits to be deleted may be needed again within this time.
const GRACE: Duration = Duration::from_secs(3600);

fn budget_size(text: &str) -> Result<Size, String> {
    match text {
        "none" => Ok(Size(0)),
        size => size
            .parse()
            .map_err(|error: belljar_node::size::SizeError| error.to_string()),
    }
}

/// Returns the exit status.
pub(crate) fn store(args: &Args) -> u8 {
    match &args.verb {
        Verb::Ls(args) => super::snapshot::snapshots(args),
        Verb::Du(args) => status_of(du(args)),
        Verb::Verify(args) => status_of(verify(args)),
        Verb::Gc(args) => status_of(gc(args)),
        Verb::Rm(args) => rm(args),
        Verb::Tag(args) => status_of(tag(args)),
        Verb::Pin(args) => status_of(pin(args, true)),
        Verb::Unpin(args) => status_of(pin(args, false)),
        Verb::Budget(args) => status_of(budget(args)),
        Verb::Export(args) => status_of(export(args)),
        Verb::Import(args) => status_of(import(args)),
    }
}

fn connect(keeper: &KeeperOptions) -> Result<Stores, Failure> {
    Ok(Stores::connect(&keeper.keeper(&StateRoot::locate()?))?)
}

fn du(args: &Du) -> Result<u8, Failure> {
    let usage = connect(&args.common.keeper)?.usage()?;
    for problem in &usage.problems {
        report::note(problem);
    }
    let total = usage
        .pack_bytes
        .saturating_add(usage.manifest_bytes)
        .saturating_add(usage.trash_bytes);
    match args.common.output.format() {
        Format::Json => output::print_json(&json!({
            "bytes": total,
            "live_bytes": usage.live_bytes,
            "pack_bytes": usage.pack_bytes,
            "packs": usage.packs,
            "manifest_bytes": usage.manifest_bytes,
            "trash_bytes": usage.trash_bytes,
            "budget": usage.budget,
            "template_bytes": usage.template_bytes,
            "template_budget": usage.template_budget,
            "ready_vmms": usage.ready_vmms,
            "ready_bytes": usage.ready_bytes,
            "problems": usage.problems,
            "snapshots": usage.snapshots.iter().map(|snapshot| {
                let more = json!({
                    "stored_bytes": snapshot.stored_bytes,
                    "unique_bytes": snapshot.unique_bytes,
                });
                output::joined(summary(snapshot), more)
            }).collect::<Vec<_>>(),
        })),
        Format::Table => {
            let mut table = Table::new(&["ID", "TAGS", "DATA", "ON DISK", "OF ITS OWN"]);
            for snapshot in &usage.snapshots {
                table.row(&[
                    snapshot.id.get(..12).unwrap_or(&snapshot.id),
                    &snapshot.tags.join(","),
                    &output::size(snapshot.data_bytes),
                    &output::size(snapshot.stored_bytes),
                    &output::size(snapshot.unique_bytes),
                ]);
            }
            let budget = match usage.budget {
                0 => String::new(),
                budget => format!(" of {}", output::size(budget)),
            };
            let ready = match usage.ready_vmms {
                0 => String::new(),
                count => format!(
                    "; {count} VMMs ready, in {} of memory",
                    output::size(usage.ready_bytes)
                ),
            };
            output::print(&format!(
                "{}\n{}{budget} on disk: {} needed, {} waiting to be deleted; templates {} of {}{ready}\n",
                table.render(),
                output::size(total),
                output::size(usage.live_bytes.saturating_add(usage.manifest_bytes)),
                output::size(usage.trash_bytes),
                output::size(usage.template_bytes),
                output::size(usage.template_budget),
            ));
        }
    }
    Ok(0)
}

/// Exit status 1: something is damaged.
fn verify(args: &Common) -> Result<u8, Failure> {
    let mut bar = Bar::new(false);
    let verified = connect(&args.keeper)?.verify(|done, all| bar.tell(done, Some(all)));
    bar.finish();
    let verified = verified?;
    match args.output.format() {
        Format::Json => output::print_json(&json!({
            "chunks": verified.chunks,
            "bytes": verified.bytes,
            "damaged": verified.damaged,
            "broken": verified.broken,
            "problems": verified.problems,
            "templates": verified.templates,
            "bad_templates": verified.bad_templates,
        })),
        Format::Table => {
            let mut text = format!(
                "{} chunks, {} of data: {} damaged\n",
                verified.chunks,
                output::size(verified.bytes),
                verified.damaged
            );
            for (id, why) in &verified.broken {
                text.push_str(&format!(
                    "snapshot {id} cannot be restored: {}\n",
                    output::escaped(why)
                ));
            }
            for template in &verified.bad_templates {
                text.push_str(&format!(
                    "template {}: not what its chunks say; it is removed, and made again when it is needed\n",
                    output::escaped(template)
                ));
            }
            for problem in &verified.problems {
                text.push_str(&format!("{}\n", output::escaped(problem)));
            }
            output::print(&text);
        }
    }
    let good = verified.damaged == 0 && verified.broken.is_empty() && verified.problems.is_empty();
    Ok(u8::from(!good))
}

fn gc(args: &Gc) -> Result<u8, Failure> {
    let grace = if args.now { Duration::ZERO } else { GRACE };
    let call = keeper::Collect {
        grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        evict: args.evict,
        dry_run: args.dry_run,
        live: snapshots::live(&StateRoot::locate()?)?,
    };
    let collected = connect(&args.common.keeper)?.collect(call)?;
    match args.common.output.format() {
        Format::Json => output::print_json(&json!({
            "packs": collected.packs,
            "bytes": collected.bytes,
            "copied_bytes": collected.copied_bytes,
            "deleted_bytes": collected.deleted_bytes,
            "evicted": collected.evicted,
            "kept": collected.kept,
            "suffices": collected.suffices,
            "template_bytes": collected.template_bytes,
        })),
        Format::Table => {
            let mut text = String::new();
            for id in &collected.evicted {
                text.push_str(&format!("evicted {id}\n"));
            }
            text.push_str(&format!(
                "{} are not needed any more, {} of these and of earlier ones were deleted\n",
                output::size(collected.bytes),
                output::size(collected.deleted_bytes)
            ));
            if collected.template_bytes > 0 {
                text.push_str(&format!(
                    "{} of templates were deleted to make room; they are made again when they are needed\n",
                    output::size(collected.template_bytes)
                ));
            }
            output::print(&text);
        }
    }
    if collected.suffices {
        return Ok(0);
    }
    let kept: Vec<String> = collected
        .kept
        .iter()
        .map(|(id, why)| format!("{}: {why}", id.get(..12).unwrap_or(id)))
        .collect();
    Err(Failure::with_remedy(
        format!(
            "the budget does not suffice for what must be kept ({})",
            kept.join(", ")
        ),
        "take tags or pins away, remove sandboxes, or raise the budget",
    ))
}

fn rm(args: &Rm) -> u8 {
    let prepared = || -> Result<_, Failure> {
        Ok((
            connect(&args.keeper)?,
            snapshots::live(&StateRoot::locate()?)?,
        ))
    };
    let (mut stores, live) = match prepared() {
        Ok(prepared) => prepared,
        Err(failure) => return failure.tell(),
    };
    each_of(&args.snapshots, |word| {
        let mut snapshot = word.clone();
        if args.force {
            let found = stores.describe(word)?.snapshot.unwrap_or_default();
            snapshot.clone_from(&found.id);
            if live.contains(&found.id) {
                return Err(Failure::with_remedy(
                    format!("snapshot {snapshot} is kept: a sandbox comes from it"),
                    "'belljar inspect' tells a sandbox's origin; remove the sandbox first",
                ));
            }
            stores.mark(&found.id, vec![], found.tags, [].into(), Some(false))?;
        }
        stores.remove(&snapshot, live.clone())?;
        Ok(())
    })
}

fn tag(args: &Tag) -> Result<u8, Failure> {
    if args.tags.is_empty() && args.remove.is_empty() && args.label.is_empty() {
        return Err(Failure::with_remedy(
            "no tag is named",
            "write for example: belljar store tag SNAPSHOT ready",
        ));
    }
    connect(&args.keeper)?.mark(
        &args.snapshot,
        args.tags.clone(),
        args.remove.clone(),
        values::labels(&args.label),
        None,
    )?;
    Ok(0)
}

fn pin(args: &One, pinned: bool) -> Result<u8, Failure> {
    connect(&args.keeper)?.mark(&args.snapshot, vec![], vec![], [].into(), Some(pinned))?;
    Ok(0)
}

fn budget(args: &Budget) -> Result<u8, Failure> {
    let mut stores = connect(&args.keeper)?;
    if let Some(size) = args.size {
        stores.set_budget(size.0)?;
        return Ok(0);
    }
    let usage = stores.usage()?;
    output::print(&match usage.budget {
        0 => "none\n".to_owned(),
        budget => format!("{budget}\n"),
    });
    Ok(0)
}

fn export(args: &Export) -> Result<u8, Failure> {
    let file = args.file.as_ref().map(|path| {
        File::create_new(path)
            .map_err(|error| Failure::new(format!("cannot make {}: {error}", path.display())))
    });
    let file = file.transpose()?;
    if file.is_none() && stdout().is_terminal() {
        return Err(Failure::with_remedy(
            "a snapshot's stream is nothing for a terminal",
            "write it to a file: --file FILE, or > FILE",
        ));
    }
    let out = stdout();
    let to = file.as_ref().map_or(out.as_fd(), File::as_fd);
    let mut bar = Bar::new(false);
    let done = connect(&args.keeper)?.export(&args.snapshot, args.from, to, |done, all| {
        bar.tell(done, Some(all));
    });
    bar.finish();
    if done.is_err()
        && let Some(path) = &args.file
    {
        // A stream that broke off is of no use to whoever finds it.
        let _ = std::fs::remove_file(path);
    }
    done?;
    Ok(0)
}

fn import(args: &Import) -> Result<u8, Failure> {
    let mut stores = connect(&args.keeper)?;
    if let Some(id) = &args.received {
        let imported = stores.received(id)?;
        output::print(&format!("{}\n", imported.received));
        return Ok(0);
    }
    let file = args.file.as_ref().map(|path| {
        File::open(path)
            .map_err(|error| Failure::new(format!("cannot read {}: {error}", path.display())))
    });
    let file = file.transpose()?;
    if file.is_none() && stdin().is_terminal() {
        return Err(Failure::with_remedy(
            "no stream is given",
            "name its file, or pass it on standard input",
        ));
    }
    let standard = stdin();
    let from = file.as_ref().map_or(standard.as_fd(), File::as_fd);
    let mut bar = Bar::new(false);
    let imported = stores.import(from, |done, all| bar.tell(done, Some(all)));
    bar.finish();
    let imported = imported?;
    output::print(&format!("{}\n", imported.id));
    if imported.known {
        report::aside("it was here already");
    }
    Ok(0)
}
