//! `belljar inspect`.

use std::os::unix::fs::MetadataExt;

use belljar_node::accounting;
use belljar_node::registry::Found;
use belljar_node::state;
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options;
use crate::output;

/// Print all that the host knows about sandboxes, as JSON
///
/// Configuration, state, processes, sockets, logs, the stages of the last boot, how it ended, and the CPU
/// time of the virtual processors by the host's own count.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Ids or names of sandboxes, or the beginnings of either
    #[arg(required = true, value_name = "BOX")]
    sandboxes: Vec<String>,
}

/// Returns the exit status.
pub(crate) fn inspect(args: &Args) -> u8 {
    status_of(print_all(args))
}

fn print_all(args: &Args) -> Result<u8, Failure> {
    let all = args
        .sandboxes
        .iter()
        .map(|word| describe(&options::find(word)?))
        .collect::<Result<Vec<Value>, Failure>>()?;
    output::print_json(&all);
    Ok(0)
}

fn describe(found: &Found) -> Result<Value, Failure> {
    let listed = found.look();
    let vmm = listed.state.vmm();
    let exists = |name: &str| {
        let path = found.dir().file(name);
        path.exists().then_some(path)
    };
    let record = |name| found.dir().read_record::<Value>(name).unwrap_or_default();
    Ok(json!({
        "id": found.id(),
        "state": listed.state,
        "reason": listed.state.reason(),
        "remedy": listed.state.remedy(found.id()),
        "config": listed.spec,
        "dir": found.dir().path(),
        "owner": found.owner(),
        "boot": record(state::BOOT),
        "ended": record(state::ENDED),
        "sockets": {
            "api": exists(state::API_SOCKET),
            "vsock": exists(state::VSOCK_SOCKET),
            "console": exists(state::CONSOLE_SOCKET),
            "control": exists(state::CONTROL_SOCKET),
        },
        "logs": {
            "console": exists(state::CONSOLE_LOG),
            "vmm": exists(state::VMM_LOG),
        },
        // The host's own count: nothing in the guest can falsify it.
        "cpu_time": vmm.and_then(accounting::cpu_times),
        "resident": vmm.and_then(accounting::resident),
        "disk_used": disk_used(found),
    }))
}

/// Bytes of the host's disk that the sandbox's writable disk takes.
fn disk_used(found: &Found) -> Option<u64> {
    let metadata = std::fs::metadata(found.dir().file(state::DISK)).ok()?;
    Some(metadata.blocks().saturating_mul(512))
}
