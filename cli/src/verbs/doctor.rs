//! `belljar doctor`.

use std::fmt::Write as _;

use belljar_node::assets::Assets;
use belljar_node::doctor::{Check, Verdict, examine, has_failures};
use belljar_node::state::StateRoot;

use crate::options::MachineOptions;
use crate::output::{self, Format, OutputOption};

/// Check this machine, and say what to do about each thing that is missing
///
/// Exit status 1 if a check failed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Remove what crashed sandboxes left behind
    #[arg(long)]
    clean: bool,

    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    machine: MachineOptions,
}

/// Returns the exit status.
pub(crate) fn doctor(args: &Args) -> u8 {
    let programs = args.machine.programs();
    let assets = Assets::locate(args.machine.assets.as_deref());
    let checks = examine(assets, StateRoot::locate(), &programs, args.clean);
    let text = match args.output.format() {
        Format::Table => table(&checks, output::has_colour()),
        Format::Json => json(&checks),
    };
    output::print(&text);
    u8::from(has_failures(&checks))
}

fn json(checks: &[Check]) -> String {
    let document = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ok": !has_failures(checks),
        "checks": checks,
    });
    format!("{document:#}\n")
}

fn table(checks: &[Check], colour: bool) -> String {
    let mut text = String::new();
    for check in checks {
        let (word, code) = match check.verdict {
            Verdict::Ok => ("ok", "32"),
            Verdict::Note => ("note", "33"),
            Verdict::Failed => ("FAILED", "1;31"),
        };
        let pad = " ".repeat(6usize.saturating_sub(word.len()));
        let word = if colour {
            format!("\x1b[{code}m{word}\x1b[0m")
        } else {
            word.to_owned()
        };
        let _ = writeln!(text, "{word}{pad}  {:<15}  {}", check.name, check.found);
        if !check.remedy.is_empty() {
            let _ = writeln!(text, "{:23}  -> {}", "", check.remedy);
        }
    }
    let failed = checks
        .iter()
        .filter(|c| c.verdict == Verdict::Failed)
        .count();
    let _ = match failed {
        0 => writeln!(text, "\nThis machine can run guests."),
        1 => writeln!(text, "\nOne check failed."),
        n => writeln!(text, "\n{n} checks failed."),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks() -> Vec<Check> {
        vec![
            Check {
                name: "processor",
                verdict: Verdict::Ok,
                found: "EPYC".into(),
                remedy: String::new(),
            },
            Check {
                name: "/dev/kvm",
                verdict: Verdict::Failed,
                found: "is not there".into(),
                remedy: "modprobe".into(),
            },
        ]
    }

    #[test]
    fn a_table_shows_each_remedy() {
        let text = table(&checks(), false);
        assert!(text.contains("FAILED  /dev/kvm"), "{text}");
        assert!(text.contains("-> modprobe"), "{text}");
        assert!(!text.contains('\x1b'), "{text}");
        assert!(table(&checks(), true).contains("\x1b[1;31mFAILED"));
    }

    #[test]
    fn json_can_be_read_back() {
        let value: serde_json::Value = serde_json::from_str(&json(&checks())).unwrap();
        assert_eq!(value["ok"], false);
        assert_eq!(value["checks"][1]["verdict"], "failed");
    }
}
