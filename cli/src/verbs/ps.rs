//! `belljar ps`.

use std::time::Duration;

use belljar_node::process::{self, given_name, is_login_shell};
use belljar_node::v1::{self, end::How};
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output::{self, Format, OutputOption, Table};
use crate::session::status_of_end;

/// List the processes of a sandbox that were started from outside
///
/// With what they start themselves; 'belljar exec BOX ps' or top shows everything that runs.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar ps box                      what runs
  belljar ps -a box                   also what has ended and is kept
  belljar ps -q box | xargs belljar kill box
  belljar ps -o json box | jq '.[].stdout.newest'")]
pub(crate) struct Args {
    /// Also processes that have ended and are kept
    #[arg(short, long)]
    all: bool,

    /// Print nothing but ids, one a line
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    sandbox: BoxArg,
}

/// Returns the exit status.
pub(crate) fn ps(args: &Args) -> u8 {
    status_of(list(args))
}

fn list(args: &Args) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let processes = process::list(&found, args.all)?;
    if args.quiet {
        let ids: String = processes
            .iter()
            .map(|info| format!("{}\n", info.id))
            .collect();
        output::print(&ids);
        return Ok(0);
    }
    match args.output.format() {
        Format::Table => output::print(&table(&processes)),
        Format::Json => {
            let all: Vec<Value> = processes.iter().map(summary).collect();
            output::print_json(&all);
        }
    }
    Ok(0)
}

fn table(processes: &[v1::ProcessInfo]) -> String {
    let titles = [
        "ID", "NAME", "PID", "USER", "AGE", "STATE", "CPU", "MEMORY", "COMMAND",
    ];
    let mut table = Table::new(&titles);
    for info in processes {
        let usage = info
            .end
            .as_ref()
            .map_or(info.usage, |end| end.usage)
            .unwrap_or_default();
        let running = info.end.is_none();
        let memory = if running {
            usage.memory
        } else {
            usage.memory_peak
        };
        let user = if info.user.is_empty() {
            "root"
        } else {
            &info.user
        };
        let name = given_name(&info.name);
        table.row(&[
            &info.id.to_string(),
            if name.is_empty() { "-" } else { name },
            &if running {
                info.pid.to_string()
            } else {
                "-".to_owned()
            },
            user,
            &output::age(info.started_unix_ns / 1_000_000),
            &state(info),
            &output::duration(Duration::from_micros(usage.cpu_us)),
            &if memory == 0 {
                "-".to_owned()
            } else {
                output::size(memory)
            },
            &command(info),
        ]);
    }
    table.render()
}

/// As it was typed, or what it is for.
pub(super) fn command(info: &v1::ProcessInfo) -> String {
    if is_login_shell(&info.argv) {
        return "(login shell)".to_owned();
    }
    let words: Vec<String> = info
        .argv
        .iter()
        .map(|word| output::escaped_bytes(word))
        .collect();
    words.join(" ")
}

/// A word or two: `running`, `terminal`, `exited 3`.
fn state(info: &v1::ProcessInfo) -> String {
    let Some(end) = &info.end else {
        return if info.terminal.is_some() {
            "terminal".to_owned()
        } else {
            "running".to_owned()
        };
    };
    match &end.how {
        Some(How::Exited(exited)) => format!("exited {}", exited.code),
        Some(How::Signalled(signalled)) => format!("signal {}", signalled.number),
        Some(How::TimedOut(_)) => "timed out".to_owned(),
        Some(How::OutOfMemory(_)) => "out of memory".to_owned(),
        Some(How::Lost(_)) | None => "lost".to_owned(),
    }
}

/// All that is known, for programs.
fn summary(info: &v1::ProcessInfo) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let stream = |stream: &Option<v1::StreamInfo>| {
        stream.map(|stream| {
            json!({"oldest": stream.oldest, "newest": stream.newest, "closed": stream.closed})
        })
    };
    let usage = |usage: &Option<v1::Usage>| {
        usage.map(|usage| {
            json!({
                "cpu_us": usage.cpu_us,
                "memory": usage.memory,
                "memory_peak": usage.memory_peak,
                "pids": usage.pids,
            })
        })
    };
    let limits = info.limits.unwrap_or_default();
    json!({
        "id": info.id,
        "name": given_name(&info.name),
        "pid": info.pid,
        "argv": info.argv.iter().map(|word| text(word)).collect::<Vec<_>>(),
        "cwd": text(&info.cwd),
        "user": info.user,
        "state": if info.end.is_some() { "ended" } else { "running" },
        "started_ms": info.started_unix_ns / 1_000_000,
        "detached": info.detached,
        "terminal": info.terminal.map(|size| json!({"columns": size.columns, "rows": size.rows})),
        "stdin_open": info.stdin_open,
        "viewers": info.viewers,
        "end": info.end.as_ref().map(|end| json!({
            "how": how(end),
            "exit_status": status_of_end(end),
            "wall_us": end.wall_us,
            "usage": usage(&end.usage),
        })),
        "usage": usage(&info.usage),
        "limits": {
            "memory": limits.memory,
            "cpu_milli": limits.cpu_milli,
            "pids": limits.pids,
        },
        "stdout": stream(&info.stdout),
        "stderr": stream(&info.stderr),
    })
}

fn how(end: &v1::End) -> &'static str {
    match &end.how {
        Some(How::Exited(_)) => "exited",
        Some(How::Signalled(_)) => "signalled",
        Some(How::TimedOut(_)) => "timed_out",
        Some(How::OutOfMemory(_)) => "out_of_memory",
        Some(How::Lost(_)) | None => "lost",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_guest_cannot_draw_with_its_list() {
        let info = v1::ProcessInfo {
            id: 3,
            name: "a\x1b[2J".into(),
            user: "\r\n".into(),
            argv: vec![b"sh".to_vec(), b"\x1b]0;x\x07\xff".to_vec()],
            ..v1::ProcessInfo::default()
        };
        let text = table(std::slice::from_ref(&info));
        assert!(
            !text.contains('\x1b') && text.lines().count() == 2,
            "{text}"
        );
        assert_eq!(summary(&info)["state"], "running");
    }

    #[test]
    fn ends_are_short_words() {
        let ended = |how| {
            state(&v1::ProcessInfo {
                end: Some(v1::End {
                    how: Some(how),
                    ..v1::End::default()
                }),
                ..v1::ProcessInfo::default()
            })
        };
        assert_eq!(ended(How::Exited(v1::Exited { code: 3 })), "exited 3");
        assert_eq!(ended(How::OutOfMemory(v1::OutOfMemory {})), "out of memory");
        let signalled = v1::Signalled {
            number: 9,
            core_dumped: false,
        };
        assert_eq!(ended(How::Signalled(signalled)), "signal 9");
    }
}
