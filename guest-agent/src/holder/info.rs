//! What is told about processes.

use belljar_protocol::frame::MAX_FRAME;
use belljar_protocol::v1;
use prost::Message;
use prost::encoding::encoded_len_varint;

use super::process::Process;
use super::table::Table;

/// All that is known.
pub(super) fn full(process: &Process) -> v1::ProcessInfo {
    let usage = match &process.ended {
        Some(ended) => ended.end.usage,
        None => process.leaf.as_ref().map(crate::exec::cgroup::Leaf::usage),
    };
    let usage = usage.or_else(|| Some(v1::Usage::default()));
    v1::ProcessInfo {
        usage,
        ..brief(process)
    }
}

/// Without what must be read from the system.
fn brief(process: &Process) -> v1::ProcessInfo {
    let [stdout, stderr] = process.stream_infos();
    let ended = process.ended.as_ref();
    v1::ProcessInfo {
        id: process.id,
        name: process.name.clone(),
        pid: process.pid.unsigned_abs(),
        argv: process.about.argv.clone(),
        cwd: process.about.cwd.clone(),
        user: process.about.user.clone(),
        started_boottime_ns: process.about.boottime_ns,
        started_unix_ns: process.about.unix_ns,
        detached: process.owner == super::process::Owner::None,
        terminal: process.terminal,
        stdin_open: process.stdin.is_some() && !process.input.is_closing(),
        end: ended.map(|ended| ended.end.clone()),
        ended_boottime_ns: ended.map_or(0, |ended| ended.boottime_ns),
        stdout: Some(stdout),
        stderr: Some(stderr),
        usage: ended.and_then(|ended| ended.end.usage),
        limits: process.about.limits,
        viewers: u32::try_from(process.viewers.len()).unwrap_or(u32::MAX),
    }
}

/// All processes; arguments are cut further where the list gets too long for a frame.
pub(super) fn list(table: &Table, with_ended: bool) -> v1::ProcessList {
    let mut processes: Vec<_> = table
        .all()
        .filter(|process| with_ended || process.is_running())
        .map(full)
        .collect();
    let most = MAX_FRAME.saturating_sub(1024);
    let share = most.checked_div(processes.len()).unwrap_or(most);
    let total: usize = processes
        .iter()
        .map(|it| it.encoded_len().saturating_add(8))
        .sum();
    if total > most {
        for info in &mut processes {
            shorten(info, share);
        }
    }
    v1::ProcessList { processes }
}

/// Drops arguments, the last ones first, and then the working directory, until it takes no more than
/// `share` bytes of a list.
fn shorten(info: &mut v1::ProcessInfo, share: usize) {
    let mut excess = info.encoded_len().saturating_add(8).saturating_sub(share);
    while excess > 0 {
        let Some(argument) = info.argv.pop() else {
            info.cwd = Vec::new();
            return;
        };
        // With its tag and its length.
        let length = encoded_len_varint(argument.len() as u64).saturating_add(1);
        excess = excess.saturating_sub(argument.len().saturating_add(length));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_shortened_fits_and_loses_no_more_than_it_must(
            lengths in prop::collection::vec(0_usize..300, 0..200),
            share in 100_usize..5000,
        ) {
            let whole = v1::ProcessInfo {
                argv: lengths.iter().map(|length| vec![b'x'; *length]).collect(),
                ..v1::ProcessInfo::default()
            };
            let mut info = whole.clone();
            shorten(&mut info, share);
            prop_assert!(info.encoded_len() + 8 <= share);
            if info.argv.len() < whole.argv.len() {
                info.argv.push(whole.argv[info.argv.len()].clone());
                prop_assert!(info.encoded_len() + 8 > share);
            }
        }
    }
}
