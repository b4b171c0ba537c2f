//! `belljar restore`, `belljar reset` and `belljar fork`.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use belljar_node::process::SIGNALS;
use belljar_node::sandbox::{Limits, Sandbox};
use belljar_node::snapshots::{self, Fork, Host, NewClone, Reset, Source};
use belljar_node::stages::Stages;
use belljar_node::state::StateRoot;
use belljar_node::state::spec::Life;
use belljar_node::sys::SignalFd;

use serde_json::json;

use crate::failure::{Failure, status_of};
use crate::options::{self, BootOptions, KeeperOptions, MachineOptions};
use crate::output::{self, Format};
use crate::report;
use crate::values::{self, Label};

/// How a snapshot becomes a guest.
#[derive(Debug, clap::Args)]
struct GoingBack {
    /// Root file system, if it is not where it was
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,

    /// Print what it took, by stages, on standard error
    #[arg(short = 'v', long)]
    stages: bool,

    #[command(flatten)]
    parts: Parts,
}

/// What takes part when a guest is loaded.
#[derive(Debug, clap::Args)]
struct Parts {
    #[command(flatten)]
    machine: MachineOptions,

    #[command(flatten)]
    boot: BootOptions,

    #[command(flatten)]
    keeper: KeeperOptions,
}

/// Make a sandbox from a snapshot, and let it go on from there
///
/// Prints the sandbox's id. It has random numbers, a clock, a host name and a machine id of its own before any
/// of its programs runs. Without a name it goes away when its guest ends.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar restore ready                      by tag
  belljar restore 3f9a --name web            by the beginning of its id; it stays, as it has a name
  belljar restore ready -v                   what it took, by stages
  belljar run --from ready -- ./tests        one command in a guest that goes away with it")]
pub(crate) struct Args {
    /// Tag or id of the snapshot, or the beginning of the id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,

    /// A name that no other sandbox has; a sandbox with a name stays when its guest ends
    #[arg(short, long, value_parser = values::name)]
    name: Option<String>,

    /// A label to find it by; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = values::label)]
    label: Vec<Label>,

    #[command(flatten)]
    going_back: GoingBack,
}

/// Returns the exit status.
pub(crate) fn restore(args: &Args, begin: Instant) -> u8 {
    let mut stages = Stages::new(begin);
    let status = status_of(make(args, &mut stages));
    if args.going_back.stages {
        report::stages(&stages);
    }
    status
}

fn make(args: &Args, stages: &mut Stages) -> Result<u8, Failure> {
    let clone = NewClone {
        life: if args.name.is_some() {
            Life::Persistent
        } else {
            Life::Detached
        },
        name: args.name.clone(),
        labels: values::labels(&args.label),
    };
    let signals = SignalFd::new(&SIGNALS).map_err(Failure::new)?;
    let limits = Limits {
        boot: args.going_back.parts.boot.limit(),
        cancel: Some(signals.as_fd()),
    };
    let from = From {
        snapshot: &args.snapshot,
        image: args.going_back.image.clone(),
        keeper: &args.going_back.parts.keeper,
        machine: &args.going_back.parts.machine,
    };
    let sandbox = from.restore(&clone, limits, stages)?;
    let dir = sandbox.release()?;
    output::print(&format!("{}\n", dir.id()));
    Ok(0)
}

/// Where a sandbox comes from.
pub(crate) struct From<'a> {
    pub(crate) snapshot: &'a str,
    pub(crate) image: Option<PathBuf>,
    pub(crate) keeper: &'a KeeperOptions,
    pub(crate) machine: &'a MachineOptions,
}

impl From<'_> {
    /// A sandbox that this process owns.
    pub(crate) fn restore(
        &self,
        clone: &NewClone,
        limits: Limits<'_>,
        stages: &mut Stages,
    ) -> Result<Sandbox, Failure> {
        let root = StateRoot::locate()?;
        let assets = self.machine.assets()?;
        let keeper = self.keeper.keeper(&root);
        let programs = self.machine.programs();
        let source = Source::open(
            &keeper,
            self.snapshot,
            &assets,
            &programs,
            self.image.clone(),
        )?;
        stages.mark(match (source.hot, &source.handler) {
            (true, _) => "template",
            (false, Some(_)) => "lazy",
            (false, None) => "template filled",
        });
        let host = Host {
            root: &root,
            programs: &programs,
            assets: &assets,
            limits,
        };
        let sandbox = snapshots::restore(host, &source, clone, stages)?;
        warn(&sandbox);
        Ok(sandbox)
    }
}

/// What the restored guest could not be told.
fn warn(sandbox: &Sandbox) {
    tell(sandbox.warnings());
}

fn tell(warnings: &[String]) {
    for warning in warnings {
        report::note(&format!("the guest goes on, but {warning}"));
    }
}

/// Take a sandbox back to a snapshot: what it has done since is lost
///
/// Name and id stay; guest and disk are the snapshot's. A guest that runs from this very snapshot goes back in
/// place, in milliseconds; any other one is stopped, and a new VMM loads the snapshot. Prints the sandbox's id.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar reset box                          to the snapshot that it was restored from
  belljar reset box ready")]
pub(crate) struct ResetArgs {
    /// Id or name of the sandbox, or the beginning of either
    #[arg(value_name = "BOX")]
    sandbox: String,

    /// Tag or id of the snapshot, or the beginning of the id [default: the one it was restored from]
    #[arg(value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// json: the id, whether it went back in place, and the stages
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,

    #[command(flatten)]
    going_back: GoingBack,
}

/// Returns the exit status.
pub(crate) fn reset(args: &ResetArgs, begin: Instant) -> u8 {
    let mut stages = Stages::new(begin);
    let status = status_of(go_back(args, &mut stages));
    if args.going_back.stages {
        report::stages(&stages);
    }
    status
}

fn go_back(args: &ResetArgs, stages: &mut Stages) -> Result<u8, Failure> {
    let root = StateRoot::locate()?;
    let found = options::find(&args.sandbox)?;
    let host = Host {
        root: &root,
        programs: &args.going_back.parts.machine.programs(),
        assets: &args.going_back.parts.machine.assets()?,
        // Half a reset would be worse than a whole one: it is not interrupted.
        limits: Limits {
            boot: args.going_back.parts.boot.limit(),
            cancel: None,
        },
    };
    let keeper = args.going_back.parts.keeper.keeper(&root);
    let (snapshot, image) = (args.snapshot.as_deref(), args.going_back.image.as_deref());
    let why = match snapshots::reset(host, &keeper, &found, snapshot, image, stages)? {
        Reset::InPlace(warnings) => {
            tell(&warnings);
            None
        }
        Reset::Anew(sandbox, why) => {
            warn(&sandbox);
            sandbox.release()?;
            Some(why)
        }
    };
    if let Some(Format::Json) = args.output {
        let stages = stages
            .rows()
            .map(|(stage, took, _)| json!({"stage": stage, "took_us": output::micros(took)}));
        output::print_json(&json!({
            "id": found.id(),
            "in_place": why.is_none(),
            "why_not": why,
            "stages": stages.collect::<Vec<_>>(),
        }));
    } else {
        output::print(&format!("{}\n", found.id()));
        report::aside(&match why {
            None => "it went back in place: the same VMM runs it".to_owned(),
            Some(why) => format!("a new VMM runs it: {why}"),
        });
    }
    Ok(0)
}

/// Make clones of a running or paused sandbox, which stands still for a moment
///
/// Prints the clones' ids. They share one image of the memory, and cost what they write; nothing is stored.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar fork box                           one clone, which goes away with its guest
  belljar fork box --count 10 --name worker  worker-1 to worker-10, which stay")]
pub(crate) struct ForkArgs {
    /// Id or name of the sandbox, or the beginning of either
    #[arg(value_name = "BOX")]
    sandbox: String,

    /// How many
    #[arg(short, long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=4096))]
    count: u32,

    /// A name; of several clones the beginning of their names
    #[arg(short, long, value_parser = values::name)]
    name: Option<String>,

    /// A label to find them by; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = values::label)]
    label: Vec<Label>,

    /// json: the ids, and how long the sandbox stood still, in microseconds
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,

    #[command(flatten)]
    parts: Parts,
}

/// Returns the exit status.
pub(crate) fn fork(args: &ForkArgs) -> u8 {
    status_of(make_clones(args))
}

fn make_clones(args: &ForkArgs) -> Result<u8, Failure> {
    let root = StateRoot::locate()?;
    let found = options::find(&args.sandbox)?;
    let assets = args.parts.machine.assets()?;
    let signals = SignalFd::new(&SIGNALS).map_err(Failure::new)?;
    let limits = Limits {
        boot: args.parts.boot.limit(),
        cancel: Some(signals.as_fd()),
    };
    let fork = Fork {
        count: args.count,
        name: args.name.clone(),
        labels: values::labels(&args.label),
    };
    let host = Host {
        root: &root,
        programs: &args.parts.machine.programs(),
        assets: &assets,
        limits,
    };
    let keeper = args.parts.keeper.keeper(&root);
    let as_json = matches!(args.output, Some(Format::Json));
    let forked = snapshots::fork(host, &keeper, &found, &fork, |id, warnings| {
        if !as_json {
            output::print(&format!("{id}\n"));
        }
        for warning in warnings {
            report::note(&format!("the guest of {id} goes on, but {warning}"));
        }
    })?;
    if as_json {
        output::print_json(&json!({
            "ids": forked.ids,
            "frozen_us": output::micros(forked.frozen),
            "paused_us": output::micros(forked.paused),
        }));
    }
    report::aside(&format!(
        "its programs stood still for {}, its processors for {}",
        output::ms(forked.frozen),
        output::ms(forked.paused)
    ));
    Ok(0)
}
