//! What the host sees of a guest that does not answer, and what that means. Asks nothing of the guest that
//! could hang: each question has its own short limit.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use belljar_protocol::client;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::accounting;
use crate::bounded_log::last_lines;
use crate::registry::{Found, State};
use crate::state::{self, ProcessRecord};
use crate::vmm;

/// How long the threads of the VMM are watched.
const WATCH: Duration = Duration::from_millis(200);
/// An agent that is well answers within this time, even on a machine that does other things.
const PING_LIMIT: Duration = Duration::from_secs(3);
/// The API has a thread of its own.
const API_LIMIT: Duration = Duration::from_secs(2);
/// Lines quoted of each log.
const LINES: usize = 10;
/// A vCPU that runs more than this part of the time is busy, one that runs less than [`IDLE`] sleeps.
const BUSY: f64 = 0.8;
const IDLE: f64 = 0.05;

/// What there is to see.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Symptoms {
    pub state: State,
    pub reason: String,
    /// `None`: no VMM runs.
    pub vmm: Option<VmmSymptoms>,
    /// The guest's console, the last lines, fit for a terminal.
    pub console: Vec<String>,
    /// What the VMM said last.
    pub log: Vec<String>,
}

/// What there is to see of a VMM that runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmmSymptoms {
    pub pid: u32,
    /// Milliseconds that its API took, or why it does not answer.
    #[serde(serialize_with = "answer")]
    pub api: Result<f64, String>,
    /// Milliseconds that the agent took, or why it does not answer.
    #[serde(serialize_with = "answer")]
    pub agent: Result<f64, String>,
    /// The agent answers, and says that all programs are stopped.
    pub frozen: bool,
    pub threads: Vec<ThreadSymptoms>,
}

/// `{"ms": 0.4}` or `{"error": "…"}`.
fn answer<S: Serializer>(answer: &Result<f64, String>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(1))?;
    match answer {
        Ok(millis) => map.serialize_entry("ms", millis)?,
        Err(error) => map.serialize_entry("error", error)?,
    }
    map.end()
}

/// A thread of the VMM, watched for a moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThreadSymptoms {
    pub name: String,
    /// As in `proc_pid_stat(5)`: `R` runs, `S` sleeps, `D` waits for the host's disk, `T` is stopped.
    pub state: char,
    /// Part of the time that it ran, 0 to 1.
    pub busy: f64,
    /// What the host's kernel waits for on its behalf; empty if that is not told.
    pub waits_in: String,
}

/// What is the matter, in a sentence, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    pub what: String,
    pub remedy: String,
}

/// Looks at a sandbox. Takes about as long as an agent takes to answer, at most some seconds.
#[must_use]
pub fn look(found: &Found) -> Symptoms {
    let state = found.state();
    let vmm = state.vmm().map(|vmm| look_at_vmm(found, vmm, &state));
    let tail = |name| {
        let text = read_tail(&found.dir().file(name));
        last_lines(&text, LINES)
    };
    Symptoms {
        reason: state.reason(),
        vmm,
        console: tail(state::CONSOLE_LOG),
        log: tail(state::VMM_LOG),
        state,
    }
}

fn look_at_vmm(found: &Found, vmm: ProcessRecord, state: &State) -> VmmSymptoms {
    let api = timed(|| {
        let mut api = found.api().map_err(|error| error.to_string())?;
        vmm::request(&mut api, "GET", "/", b"", Instant::now() + API_LIMIT)
            .map(drop)
            .map_err(|error| error.to_string())
    });
    let mut frozen = false;
    let agent = if matches!(state, State::Paused(_)) {
        Err("it is paused".to_owned())
    } else {
        timed(|| {
            let deadline = Instant::now() + PING_LIMIT;
            let stream = found.agent(deadline).map_err(|error| error.to_string())?;
            let (_, pong) =
                client::ping(stream, Some(deadline)).map_err(|error| error.to_string())?;
            frozen = pong.frozen;
            Ok(())
        })
    };
    VmmSymptoms {
        pid: vmm.pid,
        api,
        agent,
        frozen,
        threads: watch_threads(vmm),
    }
}

fn timed(ask: impl FnOnce() -> Result<(), String>) -> Result<f64, String> {
    let begin = Instant::now();
    ask().map(|()| begin.elapsed().as_secs_f64() * 1000.0)
}

fn watch_threads(vmm: ProcessRecord) -> Vec<ThreadSymptoms> {
    let before = accounting::threads(vmm);
    let begin = Instant::now();
    thread::sleep(WATCH);
    let watched = begin.elapsed().as_secs_f64();
    let after = accounting::threads(vmm);
    after
        .into_iter()
        .map(|thread| {
            let earlier = before.iter().find(|earlier| earlier.tid == thread.tid);
            let ran = thread
                .ran_us
                .saturating_sub(earlier.map_or(0, |earlier| earlier.ran_us));
            let task = format!("/proc/{}/task/{}", vmm.pid, thread.tid);
            ThreadSymptoms {
                name: thread.name,
                state: thread_state(Path::new(&task)),
                busy: (Duration::from_micros(ran).as_secs_f64() / watched).min(1.0),
                waits_in: waits_in(Path::new(&task)),
            }
        })
        .collect()
}

fn thread_state(task: &Path) -> char {
    fs::read_to_string(task.join("stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(')')?.1.trim_start().chars().next())
        .unwrap_or('?')
}

fn waits_in(task: &Path) -> String {
    let text = fs::read_to_string(task.join("wchan")).unwrap_or_default();
    let fit = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
    let name: String = text.chars().take_while(fit).take(40).collect();
    if name == "0" { String::new() } else { name }
}

/// The end of a log, which may just have been begun anew.
fn read_tail(path: &Path) -> Vec<u8> {
    let newest = fs::read(path).unwrap_or_default();
    if newest.len() > 2000 {
        return newest;
    }
    let mut text = fs::read(path.with_added_extension("1")).unwrap_or_default();
    text.extend(newest);
    text
}

impl Symptoms {
    /// Whether the guest does what it is there for, as far as the host can tell.
    #[must_use]
    pub fn is_well(&self) -> bool {
        let vmm = self.vmm.as_ref();
        vmm.is_some_and(|vmm| vmm.agent.is_ok() && !vmm.frozen)
    }

    /// Judges by what was seen.
    #[must_use]
    pub fn verdict(&self, id: &str) -> Verdict {
        let verdict = |what: &str, remedy: String| Verdict {
            what: what.to_owned(),
            remedy,
        };
        let Some(vmm) = &self.vmm else {
            let remedy = self.state.remedy(id);
            return verdict(
                &format!("no guest runs: it is {}", self.state.word()),
                remedy.unwrap_or_else(|| format!("'belljar start {id}' starts it")),
            );
        };
        if matches!(self.state, State::Orphaned(_)) {
            let remedy = format!("'belljar stop --force {id}' ends it");
            return verdict("its supervisor is gone", remedy);
        }
        if vmm.threads.iter().any(|thread| thread.state == 'T') {
            let remedy = format!("'kill -CONT {}' lets it go on", vmm.pid);
            return verdict("somebody has stopped the VMM with a signal", remedy);
        }
        if let Err(error) = &vmm.api {
            return verdict(
                &format!("the VMM itself does not answer ({error})"),
                format!(
                    "'belljar debug log --vmm {id}' may say why; 'belljar stop --force {id}' ends it"
                ),
            );
        }
        if matches!(self.state, State::Paused(_)) {
            let remedy = format!("'belljar resume {id}' lets it go on");
            return verdict("it is paused", remedy);
        }
        if vmm.agent.is_ok() && vmm.frozen {
            let remedy = format!("'belljar system thaw {id}' lets its programs go on");
            return verdict("its agent answers, but its programs are frozen", remedy);
        }
        if vmm.agent.is_ok() {
            return verdict(
                "the guest is well: its agent answers",
                format!(
                    "'belljar ps {id}' shows what runs in it, 'belljar top {id}' what that costs"
                ),
            );
        }
        self.judge_silent_agent(vmm, id)
    }

    fn judge_silent_agent(&self, vmm: &VmmSymptoms, id: &str) -> Verdict {
        let console = format!("'belljar console {id}' shows more and takes keys");
        let said = |text: &str| self.console.iter().rev().find(|line| line.contains(text));
        let (what, remedy) = if let Some(line) = said("Kernel panic") {
            (format!("the guest's kernel panicked: {line}"), console)
        } else if let Some(line) = said("Out of memory").or_else(|| said("oom-kill")) {
            (
                format!("the guest is out of memory: {line}"),
                "give it more with --memory; its agent is kept back some, so it may recover"
                    .to_owned(),
            )
        } else if let Some(line) = said("blocked for more than").or_else(|| said("soft lockup")) {
            (format!("the guest's kernel complains: {line}"), console)
        } else if vmm.threads.iter().any(|thread| thread.state == 'D') {
            (
                "the VMM waits for this machine's disk".to_owned(),
                "'dmesg' and 'iostat' on this machine tell more".to_owned(),
            )
        } else {
            let vcpus = || vmm.threads.iter().filter(|t| t.name.starts_with("vcpu"));
            if vcpus().all(|vcpu| vcpu.busy < IDLE) {
                (
                    "the agent is silent and the guest's processors sleep: the agent is dead, or waits for something that does not come".to_owned(),
                    console,
                )
            } else if vcpus().all(|vcpu| vcpu.busy > BUSY) {
                (
                    "the agent is silent and the guest's processors are busy all the time: its kernel is stuck, or starved".to_owned(),
                    console,
                )
            } else {
                (
                    "the agent is silent, but the guest runs".to_owned(),
                    console,
                )
            }
        };
        let remedy = format!("{remedy}; 'belljar stop {id}' ends it");
        Verdict { what, remedy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(name: &str, busy: f64, state: char) -> ThreadSymptoms {
        ThreadSymptoms {
            name: name.into(),
            state,
            busy,
            waits_in: String::new(),
        }
    }

    fn symptoms(agent: Result<f64, String>, busy: f64, console: &[&str]) -> Symptoms {
        let process = ProcessRecord {
            pid: 7,
            start_time: 1,
        };
        Symptoms {
            state: State::Running(process),
            reason: String::new(),
            vmm: Some(VmmSymptoms {
                pid: 7,
                api: Ok(0.3),
                agent,
                frozen: false,
                threads: vec![thread("belljar-vmm", 0.0, 'S'), thread("vcpu0", busy, 'R')],
            }),
            console: console.iter().map(|line| (*line).to_owned()).collect(),
            log: Vec::new(),
        }
    }

    fn judged(symptoms: &Symptoms) -> String {
        let verdict = symptoms.verdict("box");
        assert!(!verdict.remedy.is_empty());
        verdict.what
    }

    #[test]
    fn each_way_to_hang_has_its_sentence() {
        let silent = || Err("no answer".to_owned());
        for (symptoms, part) in [
            (symptoms(Ok(1.0), 1.0, &[]), "is well"),
            (symptoms(silent(), 1.0, &[]), "busy all the time"),
            (symptoms(silent(), 0.0, &[]), "processors sleep"),
            (symptoms(silent(), 0.5, &[]), "but the guest runs"),
            (
                symptoms(silent(), 0.0, &["x", "Kernel panic - y"]),
                "panicked",
            ),
            (
                symptoms(silent(), 1.0, &["Out of memory: Killed process 7"]),
                "out of memory",
            ),
            (
                symptoms(silent(), 1.0, &["watchdog: BUG: soft lockup"]),
                "complains",
            ),
        ] {
            let what = judged(&symptoms);
            assert!(what.contains(part), "{what}");
        }
        let mut frozen = symptoms(Ok(1.0), 0.0, &[]);
        assert!(frozen.is_well());
        if let Some(vmm) = &mut frozen.vmm {
            vmm.frozen = true;
        }
        assert!(!frozen.is_well());
        let verdict = frozen.verdict("box");
        assert!(verdict.what.contains("frozen") && verdict.remedy.contains("system thaw box"));
        let mut stuck = symptoms(silent(), 0.0, &[]);
        if let Some(vmm) = &mut stuck.vmm {
            vmm.api = Err("no answer".into());
        }
        assert!(judged(&stuck).contains("VMM itself"));
        if let Some(vmm) = &mut stuck.vmm {
            vmm.threads.push(thread("api", 0.0, 'T'));
        }
        assert!(judged(&stuck).contains("signal"));
        stuck.vmm = None;
        stuck.state = State::Created;
        assert!(judged(&stuck).contains("created"));
    }

    #[test]
    fn threads_of_a_process_are_watched() {
        let this = ProcessRecord::of(std::process::id()).unwrap();
        let threads = watch_threads(this);
        assert!(!threads.is_empty());
        assert!(
            threads
                .iter()
                .all(|thread| (0.0..=1.0).contains(&thread.busy)),
            "{threads:?}"
        );
        assert!(
            threads
                .iter()
                .any(|thread| matches!(thread.state, 'S' | 'R')),
            "{threads:?}"
        );
    }
}
