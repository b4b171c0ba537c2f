//! Samples as JSON lines, and the table of their medians.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::counters::Counts;
use crate::failure::{Attempt, Result};
use crate::stats::{Summary, summarise};

/// Of the JSON lines; goes up when a field changes its meaning.
const SCHEMA: u32 = 1;

/// One measure's samples of one run.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    /// Dotted, the group first.
    pub(crate) measure: String,
    /// `ms`, `us`, `MiB/s` or `KiB`.
    pub(crate) unit: &'static str,
    pub(crate) values: Vec<f64>,
    /// What was counted meanwhile, and over how many operations.
    pub(crate) counts: Option<(Counts, u64)>,
}

impl Samples {
    pub(crate) fn one(measure: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self {
            measure: measure.into(),
            unit,
            values: vec![value],
            counts: None,
        }
    }

    pub(crate) fn counted(mut self, counts: Counts, operations: u64) -> Self {
        self.counts = Some((counts, operations));
        self
    }
}

/// Everything of one measure of one VMM.
#[derive(Default)]
struct Row {
    values: Vec<f64>,
    counts: Counts,
    operations: u64,
    /// Of the counting runs, whose times do not count.
    system_calls: u64,
    traced_operations: u64,
}

/// Takes samples as they come, writes them down at once, and makes the table at the end.
pub(crate) struct Report {
    lines: Option<File>,
    vmms: Vec<String>,
    /// Measures in the order of their first samples.
    order: Vec<(String, &'static str)>,
    rows: BTreeMap<(String, String), Row>,
}

impl Report {
    /// `vmms`: names, in the order of the table's columns; ratios are to the first.
    pub(crate) fn new(path: Option<&Path>, vmms: Vec<String>) -> Result<Self> {
        let create =
            |path: &Path| File::create(path).attempt(format!("cannot make {}", path.display()));
        Ok(Self {
            lines: path.map(create).transpose()?,
            vmms,
            order: Vec::new(),
            rows: BTreeMap::new(),
        })
    }

    /// Writes one line: `schema` and `kind` are added to the fields.
    pub(crate) fn line(&mut self, kind: &str, mut fields: Value) -> Result<()> {
        let Some(file) = &mut self.lines else {
            return Ok(());
        };
        if let Some(fields) = fields.as_object_mut() {
            fields.insert("schema".into(), SCHEMA.into());
            fields.insert("kind".into(), kind.into());
        }
        writeln!(file, "{fields}").attempt("cannot write the results")
    }

    /// `traced`: system calls were counted, which takes time of its own.
    pub(crate) fn add(
        &mut self,
        vmm: &str,
        run: u32,
        traced: bool,
        samples: &Samples,
    ) -> Result<()> {
        let counted = samples.counts.as_ref();
        self.line(
            "samples",
            json!({
                "vmm": vmm, "measure": samples.measure, "unit": samples.unit, "run": run,
                "pass": if traced { "count" } else { "time" }, "values": samples.values,
                "operations": counted.map(|(_, operations)| operations),
                "counts": counted.map(|(counts, _)| &counts.0),
            }),
        )?;
        if !self.order.iter().any(|(name, _)| *name == samples.measure) {
            self.order.push((samples.measure.clone(), samples.unit));
        }
        let row = self
            .rows
            .entry((samples.measure.clone(), vmm.to_owned()))
            .or_default();
        if traced {
            if let Some((counts, operations)) = counted {
                let calls = counts.0.get("system_calls").copied().unwrap_or(0);
                row.system_calls = row.system_calls.saturating_add(calls);
                row.traced_operations = row.traced_operations.saturating_add(*operations);
            }
            return Ok(());
        }
        row.values.extend(&samples.values);
        if let Some((counts, operations)) = counted {
            row.counts.add(counts);
            row.operations = row.operations.saturating_add(*operations);
        }
        Ok(())
    }

    /// Writes the summaries down and returns them as a table.
    pub(crate) fn finish(&mut self) -> Result<String> {
        let mut table = String::new();
        let _ = writeln!(
            table,
            "{:<30} {:<12} {:>10} {:>10} {:>10} {:>10} {:>5} {:>6}  per operation: {}",
            "measure",
            "vmm",
            "p50",
            "p90",
            "min",
            "max",
            "n",
            "ratio",
            COLUMNS.map(|(_, head)| head).join(" ")
        );
        for (measure, unit) in self.order.clone() {
            let mut first = None;
            for vmm in self.vmms.clone() {
                let Some(row) = self.rows.get(&(measure.clone(), vmm.clone())) else {
                    continue;
                };
                let Some(summary) = summarise(&row.values) else {
                    continue;
                };
                let counts = per_operation(row);
                // How the first VMM compares to this one: below 1 is less time or memory.
                let ratio = first.map(|first: f64| first / summary.p50);
                first = first.or(Some(summary.p50));
                let _ = writeln!(
                    table,
                    "{}",
                    text_row(&measure, unit, &vmm, &summary, ratio, &counts)
                );
                self.line(
                    "summary",
                    json!({
                        "vmm": vmm, "measure": measure, "unit": unit, "n": summary.n, "p50": summary.p50,
                        "p90": summary.p90, "min": summary.min, "max": summary.max, "ratio": ratio,
                        "per_operation": counts,
                    }),
                )?;
            }
        }
        Ok(table)
    }
}

/// Counts that the table shows.
const COLUMNS: [(&str, &str); 4] = [
    ("exits", "exits"),
    ("injections", "inj"),
    ("system_calls", "sysc"),
    ("context_switches", "csw"),
];

fn per_operation(row: &Row) -> BTreeMap<&'static str, f64> {
    let mut counts = BTreeMap::new();
    if row.operations > 0 {
        for (name, count) in &row.counts.0 {
            counts.insert(*name, *count as f64 / row.operations as f64);
        }
    }
    if row.traced_operations > 0 {
        counts.insert(
            "system_calls",
            row.system_calls as f64 / row.traced_operations as f64,
        );
    }
    counts
}

fn text_row(
    measure: &str,
    unit: &str,
    vmm: &str,
    summary: &Summary,
    ratio: Option<f64>,
    counts: &BTreeMap<&'static str, f64>,
) -> String {
    let name = format!("{measure} {unit}");
    let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
    let counts = COLUMNS.map(|(name, _)| match counts.get(name) {
        Some(count) => format!("{count:.1}"),
        None => "-".to_owned(),
    });
    let Summary {
        n,
        min,
        p50,
        p90,
        max,
        ..
    } = summary;
    format!(
        "{name:<30} {vmm:<12} {p50:>10.2} {p90:>10.2} {min:>10.2} {max:>10.2} {n:>5} {ratio:>6}  {}",
        counts.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_compare_the_first_with_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        let mut report = Report::new(Some(&path), vec!["ours".into(), "theirs".into()]).unwrap();
        let counts = Counts([("exits", 10), ("system_calls", 50)].into());
        let samples = |value| Samples::one("echo.connect", "us", value).counted(counts.clone(), 10);
        report.add("theirs", 0, false, &samples(4.0)).unwrap();
        report.add("ours", 0, false, &samples(2.0)).unwrap();
        report.add("ours", 1, true, &samples(1000.0)).unwrap();
        let table = report.finish().unwrap();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            rows,
            [
                vec![
                    "echo.connect",
                    "us",
                    "ours",
                    "2.00",
                    "2.00",
                    "2.00",
                    "2.00",
                    "1",
                    "1.0",
                    "-",
                    "5.0",
                    "-"
                ],
                vec![
                    "echo.connect",
                    "us",
                    "theirs",
                    "4.00",
                    "4.00",
                    "4.00",
                    "4.00",
                    "1",
                    "0.50",
                    "1.0",
                    "-",
                    "5.0",
                    "-"
                ],
            ]
        );
        let lines = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = lines
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(lines.len(), 5);
        assert_eq!(lines[4]["ratio"], 0.5);
        assert!(lines.iter().all(|line| line["schema"] == SCHEMA));
    }
}
