//! `belljar inspect`.

use belljar_node::registry::Found;
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options;
use crate::output;

/// Print all that is known about sandboxes, as JSON
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
    let owner = found.owner();
    Ok(json!({
        "id": found.id(),
        "state": listed.state,
        "reason": listed.state.reason(),
        "remedy": listed.state.remedy(found.id()),
        "config": listed.spec,
        "dir": found.dir().path(),
        "owner": owner,
    }))
}
