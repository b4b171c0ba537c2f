//! `belljar events`.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use belljar_node::process::given_name;
use belljar_node::registry::Found;
use belljar_node::system::Events;
use belljar_node::v1::{self, event::What};
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::Several;
use crate::output::{self, Format, OutputOption};
use crate::session::status_of_end;

/// Tell what has happened in sandboxes: processes, lack of memory, a replaced worker, the clock
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar events                     what is known of all sandboxes that run
  belljar events -f box              and what happens from now on
  belljar events --from 17 box       from event 17 on; each sandbox counts its own
  belljar events -o json -f | jq .

A sandbox remembers its last 1024 events; 'missing' says how many are forgotten.")]
pub(crate) struct Args {
    #[command(flatten)]
    several: Several,

    /// Go on with what happens
    #[arg(short, long)]
    follow: bool,

    /// Number of the first event wanted
    #[arg(long, value_name = "N", default_value_t = 0)]
    from: u64,

    #[command(flatten)]
    output: OutputOption,
}

/// Returns the exit status.
pub(crate) fn events(args: &Args) -> u8 {
    status_of(tell(args))
}

/// A line, or why there are no more of a sandbox.
type Told = Result<String, Failure>;

fn tell(args: &Args) -> Result<u8, Failure> {
    let all = args.several.running()?;
    let format = args.output.format();
    // One thread each: none waits for another.
    let (sender, receiver) = mpsc::sync_channel::<Told>(256);
    for found in all {
        let sender = sender.clone();
        let (from, follow) = (args.from, args.follow);
        thread::spawn(move || {
            if let Err(failure) = read(&found, from, follow, format, &sender) {
                let _ = sender.send(Err(failure));
            }
        });
    }
    drop(sender);
    let mut status = 0;
    for told in receiver {
        match told {
            Ok(text) if output::print_on(&text) => {}
            Ok(_) => break,
            Err(failure) => status = failure.tell(),
        }
    }
    Ok(status)
}

fn read(
    found: &Found,
    from: u64,
    follow: bool,
    format: Format,
    to: &mpsc::SyncSender<Told>,
) -> Result<(), Failure> {
    let mut events = Events::start(found.clone(), from, follow)?;
    let called = found.called();
    while let Some(event) = events.next_event()? {
        let text = match format {
            Format::Table => line(&called, &event),
            Format::Json => format!("{}\n", document(found.id(), &called, &event)),
        };
        if to.send(Ok(text)).is_err() {
            break;
        }
    }
    Ok(())
}

fn line(called: &str, event: &v1::Event) -> String {
    let (word, details) = words(event.what.as_ref());
    let since_start = Duration::from_nanos(event.boottime_ns);
    let time = format!("{:.3}s", since_start.as_secs_f64());
    format!(
        "{:>6}  {time:>12}  {}  {word:<14}  {}\n",
        event.sequence,
        output::escaped(called),
        output::escaped(&details)
    )
    .trim_end()
    .to_owned()
        + "\n"
}

/// The event's name, and what else there is to say.
fn words(what: Option<&What>) -> (&'static str, String) {
    let process = |id: u64, name: &str| match given_name(name) {
        "" => format!("process {id}"),
        name => format!("process {id} ({name})"),
    };
    match what {
        Some(What::Started(started)) => (
            "started",
            format!(
                "{}, pid {}",
                process(started.id, &started.name),
                started.pid
            ),
        ),
        Some(What::Ended(ended)) => {
            let status = ended.end.as_ref().map(status_of_end);
            let status = status.map_or_else(String::new, |status| format!(", status {status}"));
            ("ended", process(ended.id, &ended.name) + &status)
        }
        Some(What::OutOfMemory(killed)) if killed.id == 0 => ("out of memory", String::new()),
        Some(What::OutOfMemory(killed)) => ("out of memory", process(killed.id, &killed.name)),
        Some(What::WatchOverflow(watch)) => ("watch overflow", format!("watch {}", watch.watch)),
        Some(What::WorkerReplaced(replaced)) => ("worker replaced", replaced.reason.clone()),
        Some(What::ClockSet(set)) => {
            let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
            let by = seconds(set.after_unix_ns) - seconds(set.before_unix_ns);
            ("clock set", format!("by {by:+.3} s"))
        }
        Some(What::Frozen(_)) => ("frozen", String::new()),
        Some(What::Thawed(_)) => ("thawed", String::new()),
        Some(What::Adopted(to)) => (
            "adopted",
            format!("as {}, generation {}", to.sandbox, to.generation),
        ),
        Some(What::Missing(count)) => ("missing", format!("{count} events are forgotten")),
        None => ("unknown", String::new()),
    }
}

fn document(id: &str, called: &str, event: &v1::Event) -> Value {
    let (word, _) = words(event.what.as_ref());
    let mut document = json!({
        "sandbox": id,
        "name": called,
        "sequence": event.sequence,
        "boottime_ns": event.boottime_ns,
        "unix_ns": event.unix_ns,
        "event": word.replace(' ', "_"),
    });
    let more = match &event.what {
        Some(What::Started(started)) => {
            json!({"process": started.id, "process_name": given_name(&started.name), "pid": started.pid})
        }
        Some(What::Ended(ended)) => json!({
            "process": ended.id,
            "process_name": given_name(&ended.name),
            "status": ended.end.as_ref().map(status_of_end),
            "out_of_memory": ended.end.as_ref().is_some_and(|end| {
                matches!(end.how, Some(v1::end::How::OutOfMemory(_)))
            }),
        }),
        Some(What::OutOfMemory(killed)) => {
            json!({"process": killed.id, "process_name": given_name(&killed.name)})
        }
        Some(What::WatchOverflow(watch)) => json!({"watch": watch.watch.to_string()}),
        Some(What::WorkerReplaced(replaced)) => json!({"reason": replaced.reason}),
        Some(What::ClockSet(set)) => {
            json!({"before_unix_ns": set.before_unix_ns, "after_unix_ns": set.after_unix_ns})
        }
        Some(What::Adopted(to)) => json!({
            "sandbox": to.sandbox, "lineage": to.lineage, "generation": to.generation.to_string(),
        }),
        Some(What::Missing(count)) => json!({"missing": count}),
        Some(What::Frozen(_) | What::Thawed(_)) | None => json!({}),
    };
    if let (Some(fields), Value::Object(more)) = (document.as_object_mut(), more) {
        fields.extend(more);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_fit_for_a_terminal() {
        let event = v1::Event {
            sequence: 7,
            boottime_ns: 1_500_000_000,
            unix_ns: 0,
            what: Some(What::Started(v1::ProcessStarted {
                id: 3,
                name: "a\x1bb".to_owned(),
                pid: 99,
            })),
        };
        let text = line("box", &event);
        assert!(
            text.contains("1.500s  box  started") && text.contains("a\\u{1b}b"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
        assert_eq!(document("id", "box", &event)["pid"], 99);
    }
}
