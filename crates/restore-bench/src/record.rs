//! What one restored guest showed, as a line of JSON and in summaries. docs/restore-benchmark.md describes the fields.

use serde_json::{Value, json};

use crate::settings::{Case, Way};
use crate::stats::{Summary, summarise};

/// Of the JSON lines; goes up when a field changes its meaning.
pub const SCHEMA: u32 = 2;

/// Microseconds. All but the first two begin with the call that restores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// Start of the process → its API answers.
    pub process_us: f64,
    /// `/prepare`; before the clock starts.
    pub prepare_us: Option<f64>,
    /// → the call is answered: the vCPUs run.
    pub running_us: f64,
    /// → the agent answers; `None`: there is none.
    pub ready_us: Option<f64>,
    /// → the first valid result.
    pub result_us: f64,
    /// From then on: writing to the working set.
    pub faults_us: f64,
}

/// Memory of a VMM and its guest after that, KiB (`/proc/PID/smaps_rollup`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Its own and its share of what it shares.
    pub pss_kib: u64,
    /// Its own alone.
    pub private_kib: u64,
}

/// One restored guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Iteration {
    pub vmm: String,
    pub way: Way,
    pub case: Case,
    pub round: u32,
    /// Which of those that were restored at the same time.
    pub clone: u32,
    pub times: Times,
    pub memory: Memory,
    /// What of the memory file was in the page cache before; `None`: the file system cannot tell.
    pub cached_share: Option<f64>,
    /// Whether its filled RAM was hashed, too; of many clones not all are.
    pub hashed: bool,
}

/// What can be summarised and drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Process,
    Running,
    Ready,
    Result,
    Faults,
    /// Process start, restore and result.
    All,
    Pss,
    Private,
}

impl Measure {
    pub const ALL: [Self; 8] = [
        Self::Process,
        Self::Running,
        Self::Ready,
        Self::Result,
        Self::Faults,
        Self::All,
        Self::Pss,
        Self::Private,
    ];

    /// Its name in JSON lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process_us",
            Self::Running => "running_us",
            Self::Ready => "ready_us",
            Self::Result => "result_us",
            Self::Faults => "faults_us",
            Self::All => "process_and_result_us",
            Self::Pss => "pss_kib",
            Self::Private => "private_kib",
        }
    }

    /// `None`: it has none.
    #[must_use]
    pub fn of(self, iteration: &Iteration) -> Option<f64> {
        let times = &iteration.times;
        Some(match self {
            Self::Process => times.process_us,
            Self::Running => times.running_us,
            Self::Ready => times.ready_us?,
            Self::Result => times.result_us,
            Self::Faults => times.faults_us,
            Self::All => times.process_us + times.result_us,
            Self::Pss => iteration.memory.pss_kib as f64,
            Self::Private => iteration.memory.private_kib as f64,
        })
    }
}

fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// A line of some kind, with the schema.
#[must_use]
pub fn line(kind: &str, mut fields: Value) -> Value {
    if let Some(fields) = fields.as_object_mut() {
        fields.insert("schema".into(), SCHEMA.into());
        fields.insert("kind".into(), kind.into());
    }
    fields
}

fn setting(vmm: &str, way: Way, case: Case) -> Value {
    json!({
        "vmm": vmm, "cache": way.cache.name(), "prepared": way.prepared.name(), "recorded": way.recorded,
        "memory_mib": case.memory_mib, "working_set_mib": case.working_set_mib, "clones": case.clones,
    })
}

fn with(mut document: Value, more: Value) -> Value {
    if let (Some(into), Value::Object(more)) = (document.as_object_mut(), more) {
        into.extend(more);
    }
    document
}

impl Iteration {
    /// As a JSON line.
    #[must_use]
    pub fn line(&self) -> Value {
        let times = &self.times;
        let fields = with(
            setting(&self.vmm, self.way, self.case),
            json!({
                "round": self.round, "clone": self.clone,
                "process_us": rounded(times.process_us), "prepare_us": times.prepare_us.map(rounded),
                "running_us": rounded(times.running_us), "ready_us": times.ready_us.map(rounded),
                "result_us": rounded(times.result_us), "faults_us": rounded(times.faults_us),
                "pss_kib": self.memory.pss_kib, "private_kib": self.memory.private_kib,
                "cached_share": self.cached_share, "hashed": self.hashed,
            }),
        );
        line("iteration", fields)
    }
}

/// All iterations of the same kind.
#[derive(Clone, Debug)]
pub struct Series {
    pub vmm: String,
    pub way: Way,
    pub case: Case,
    iterations: Vec<Iteration>,
}

impl Series {
    /// Groups iterations, in the order in which they came.
    #[must_use]
    pub fn of(iterations: &[Iteration]) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for iteration in iterations {
            let found = all.iter_mut().find(|series| {
                series.vmm == iteration.vmm
                    && series.way == iteration.way
                    && series.case == iteration.case
            });
            if let Some(series) = found {
                series.iterations.push(iteration.clone());
            } else {
                all.push(Self {
                    vmm: iteration.vmm.clone(),
                    way: iteration.way,
                    case: iteration.case,
                    iterations: vec![iteration.clone()],
                });
            }
        }
        all
    }

    /// `belljar, hot, prepared`
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}, {}", self.vmm, self.way.name())
    }

    #[must_use]
    pub fn values(&self, measure: Measure) -> Vec<f64> {
        let iterations = self.iterations.iter();
        iterations.filter_map(|each| measure.of(each)).collect()
    }

    /// `None`: it was not measured.
    #[must_use]
    pub fn summary(&self, measure: Measure) -> Option<Summary> {
        summarise(&self.values(measure))
    }

    /// The median of how much of the memory file was in the page cache.
    #[must_use]
    pub fn cached_share(&self) -> Option<f64> {
        let shares = self.iterations.iter().filter_map(|each| each.cached_share);
        summarise(&shares.collect::<Vec<_>>()).map(|summary| summary.p50)
    }

    /// As JSON lines, one for each measure.
    #[must_use]
    pub fn lines(&self) -> Vec<Value> {
        let measured = Measure::ALL
            .into_iter()
            .filter_map(|measure| Some((measure, self.summary(measure)?)));
        measured
            .map(|(measure, summary)| {
                let fields = json!({
                    "measure": measure.name(), "n": summary.n, "min": rounded(summary.min),
                    "p50": rounded(summary.p50), "p90": rounded(summary.p90), "p99": rounded(summary.p99),
                    "max": rounded(summary.max),
                });
                line(
                    "summary",
                    with(setting(&self.vmm, self.way, self.case), fields),
                )
            })
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::settings::{Ahead, Cache};

    pub(crate) fn iteration(
        vmm: &str,
        prepared: bool,
        memory_mib: u64,
        result_us: f64,
    ) -> Iteration {
        Iteration {
            vmm: vmm.to_owned(),
            way: Way {
                cache: Cache::Hot,
                prepared: if prepared { Ahead::Vm } else { Ahead::Nothing },
                recorded: false,
            },
            case: Case {
                memory_mib,
                working_set_mib: 1,
                clones: 1,
            },
            round: 0,
            clone: 0,
            times: Times {
                process_us: 900.0,
                prepare_us: prepared.then_some(400.0),
                running_us: result_us / 4.0,
                ready_us: Some(result_us / 2.0),
                result_us,
                faults_us: 5000.0,
            },
            memory: Memory {
                pss_kib: 4000,
                private_kib: 3000,
            },
            cached_share: Some(1.0),
            hashed: true,
        }
    }

    #[test]
    fn a_line_has_all_fields_with_their_units() {
        let document = iteration("belljar", true, 256, 6000.04).line();
        for field in [
            "schema",
            "kind",
            "vmm",
            "cache",
            "prepared",
            "recorded",
            "memory_mib",
            "working_set_mib",
            "clones",
            "round",
            "clone",
            "process_us",
            "prepare_us",
            "running_us",
            "ready_us",
            "result_us",
            "faults_us",
            "pss_kib",
            "private_kib",
            "cached_share",
            "hashed",
        ] {
            assert!(!document[field].is_null(), "{field}");
        }
        assert_eq!(document["result_us"], 6000.0);
        assert_eq!(document["kind"], "iteration");
    }

    #[test]
    fn series_are_what_has_the_same_settings() {
        let all = [
            iteration("belljar", false, 256, 6000.0),
            iteration("peer", false, 256, 9000.0),
            iteration("belljar", false, 256, 4000.0),
            iteration("belljar", true, 256, 3000.0),
            iteration("belljar", false, 512, 3000.0),
        ];
        let series = Series::of(&all);
        let labels: Vec<_> = series
            .iter()
            .map(|series| (series.label(), series.values(Measure::Result).len()))
            .collect();
        assert_eq!(
            labels,
            [
                ("belljar, hot".to_owned(), 2),
                ("peer, hot".to_owned(), 1),
                ("belljar, hot, VM ahead".to_owned(), 1),
                ("belljar, hot".to_owned(), 1)
            ]
        );
        let lines = series[0].lines();
        let result = lines.iter().find(|line| line["measure"] == "result_us");
        let result = result.unwrap();
        assert_eq!(
            (&result["p50"], &result["max"]),
            (&json!(4000.0), &json!(6000.0))
        );
    }
}
