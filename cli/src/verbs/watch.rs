//! `belljar watch`.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use belljar_node::v1::{self, watch_event::What};
use belljar_node::watch::{Cursor, WatchSpec, Watcher};
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output::{self, Format, OutputOption, not_text};
use crate::report;
use crate::values;

/// Tell what happens to files of a sandbox
///
/// One line for each event, until Ctrl-C or until the path is gone. Nothing is lost silently: 'overflow'
/// says that events are missing, and that the tree is to be looked at anew.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar watch box /srv/app -r              a whole tree, directories made later included
  belljar watch box /etc/hosts               one file
  belljar watch box /srv -r | jq .           JSON when piped, as with -o json
  belljar watch box /srv -r --from 42:17     go on after a break: watch 42 from event 17 on; both
                                             stand in every JSON document

Events: created, changed (when a file is closed after writing, and once a second meanwhile), attributes,
moved, removed, overflow, gone.")]
pub(crate) struct Args {
    #[command(flatten)]
    sandbox: BoxArg,

    /// Directory or file in the sandbox
    path: OsString,

    /// All directories below, too
    #[arg(short, long)]
    recursive: bool,

    #[command(flatten)]
    output: OutputOption,

    /// The same as -o json: one document for each event
    #[arg(long, conflicts_with = "output")]
    json: bool,

    /// Go on with an earlier watch of the same path, from an event on
    #[arg(long, value_name = "WATCH:EVENT", value_parser = cursor)]
    from: Option<Cursor>,

    /// How long the sandbox keeps events that nobody reads, for --from
    #[arg(long, value_name = "TIME", value_parser = values::time, default_value = "60s")]
    keep: Duration,

    /// Whose rights count: directories that this user may not read are left out
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

fn cursor(text: &str) -> Result<Cursor, String> {
    let parsed = || {
        let (id, next) = text.split_once(':')?;
        Some(Cursor {
            id: id.parse().ok().filter(|id| *id != 0)?,
            next: next.parse().ok()?,
        })
    };
    parsed().ok_or_else(|| "write WATCH:EVENT, two numbers of an earlier JSON document".to_owned())
}

/// Returns the exit status.
pub(crate) fn watch(args: &Args) -> u8 {
    status_of(follow(args))
}

fn follow(args: &Args) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let spec = WatchSpec {
        path: args.path.as_bytes().to_vec(),
        user: args.user.clone().unwrap_or_default(),
        recursive: args.recursive,
        keep: args.keep,
    };
    let mut watcher = match args.from {
        Some(cursor) => Watcher::resume(found, spec, cursor)?,
        None => Watcher::start(found, spec)?,
    };
    if std::io::stderr().is_terminal() {
        let count = watcher.directories();
        report::print(&format!("Watching {count} directories; Ctrl-C ends.\n"));
    }
    let format = if args.json {
        Format::Json
    } else {
        args.output.format()
    };
    while let Some(event) = watcher.next_event()? {
        let text = match format {
            Format::Json => format!("{}\n", document(&event, watcher.cursor().id)),
            Format::Table => line(&event),
        };
        if !output::print_on(&text) {
            watcher.end();
            return Ok(0);
        }
    }
    report::failure("what was watched is gone", None);
    Ok(0)
}

/// (event, path, second path or reason)
fn parts(what: Option<&What>) -> (&'static str, &[u8], Option<&[u8]>) {
    match what {
        Some(What::Created(path)) => ("created", path, None),
        Some(What::Changed(path)) => ("changed", path, None),
        Some(What::Attributes(path)) => ("attributes", path, None),
        Some(What::Removed(path)) => ("removed", path, None),
        Some(What::Moved(moved)) => ("moved", &moved.from, Some(&moved.to)),
        Some(What::Overflow(why)) => ("overflow", b"", Some(why.reason.as_bytes())),
        Some(What::Gone(why)) => ("gone", b"", Some(why.reason.as_bytes())),
        None => ("unknown", b"", None),
    }
}

fn line(event: &v1::WatchEvent) -> String {
    let (word, path, more) = parts(event.what.as_ref());
    let slash = if event.is_directory { "/" } else { "" };
    let path = match path {
        b"" if matches!(word, "overflow" | "gone") => String::new(),
        b"" => ".".to_owned(),
        path => output::escaped_bytes(path),
    };
    let more = more.map(output::escaped_bytes);
    match (word, more) {
        ("moved", Some(to)) => format!("{word:<10}  {path}{slash} -> {to}{slash}\n"),
        (_, Some(why)) => format!("{word:<10}  {why}\n"),
        (_, None) => format!("{word:<10}  {path}{slash}\n"),
    }
}

fn document(event: &v1::WatchEvent, watch: u64) -> Value {
    let (word, path, more) = parts(event.what.as_ref());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut document = json!({
        "watch": watch.to_string(),
        "sequence": event.sequence,
        "event": word,
    });
    let mut set = |key: &str, value: Value| {
        if let Some(fields) = document.as_object_mut() {
            fields.insert(key.to_owned(), value);
        }
    };
    match (word, more) {
        ("overflow" | "gone", Some(why)) => set("reason", text(why).into()),
        (_, more) => {
            let names = [("path", Some(path)), ("to", more)];
            for (key, name) in names.into_iter().filter_map(|(key, it)| Some((key, it?))) {
                set(key, text(name).into());
                if let Some(bytes) = not_text(name) {
                    set(&format!("{key}_bytes"), bytes.into());
                }
            }
            set("directory", event.is_directory.into());
        }
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: What, is_directory: bool) -> v1::WatchEvent {
        v1::WatchEvent {
            sequence: 3,
            what: Some(what),
            is_directory,
        }
    }

    #[test]
    fn events_are_lines_fit_for_a_terminal() {
        let moved = v1::Moved {
            from: b"a\x1b[2J".to_vec(),
            to: b"b".to_vec(),
        };
        assert_eq!(
            line(&event(What::Moved(moved.clone()), true)),
            "moved       a\\u{1b}[2J/ -> b/\n"
        );
        assert_eq!(
            line(&event(What::Changed(Vec::new()), false)),
            "changed     .\n"
        );
        let document = document(&event(What::Moved(moved), true), u64::MAX);
        assert_eq!(document["to"], "b");
        assert_eq!(document["watch"], "18446744073709551615");
        assert_eq!(document["path_bytes"], Value::Null);
    }

    #[test]
    fn names_that_are_no_text_come_as_bytes_too() {
        let moved = v1::Moved {
            from: b"a\xff".to_vec(),
            to: b"\xfe".to_vec(),
        };
        let document = document(&event(What::Moved(moved), false), 1);
        assert_eq!(document["path"], "a\u{fffd}");
        assert_eq!(document["path_bytes"], json!([97, 255]));
        assert_eq!(document["to_bytes"], json!([254]));
    }

    #[test]
    fn a_cursor_has_two_numbers() {
        assert_eq!(cursor("42:7"), Ok(Cursor { id: 42, next: 7 }));
        for text in ["", "42", "0:1", ":", "a:b", "1:2:3"] {
            assert!(cursor(text).is_err(), "{text}");
        }
    }
}
