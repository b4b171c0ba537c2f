//! `belljar inspect`.

use belljar_node::inspect;
use belljar_node::registry::{self, FindError};
use belljar_node::snapshots::{self, KeeperError, Stores, keeper};
use belljar_node::state::StateRoot;
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::KeeperOptions;
use crate::output;
use crate::verbs::snapshot;

/// Print all that the host knows about sandboxes or snapshots, as JSON
///
/// Of a snapshot: what is in it, what it needs, and whether it can be restored here. Of a sandbox: configuration, state, processes, sockets, logs, the stages of the last boot, how it ended, and the CPU
/// time of the virtual processors by the host's own count.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Ids, names or tags, or the beginnings of ids; a sandbox is meant rather than a snapshot
    #[arg(required = true, value_name = "BOX|SNAPSHOT")]
    sandboxes: Vec<String>,

    #[command(flatten)]
    keeper: KeeperOptions,
}

/// Returns the exit status.
pub(crate) fn inspect(args: &Args) -> u8 {
    status_of(print_all(args))
}

fn print_all(args: &Args) -> Result<u8, Failure> {
    let all = args
        .sandboxes
        .iter()
        .map(|word| describe_any(word, args))
        .collect::<Result<Vec<Value>, Failure>>()?;
    output::print_json(&all);
    Ok(0)
}

/// A sandbox, else a snapshot of that name.
fn describe_any(word: &str, args: &Args) -> Result<Value, Failure> {
    let root = StateRoot::locate()?;
    let unknown = match registry::find(&root, word) {
        Ok(found) => {
            return serde_json::to_value(inspect::inspect(&found)).map_err(Failure::new);
        }
        Err(unknown @ (FindError::Unknown { .. } | FindError::Gone(_))) => unknown,
        Err(other) => return Err(other.into()),
    };
    // No keeper is started for a mistyped name where there never was a snapshot.
    if !root.keeper_dir().exists() {
        return Err(unknown.into());
    }
    match Stores::connect(&args.keeper.keeper(&root))?.describe(word) {
        Ok(description) => Ok(describe_snapshot(&description)),
        Err(KeeperError::Refused {
            code: keeper::error::Code::NoSnapshot,
            ..
        }) if matches!(unknown, FindError::Gone(_)) => Err(unknown.into()),
        Err(KeeperError::Refused {
            code: keeper::error::Code::NoSnapshot,
            ..
        }) => Err(Failure::with_remedy(
            format!("there is no sandbox and no snapshot '{word}'"),
            "'belljar ls -a' lists all sandboxes, 'belljar snapshots' all snapshots",
        )),
        Err(error) => Err(error.into()),
    }
}

fn describe_snapshot(of: &keeper::Description) -> Value {
    let sandbox: Option<Value> = serde_json::from_slice(&of.sandbox).ok();
    let unfit = snapshots::check(of).err();
    let contents = of.images.iter().map(|image| {
        json!({
            "name": image.name, "kind": image.kind, "bytes": image.length,
            "data_bytes": image.data_bytes, "extents": image.extents,
        })
    });
    let listed = of.snapshot.as_ref().map_or(json!({}), snapshot::summary);
    let more = json!({
        "kind": "snapshot",
        "contents": contents.collect::<Vec<_>>(),
        "needs": {
            "architecture": of.architecture,
            "cpu_baseline": of.cpu_baseline,
            "memory": of.memory_bytes,
            "cpus": of.vcpus,
            "base_images": of.base_images,
            "other": of.requirements,
        },
        "sandbox": sandbox,
        "restorable": unfit.is_none(),
        "why_not": unfit.map(|error| error.to_string()),
        "template": of.has_template,
    });
    output::joined(listed, more)
}
