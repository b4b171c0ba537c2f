//! What verbs print on standard output: a table for people, JSON for programs.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _, stdout};
use std::time::Duration;

use belljar_node::state::spec::now_ms;
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

/// The option of verbs that print things.
#[derive(Debug, Args)]
pub(crate) struct OutputOption {
    /// A table on a terminal, JSON when piped, unless said here
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,
}

impl OutputOption {
    /// What was asked for, or what fits where it goes.
    pub(crate) fn format(&self) -> Format {
        self.output.unwrap_or_else(|| {
            if stdout().is_terminal() {
                Format::Table
            } else {
                Format::Json
            }
        })
    }
}

/// A time as programs read it.
pub(crate) fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A short time as people read it: "1.4 ms".
pub(crate) fn ms(time: std::time::Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// Whether standard output takes colour.
pub(crate) fn has_colour() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !unwanted && stdout().is_terminal()
}

/// Prints on standard output. Nobody to tell if that is closed; the status still counts.
pub(crate) fn print(text: &str) {
    let _ = stdout().write_all(text.as_bytes());
}

/// Prints on standard output. False: nobody reads it any more.
pub(crate) fn print_on(text: &str) -> bool {
    let mut out = stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .is_ok()
}

/// Prints one document, readable on a terminal.
pub(crate) fn print_json(document: &impl Serialize) {
    let text = if stdout().is_terminal() {
        serde_json::to_string_pretty(document)
    } else {
        serde_json::to_string(document)
    };
    if let Ok(text) = text {
        print(&(text + "\n"));
    }
}

/// The bytes of what is no UTF-8; JSON has text only.
pub(crate) fn not_text(bytes: &[u8]) -> Option<&[u8]> {
    std::str::from_utf8(bytes).is_err().then_some(bytes)
}

/// A document with the fields of another one added.
pub(crate) fn joined(mut document: Value, more: Value) -> Value {
    if let (Value::Object(fields), Value::Object(more)) = (&mut document, more) {
        fields.extend(more);
    }
    document
}

/// Lines of cells under titles, each column as wide as it must be.
#[derive(Debug)]
pub(crate) struct Table {
    titles: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

/// Widest cell, in characters; the last column is never cut.
const CELL_MAX: usize = 60;

impl Table {
    pub(crate) fn new(titles: &[&'static str]) -> Self {
        Self {
            titles: titles.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Cells are escaped here, so that nothing a guest or a stranger chose reaches the terminal as it is.
    pub(crate) fn row(&mut self, cells: &[&str]) {
        let cells = cells.iter().map(|cell| escaped(cell).into_owned());
        self.rows.push(cells.collect());
    }

    /// The whole table; numbers, with their units, stand to the right.
    pub(crate) fn render(&self) -> String {
        let cell = |row: &Vec<String>, column: usize| -> String {
            let text = row.get(column).map_or("", String::as_str);
            let last = column.saturating_add(1) >= self.titles.len();
            if last || text.chars().count() <= CELL_MAX {
                return text.to_owned();
            }
            let cut: String = text.chars().take(CELL_MAX.saturating_sub(1)).collect();
            cut + "…"
        };
        let columns: Vec<(usize, bool)> = self
            .titles
            .iter()
            .enumerate()
            .map(|(column, title)| {
                let cells: Vec<String> = self.rows.iter().map(|row| cell(row, column)).collect();
                let width = cells.iter().map(|text| text.chars().count()).max();
                let numeric = cells.iter().any(|text| text != "-")
                    && cells.iter().all(|text| text == "-" || is_quantity(text));
                (width.unwrap_or(0).max(title.chars().count()), numeric)
            })
            .collect();
        let mut text = String::new();
        let titles = self
            .titles
            .iter()
            .map(|title| (*title).to_owned())
            .collect();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for (column, (width, right)) in columns.iter().enumerate() {
                let text = cell(row, column);
                let _ = if *right {
                    write!(line, "{text:>width$}  ")
                } else {
                    write!(line, "{text:<width$}  ")
                };
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

/// Numbers, perhaps with units: `5`, `1.5M`, `30%`, `2m 5s`. An id such as `81915d84` is none.
fn is_quantity(text: &str) -> bool {
    text.split([' ', '/']).all(|part| {
        let unit = part.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let is_short = unit.chars().count() <= 3 && !unit.contains(|c: char| c.is_ascii_digit());
        part.is_empty() || (unit.len() < part.len() && is_short)
    })
}

/// Fit for a terminal: control characters, escape sequences and what turns the direction of writing
/// included, are written as in Rust (`\n`, `\u{1b}`).
pub(crate) fn escaped(text: &str) -> Cow<'_, str> {
    let harmful = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
    };
    if !text.contains(harmful) {
        return Cow::Borrowed(text);
    }
    let mut fit = String::with_capacity(text.len());
    for c in text.chars() {
        if harmful(c) {
            fit.extend(c.escape_default());
        } else {
            fit.push(c);
        }
    }
    Cow::Owned(fit)
}

/// Bytes that are a name or a path, fit for a terminal; what is not UTF-8 is written `\xNN`.
pub(crate) fn escaped_bytes(bytes: &[u8]) -> String {
    let mut fit = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        fit.push_str(&escaped(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(fit, "\\x{byte:02x}");
        }
    }
    fit
}

/// A log, fit for a terminal: lines stay lines, and tabs stay tabs.
pub(crate) fn printable_lines(bytes: &[u8]) -> String {
    let mut fit = String::with_capacity(bytes.len());
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let (text, end) = match line.strip_suffix(b"\n") {
            Some(text) => (text.strip_suffix(b"\r").unwrap_or(text), "\n"),
            None => (line, ""),
        };
        for (index, cell) in text.split(|byte| *byte == b'\t').enumerate() {
            if index > 0 {
                fit.push('\t');
            }
            fit.push_str(&escaped_bytes(cell));
        }
        fit.push_str(end);
    }
    fit
}

/// Bytes for people: `512`, `1.5K`, `256M`.
pub(crate) fn size(bytes: u64) -> String {
    let mut shift = 0;
    let mut unit = "";
    for (next, name) in [(10, "K"), (20, "M"), (30, "G"), (40, "T"), (50, "P")] {
        if bytes >> next == 0 {
            break;
        }
        (shift, unit) = (next, name);
    }
    let whole = bytes >> shift;
    let tenth = if shift == 0 {
        0
    } else {
        ((bytes >> (shift - 10)) & 1023) * 10 / 1024
    };
    if tenth == 0 || whole >= 100 {
        format!("{whole}{unit}")
    } else {
        format!("{whole}.{tenth}{unit}")
    }
}

/// A time for people: `0.4s`, `12s`, `5m`, `3h`, `2d`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1}s", time.as_secs_f64()),
        10..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// How long ago a moment was, in milliseconds since 1970; `-` if it is not known.
pub(crate) fn age(at_ms: u64) -> String {
    if at_ms == 0 {
        return "-".to_owned();
    }
    duration(Duration::from_millis(now_ms().saturating_sub(at_ms)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let mut table = Table::new(&["NAME", "MEMORY", "WHY"]);
        table.row(&["a", "256M", "x"]);
        table.row(&["long-name", "1.5G", ""]);
        assert_eq!(
            table.render(),
            "NAME       MEMORY  WHY\na            256M  x\nlong-name    1.5G\n"
        );
        assert_eq!(Table::new(&["A", "B"]).render(), "A  B\n");
        // Ids are no numbers, even if all of them begin with digits.
        let mut table = Table::new(&["ID", "AGE"]);
        table.row(&["77c57b1e", "2.7s"]);
        table.row(&["81915d84", "2m 5s"]);
        assert!(table.render().starts_with("ID        "));
    }

    #[test]
    fn nothing_reaches_the_terminal_as_it_is() {
        let mut table = Table::new(&["NAME"]);
        table.row(&["a\x1b[2J\n\u{202e}b"]);
        assert_eq!(table.render(), "NAME\na\\u{1b}[2J\\n\\u{202e}b\n");
        assert_eq!(printable_lines(b"a\tb\r\n\x1b[m\nc"), "a\tb\n\\u{1b}[m\nc");
        assert_eq!(escaped_bytes(b"a\xff\x07\xc3\xa4"), "a\\xff\\u{7}ä");
    }

    #[test]
    fn sizes_and_times_are_short() {
        let sizes = [0, 1023, 1024, 1536, 256 << 20, 3 << 29, 1 << 40].map(size);
        assert_eq!(sizes, ["0", "1023", "1K", "1.5K", "256M", "1.5G", "1T"]);
        let times = [0, 90, 600, 7200, 400_000].map(|s| duration(Duration::from_secs(s)));
        assert_eq!(times, ["0.0s", "90s", "10m", "2h", "4d"]);
        assert_eq!(size(u64::MAX), "16383P");
        assert_eq!(age(0), "-");
    }
}
