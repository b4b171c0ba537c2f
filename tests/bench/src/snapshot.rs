//! What it costs to save a guest and to have it back. The clock ends with an answer that only the saved guest
//! can give: a nonce mixed with a counter that lives in its RAM; then, unmeasured, the hash of what fills it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use belljar_restore_bench::wire::{Act, RAM_PORT, Ram, mix, word};
use serde_json::{Value, json};

use crate::counters;
use crate::failure::{Attempt, Failure, Result};
use crate::measures::{self, Subject};
use crate::report::Samples;
use crate::vmm::{Binary, Machine, Vmm};

/// RAM that the guest fills with bytes without structure.
const FILLED: u64 = 32 << 20;
/// How often a guest is restored in each way.
const RESTORES: u64 = 5;
/// Pages that a restored guest writes to.
const TOUCHED: u64 = 256;
const PAGE: u64 = 4096;
/// Sizes of RAM in MiB beside the first.
const SIZES: [u64; 3] = [1024, 4096, 8192];
/// Of an increment, by their fields in the answer.
const PHASES: [&str; 5] = ["stop", "state", "scan", "copy", "paused"];
/// What the guest changes between snapshots, in MiB.
const CHANGED: [u64; 2] = [8, 80];

/// Where VMMs are started, and what from.
pub(crate) struct Bench<'a> {
    pub(crate) binary: &'a Binary,
    /// Whether it is this project's, with calls of its own.
    pub(crate) ours: bool,
    pub(crate) machine: &'a Machine,
    pub(crate) initrd: &'a Path,
    /// A directory of this group's own.
    pub(crate) work: PathBuf,
    pub(crate) tracing: bool,
}

/// What is made before the clock begins.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Ahead {
    #[default]
    Nothing,
    /// VM and vCPUs.
    Vm,
    /// Also RAM of this snapshot, with the recorded pages.
    Memory,
}

/// How a guest is restored.
#[derive(Clone, Default)]
struct Way {
    /// What the VMM has made ahead.
    prepared: Ahead,
    /// The pages that a recorded run touched are brought in.
    recorded: Option<PathBuf>,
}

/// A saved guest and what it will answer.
struct Saved {
    state: PathBuf,
    ram: PathBuf,
    counter: u64,
    hash: u64,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn ask(vmm: &Vmm, act: Act, amount: u64) -> Result<u64> {
    let mut stream = vmm.connect(RAM_PORT)?;
    stream
        .write_all(&Ram::new(act, amount).encode())
        .attempt("a request to the guest")?;
    let mut answer = [0; 8];
    stream
        .read_exact(&mut answer)
        .attempt("the guest's answer")?;
    Ok(word(answer))
}

/// The process's share of all the memory it uses, its guest's included, in KiB.
fn pss_of(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).attempt(format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .ok_or_else(|| Failure(format!("{path} tells no Pss")))
}

/// Has the page cache hold the memory file in huge pages.
fn make_huge(saved: &Saved, all: &mut Vec<Samples>) -> Result<()> {
    let file = fs::File::open(&saved.ram).attempt("no memory file")?;
    let begun = Instant::now();
    let done = belljar_keeper::huge::collapse(&file).attempt("cannot make huge pages")?;
    all.push(Samples::one("template.huge", "ms", ms(begun.elapsed())));
    if done.huge == 0 {
        eprintln!("this kernel has no huge pages for the memory file: 'restore.huge' is without");
    }
    let blocks = file.metadata().attempt("no memory file")?.blocks();
    all.push(Samples::one(
        "template.huge_size",
        "MB",
        blocks as f64 * 512e-6,
    ));
    Ok(())
}

impl Bench<'_> {
    /// All measures of one VMM.
    pub(crate) fn measure(&self, sweep: bool) -> Result<Vec<Samples>> {
        fs::create_dir_all(&self.work).attempt("cannot make a directory")?;
        let mut all = Vec::new();
        let first = self.machine.memory_mib;
        let saved = self.save(first, Some(&mut all))?;
        let plain = Way::default();
        self.restores(&saved, &plain, "restore", &mut all)?;
        if self.ours {
            let reply = Some(self.record(&saved, 0)?);
            let touch = Some(self.record(&saved, TOUCHED)?);
            for (name, prepared, recorded) in [
                ("restore.prepared", Ahead::Vm, None),
                ("restore.recorded", Ahead::Nothing, reply.clone()),
                ("restore.recorded.prepared", Ahead::Vm, reply.clone()),
                ("restore.recorded_touch", Ahead::Nothing, touch.clone()),
            ] {
                let way = Way { prepared, recorded };
                self.restores(&saved, &way, name, &mut all)?;
            }
            for mib in CHANGED {
                self.increment(&saved, mib, &mut all)?;
            }
            // The same file, as the keeper has it for whoever comes again.
            make_huge(&saved, &mut all)?;
            for (name, prepared, recorded) in [
                ("restore.huge", Ahead::Nothing, None),
                ("restore.huge.prepared", Ahead::Vm, None),
                ("restore.huge.recorded", Ahead::Nothing, reply.clone()),
                ("restore.huge.recorded.prepared", Ahead::Vm, reply.clone()),
                ("restore.huge.recorded.expected", Ahead::Memory, reply),
                ("restore.huge.recorded_touch", Ahead::Nothing, touch.clone()),
                ("restore.huge.recorded_touch.prepared", Ahead::Vm, touch),
            ] {
                let way = Way { prepared, recorded };
                self.restores(&saved, &way, name, &mut all)?;
            }
        }
        saved.remove();
        for mib in SIZES.into_iter().filter(|_| sweep) {
            let saved = self.save(mib, None)?;
            self.restores(&saved, &plain, &format!("restore.{mib}m"), &mut all)?;
            saved.remove();
        }
        let _ = fs::remove_dir_all(&self.work);
        Ok(all)
    }

    fn start(&self) -> Result<Vmm> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = self.work.join(format!("vmm-{number}"));
        Vmm::start(Command::new(&self.binary.path), directory)
    }

    /// Boots a guest, fills its RAM and saves it.
    fn save(&self, memory_mib: u64, all: Option<&mut Vec<Samples>>) -> Result<Saved> {
        let machine = Machine {
            memory_mib,
            ..self.machine.clone()
        };
        let mut vmm = self.start()?;
        vmm.configure(&machine, self.initrd, &[])?;
        measures::boot(&mut Subject {
            vmm: &mut vmm,
            tracing: self.tracing,
        })?;
        ask(&vmm, Act::Fill, FILLED)?;
        let hash = ask(&vmm, Act::Hash, 0)?;
        ask(&vmm, Act::Prove, 1)?;
        let saved = Saved {
            state: self.work.join("state"),
            ram: self.work.join("ram"),
            counter: 1,
            hash,
        };
        vmm.api.patch("/vm", &json!({"state": "Paused"}))?;
        let before = counters::read(vmm.pid(), self.tracing);
        let begun = Instant::now();
        vmm.api.put(
            "/snapshot/create",
            &json!({"snapshot_path": saved.state, "mem_file_path": saved.ram, "snapshot_type": "Full"}),
        )?;
        let time = begun.elapsed();
        let counts = counters::read(vmm.pid(), self.tracing).since(&before);
        if let Some(all) = all {
            let blocks = fs::metadata(&saved.ram).attempt("no memory file")?.blocks();
            all.push(Samples::one("snapshot.full", "ms", ms(time)).counted(counts, 1));
            all.push(Samples::one(
                "snapshot.full_size",
                "MB",
                blocks as f64 * 512e-6,
            ));
        }
        Ok(saved)
    }

    fn load(&self, vmm: &mut Vmm, saved: &Saved, more: &[(&str, Value)]) -> Result<()> {
        let mut body = json!({
            "snapshot_path": saved.state,
            "mem_backend": {"backend_type": "File", "backend_path": saved.ram},
            "resume_vm": true,
            "vsock_override": {"uds_path": vmm.vsock()},
        });
        if let Some(fields) = body.as_object_mut() {
            let more = more
                .iter()
                .map(|(field, value)| ((*field).to_owned(), value.clone()));
            fields.extend(more);
        }
        vmm.api.put("/snapshot/load", &body)
    }

    /// Records which pages a guest touches until its first answer, and with some that it writes to then.
    fn record(&self, saved: &Saved, touched: u64) -> Result<PathBuf> {
        let mut vmm = self.start()?;
        self.load(&mut vmm, saved, &[("track_dirty_pages", json!(true))])?;
        ask(&vmm, Act::Prove, 1)?;
        if touched > 0 {
            ask(&vmm, Act::Touch, touched)?;
        }
        let path = self.work.join(format!("recorded-{touched}"));
        vmm.api
            .put("/snapshot/working-set", &json!({"path": path}))?;
        Ok(path)
    }

    fn restores(&self, saved: &Saved, way: &Way, name: &str, all: &mut Vec<Samples>) -> Result<()> {
        let samples = |what: &str, unit| Samples {
            measure: format!("{name}.{what}"),
            unit,
            values: Vec::new(),
            counts: None,
        };
        let mut returned = samples("returned", "ms");
        let mut replied = samples("reply", "ms");
        let mut from_start = samples("process_and_reply", "ms");
        let mut touched = samples("touch_256", "ms");
        let mut pss = samples("pss", "KiB");
        let recorded = way.recorded.iter();
        let more: Vec<_> = recorded.map(|path| ("working_set", json!(path))).collect();
        for round in 0..RESTORES {
            let mut vmm = self.start()?;
            let vcpus = self.machine.vcpus;
            match (way.prepared, &way.recorded) {
                (Ahead::Nothing, _) => {}
                (Ahead::Memory, Some(recorded)) => vmm.api.put(
                    "/prepare",
                    &json!({"vcpu_count": vcpus, "mem_file_path": saved.ram, "working_set": recorded}),
                )?,
                _ => vmm.api.put("/prepare", &json!({"vcpu_count": vcpus}))?,
            }
            let before = counters::read(vmm.pid(), self.tracing);
            let begun = Instant::now();
            self.load(&mut vmm, saved, &more)?;
            let loaded = begun.elapsed();
            let nonce = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(round.wrapping_add(3));
            let answer = ask(&vmm, Act::Prove, nonce)?;
            let reply = begun.elapsed();
            let counts = counters::read(vmm.pid(), self.tracing).since(&before);
            if answer != mix(nonce, saved.counter) {
                return Err(Failure("it is not the guest that was saved".to_owned()));
            }
            returned.values.push(ms(loaded));
            replied.values.push(ms(reply));
            replied.counts = Some((counts, 1));
            from_start.values.push(ms(vmm.answered + reply));
            let begun = Instant::now();
            ask(&vmm, Act::Touch, TOUCHED)?;
            touched.values.push(ms(begun.elapsed()));
            pss.values.push(pss_of(vmm.pid())?);
            if round == 0 {
                // The pages that were touched differ since, so a new guest gives the hash.
                let mut other = self.start()?;
                self.load(&mut other, saved, &more)?;
                if ask(&other, Act::Hash, 0)? != saved.hash {
                    return Err(Failure("the restored guest's RAM is another".to_owned()));
                }
            }
        }
        all.extend([returned, replied, touched, pss]);
        if way.prepared == Ahead::Nothing {
            all.push(from_start);
        }
        Ok(())
    }

    /// A restored guest that was saved once changes some MiB and is saved again: how long it stood still, and
    /// how long the call took.
    fn increment(&self, saved: &Saved, mib: u64, all: &mut Vec<Samples>) -> Result<()> {
        let mut vmm = self.start()?;
        self.load(&mut vmm, saved, &[])?;
        let files = |number: u64| {
            let file = |what: &str| self.work.join(format!("{what}-{mib}-{number}"));
            (file("state"), file("diff"))
        };
        let mut calls = Vec::new();
        let mut phases = PHASES.map(|name| (name, Vec::new()));
        let mut size = 0.0;
        // More than is filled; the first time makes the pages, and the second is measured.
        ask(&vmm, Act::Fill, mib << 20)?;
        for number in 0..3 {
            ask(&vmm, Act::Touch, (mib << 20) / PAGE)?;
            let (state, ram) = files(number);
            let begun = Instant::now();
            let answer = vmm.api.ask(
                "/snapshot/create",
                &json!({
                    "snapshot_type": "Increment", "snapshot_path": state, "mem_file_path": ram,
                    "resume_vm": true,
                }),
            )?;
            let time = begun.elapsed();
            if number > 0 {
                for (name, values) in &mut phases {
                    let us = answer.get(format!("{name}_us")).and_then(Value::as_f64);
                    values
                        .push(us.ok_or_else(|| Failure(format!("no {name}_us: {answer}")))? / 1e3);
                }
                calls.push(ms(time));
                size = fs::metadata(&ram).attempt("no memory file")?.blocks() as f64 * 512e-6;
            }
            for file in [state, ram] {
                let _ = fs::remove_file(file);
            }
        }
        for (what, values) in phases.into_iter().chain([("written", calls)]) {
            all.push(Samples {
                measure: format!("increment.{mib}m.{what}"),
                unit: "ms",
                values,
                counts: None,
            });
        }
        all.push(Samples::one(format!("increment.{mib}m.size"), "MB", size));
        Ok(())
    }
}

impl Saved {
    fn remove(&self) {
        for file in [&self.state, &self.ram] {
            let _ = fs::remove_file(file);
        }
    }
}
