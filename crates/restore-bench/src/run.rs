//! The rounds: every VMM, way and case in turn, so that what changes on the machine meets all of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use serde_json::{Value, json};

use crate::cache;
use crate::failure::{Attempt, Failure, Result};
use crate::host::{self, Load, Ticks};
use crate::record::{Iteration, Memory, Series, Times, line};
use crate::settings::{Ahead, Cache, Case, Settings, Way};
use crate::subject::{Saved, Subject, initramfs};
use crate::vmm::{SETTLING, Vmm};

/// Of many clones, so many have their RAM hashed.
const HASHED: u32 = 4;

/// What a run is, beside its settings.
#[derive(Clone, Debug, Default)]
pub struct Circumstances {
    /// What of the project is measured.
    pub version: String,
    /// What the clock counts; empty: time.
    pub instrument: String,
    /// Of the machine, before.
    pub load: Load,
    /// Measuring on a loaded machine was asked for.
    pub forced: bool,
}

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub iterations: Vec<Iteration>,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// Why this machine was too loaded; empty: it was quiet.
    pub loaded: Vec<String>,
}

impl Outcome {
    /// The one sentence, or why there is none.
    pub fn headline(
        &self,
        settings: &Settings,
        circumstances: &Circumstances,
    ) -> std::result::Result<String, String> {
        if !self.loaded.is_empty() && !circumstances.forced {
            return Err(format!(
                "no headline: this machine was loaded ({})",
                self.loaded.join("; ")
            ));
        }
        let ours = settings.vmms.first().map(|vmm| vmm.name.as_str());
        let base = settings.base();
        let series = Series::of(&self.iterations);
        let first = series
            .iter()
            .find(|series| Some(series.vmm.as_str()) == ours && series.case == base);
        let summary = first
            .and_then(|series| Some((series, series.summary(crate::record::Measure::Result)?)));
        let Some((series, summary)) = summary else {
            return Err("no headline: nothing was measured".to_owned());
        };
        let loaded = if self.loaded.is_empty() {
            String::new()
        } else {
            format!(" On a loaded machine: {}.", self.loaded.join("; "))
        };
        Ok(format!(
            "{}: a saved guest of {} MiB answers {:.2} ms after the call (p50; p99 {:.2} ms, {} of {} valid).{loaded}",
            series.label(),
            base.memory_mib,
            summary.p50 / 1e3,
            summary.p99 / 1e3,
            summary.n,
            summary.n
        ))
    }
}

/// Where lines and progress go.
pub trait Sink {
    /// One JSON line.
    fn line(&mut self, line: &Value) -> Result<()>;
    /// So many of so many steps are done.
    fn progress(&mut self, done: u64, all: u64, what: &str);
}

/// The first line: what is measured, where.
fn describe(settings: &Settings, circumstances: &Circumstances) -> Value {
    let (processor, kernel) = host::describe();
    let load = circumstances.load;
    let vmms: Vec<&str> = settings.vmms.iter().map(|vmm| vmm.name.as_str()).collect();
    line(
        "run",
        json!({
            "version": circumstances.version, "instrument": circumstances.instrument,
            "host_cpu": processor, "host_kernel": kernel, "processors": load.processors,
            "load_average": load.average, "busy_share": load.busy, "steal_share": load.steal,
            "cpu_pressure": load.pressure, "forced": circumstances.forced, "vmms": vmms,
            "guest": settings.guest.name(), "vcpus": settings.vcpus, "filled_mib": settings.filled_mib,
            "iterations": settings.iterations, "in_memory": cache::is_memory(&settings.directory).ok(),
        }),
    )
}

struct Run<'a> {
    settings: &'a Settings,
    work: &'a Path,
    sink: &'a mut dyn Sink,
    started: u64,
    done: u64,
    iterations: Vec<Iteration>,
    notes: Vec<String>,
}

/// A VMM with its saved guest.
struct Ready<'a> {
    subject: Subject<'a>,
    saved: Saved,
}

/// Measures everything. A wrong or missing reply is an error, and stands in the last line.
pub fn run(
    settings: &Settings,
    circumstances: &Circumstances,
    sink: &mut dyn Sink,
) -> Result<Outcome> {
    settings.check()?;
    sink.line(&describe(settings, circumstances))?;
    let work = settings
        .directory
        .join(format!("belljar-bench-{}", std::process::id()));
    fs::create_dir(&work).attempt(format!("cannot make {}", work.display()))?;
    let mut settings = settings.clone();
    let before = Ticks::now();
    let measured = copy_inputs(&mut settings, &work).and_then(|initramfs| {
        let mut run = Run {
            settings: &settings,
            work: &work,
            sink,
            started: 0,
            done: 0,
            iterations: Vec::new(),
            notes: Vec::new(),
        };
        run.measure(&initramfs)?;
        Ok((run.iterations, run.notes))
    });
    let _ = fs::remove_dir_all(&work);
    let (iterations, notes) = match measured {
        Ok(measured) => measured,
        Err(failure) => {
            sink.line(&line("failure", json!({"failure": failure.to_string()})))?;
            return Err(failure);
        }
    };
    let mut loaded = circumstances.load.reasons();
    let (_, steal) = Ticks::now().shares_since(before);
    loaded.extend(host::stolen(steal).map(|reason| format!("while measuring, {reason}")));
    for line in Series::of(&iterations).iter().flat_map(Series::lines) {
        sink.line(&line)?;
    }
    Ok(Outcome {
        iterations,
        notes,
        loaded,
    })
}

/// Copies what is measured to where it is measured, so that nothing is read from slower places. Returns the
/// initramfs.
fn copy_inputs(settings: &mut Settings, work: &Path) -> Result<PathBuf> {
    let copy = |from: &mut PathBuf, name: &str| {
        let to = work.join(name);
        fs::copy(&*from, &to).attempt(format!("cannot copy {}", from.display()))?;
        *from = to;
        Ok(())
    };
    copy(&mut settings.kernel, "kernel")?;
    for vmm in &mut settings.vmms {
        let name = format!("vmm-{}", vmm.name);
        copy(&mut vmm.path, &name)?;
    }
    let path = work.join("initramfs");
    fs::write(&path, initramfs(settings)?).attempt("cannot write an initramfs")?;
    Ok(path)
}

impl Run<'_> {
    fn measure(&mut self, initramfs: &Path) -> Result<()> {
        let settings = self.settings;
        let cases = settings.cases();
        let ways = |index: usize| settings.ways(index == 0);
        let per_case: u64 = (0..settings.vmms.len())
            .map(|index| ways(index).len() as u64)
            .sum();
        let all = per_case
            .saturating_mul(cases.len() as u64)
            .saturating_mul(u64::from(settings.iterations));
        let mut sizes: Vec<u64> = cases.iter().map(|case| case.memory_mib).collect();
        sizes.dedup();
        for memory_mib in sizes {
            let mut ready = Vec::new();
            for (index, binary) in settings.vmms.iter().enumerate() {
                let what = format!("{}: saving a guest of {memory_mib} MiB", binary.name);
                self.sink.progress(self.done, all, &what);
                let subject = Subject {
                    binary,
                    ours: index == 0,
                    settings,
                    initramfs,
                };
                let saved = subject
                    .save(memory_mib, self.work)
                    .map_err(|failure| Failure(format!("{}: {failure}", binary.name)))?;
                let huge = json!({"vmm": binary.name, "memory_mib": memory_mib, "huge_share": saved.huge_share});
                self.sink.line(&line("saved", huge))?;
                ready.push(Ready { subject, saved });
            }
            let same = cases.iter().filter(|case| case.memory_mib == memory_mib);
            let same: Vec<Case> = same.copied().collect();
            for round in 0..settings.iterations {
                for case in &same {
                    self.turn(&ready, *case, round, all)?;
                }
            }
            for each in &ready {
                each.saved.remove();
            }
        }
        Ok(())
    }

    /// Every VMM in each of its ways once; who is first changes from round to round.
    fn turn(&mut self, ready: &[Ready<'_>], case: Case, round: u32, all: u64) -> Result<()> {
        let mut order: Vec<(&Ready<'_>, Way)> = ready
            .iter()
            .flat_map(|each| {
                let ways = self.settings.ways(each.subject.ours);
                ways.into_iter().map(move |way| (each, way))
            })
            .collect();
        let shift = usize::try_from(round).unwrap_or(0) % order.len().max(1);
        order.rotate_left(shift);
        for (each, way) in order {
            let name = &each.subject.binary.name;
            let what = format!(
                "{name}, {}, RAM {} MiB, set {} MiB, {} at once",
                way.name(),
                case.memory_mib,
                case.working_set_mib,
                case.clones
            );
            self.sink.progress(self.done, all, &what);
            let iterations = self
                .together(each, way, case, round)
                .map_err(|failure| Failure(format!("{name}, {}: {failure}", way.name())))?;
            for iteration in iterations {
                self.sink.line(&iteration.line())?;
                self.iterations.push(iteration);
            }
            self.done = self.done.saturating_add(1);
        }
        Ok(())
    }

    /// Restores as many guests as the case wants, at the same time.
    fn together(
        &mut self,
        ready: &Ready<'_>,
        way: Way,
        case: Case,
        round: u32,
    ) -> Result<Vec<Iteration>> {
        let (subject, saved) = (&ready.subject, &ready.saved);
        if let Some(chunks) = &saved.chunks {
            // It may still be filling memory for the guest before.
            chunks.rest()?;
        }
        // What the ends of the VMMs before left to the host's kernel is done by then.
        std::thread::sleep(SETTLING);
        self.cool(ready, way.cache)?;
        // It goes when it is not needed.
        let _keeper = match &saved.chunks {
            Some(chunks) if way.cache == Cache::Lazy => Some(chunks.forget(way.recorded)?),
            _ => None,
        };
        // What lies on a tmpfs is in memory, and cannot be asked.
        let cached_share = if cache::is_memory(self.work)? {
            Some(1.0)
        } else {
            cache::cached_share(&saved.ram)?
        };
        let mut clones: Vec<(Vmm, Times)> = Vec::new();
        for _ in 0..case.clones {
            self.started = self.started.saturating_add(1);
            let mut vmm = subject.start(self.work.join(format!("run-{}", self.started)))?;
            let mut times = Times {
                process_us: vmm.answered.as_secs_f64() * 1e6,
                ..Times::default()
            };
            if way.prepared != Ahead::Nothing {
                let prepared = subject.prepare(&mut vmm, saved, way, case.working_set_mib)?;
                times.prepare_us = Some(prepared);
            }
            clones.push((vmm, times));
        }
        let barrier = Barrier::new(clones.len());
        let set_mib = case.working_set_mib;
        let restored: Vec<Result<()>> = std::thread::scope(|scope| {
            let threads: Vec<_> = clones
                .iter_mut()
                .map(|(vmm, times)| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        subject
                            .restore(vmm, saved, way, set_mib, times)
                            .map_err(|failure| vmm.explain(&failure))
                    })
                })
                .collect();
            let ended = threads.into_iter().map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(Failure("a thread panicked".to_owned())))
            });
            ended.collect()
        });
        restored.into_iter().collect::<Result<()>>()?;
        // Of all before any hash, which reads their RAM.
        let memories: Vec<Memory> = clones
            .iter()
            .map(|(vmm, _)| crate::subject::memory_of(vmm.pid()))
            .collect::<Result<_>>()?;
        let mut iterations = Vec::new();
        for (clone, ((vmm, times), memory)) in (0..).zip(clones.iter().zip(memories)) {
            let hashed = clone < HASHED;
            if hashed {
                Subject::check_ram(vmm, saved, set_mib)?;
            }
            iterations.push(Iteration {
                vmm: subject.binary.name.clone(),
                way,
                case,
                round,
                clone,
                times: *times,
                memory,
                cached_share,
                hashed,
            });
        }
        Ok(iterations)
    }

    /// Has the snapshot, or all, leave the memory.
    fn cool(&mut self, ready: &Ready<'_>, cache: Cache) -> Result<()> {
        let saved = &ready.saved;
        let files = [&saved.state, &saved.ram, &ready.subject.binary.path];
        let dropped = match cache {
            Cache::Hot | Cache::Lazy => return Ok(()),
            Cache::Warm => files.get(..2).unwrap_or_default(),
            Cache::Cold => &files,
        };
        for file in dropped {
            cache::drop_file(file)?;
        }
        if cache == Cache::Cold && !cache::drop_all()? {
            let note = "cold: not root, so only the pages of the snapshot's files and of the VMM's program were dropped";
            if !self.notes.iter().any(|known| known == note) {
                self.notes.push(note.to_owned());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::iteration;
    use crate::settings::tests::settings;

    #[test]
    fn a_headline_needs_a_quiet_machine_or_the_word() {
        let mut outcome = Outcome {
            iterations: vec![iteration("belljar", false, 256, 6000.0)],
            notes: Vec::new(),
            loaded: Vec::new(),
        };
        let mut circumstances = Circumstances::default();
        let said = outcome.headline(&settings(), &circumstances).unwrap();
        assert!(
            said.contains("belljar, hot") && said.contains("6.00 ms"),
            "{said}"
        );
        outcome.loaded = vec!["others use 40 % of the processors".to_owned()];
        let refused = outcome.headline(&settings(), &circumstances).unwrap_err();
        assert!(refused.contains("others use 40 %"), "{refused}");
        circumstances.forced = true;
        let said = outcome.headline(&settings(), &circumstances).unwrap();
        assert!(said.contains("On a loaded machine: others use"), "{said}");
        outcome.iterations.clear();
        assert!(outcome.headline(&settings(), &circumstances).is_err());
    }
}
