//! Whole runs against programs that speak the VMM's API and have no guest: who does not go on where it was saved is
//! found out.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use belljar_restore_bench::failure::Result;
use belljar_restore_bench::page;
use belljar_restore_bench::run::{Circumstances, Outcome, Sink, run};
use belljar_restore_bench::settings::{Ahead, Cache, Guest, Settings};
use belljar_restore_bench::vmm::Binary;
use serde_json::Value;

#[derive(Default)]
struct Lines(Vec<Value>, u64);

impl Sink for Lines {
    fn line(&mut self, line: &Value) -> Result<()> {
        self.0.push(line.clone());
        Ok(())
    }

    fn progress(&mut self, done: u64, all: u64, _: &str) {
        assert!(done < all, "{done} of {all}");
        self.1 = done + 1;
    }
}

impl Lines {
    fn of_kind(&self, kind: &str) -> Vec<&Value> {
        self.0.iter().filter(|line| line["kind"] == kind).collect()
    }
}

/// Measures programs that answer in these ways.
fn measure(ways: &[&str], work: &Path) -> (Settings, Lines, Result<Outcome>) {
    let fake = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-vmm");
    let vmms = ways.iter().map(|way| {
        let path = work.join(way);
        symlink(&fake, &path).unwrap();
        // Inputs are copied as `vmm-NAME`, by which it knows what to be.
        Binary {
            name: (*way).to_owned(),
            path,
        }
    });
    let file = work.join("file");
    fs::write(&file, b"anything").unwrap();
    let settings = Settings {
        vmms: vmms.collect(),
        kernel: file.clone(),
        initramfs: file.clone(),
        program: file.clone(),
        keeper: file,
        directory: work.to_owned(),
        guest: Guest::Program,
        vcpus: 1,
        memory_mib: vec![64, 128],
        filled_mib: 1,
        working_set_mib: vec![0, 1],
        clones: vec![1, 2],
        caches: vec![Cache::Hot],
        prepared: vec![Ahead::Nothing, Ahead::Vm],
        recorded: false,
        iterations: 1,
    };
    let mut lines = Lines::default();
    let outcome = run(&settings, &Circumstances::default(), &mut lines);
    (settings, lines, outcome)
}

#[test]
fn those_who_go_on_are_measured_in_turn() {
    let work = tempfile::tempdir().unwrap();
    let (settings, lines, outcome) = measure(&["honest", "frank"], work.path());
    let outcome = outcome.unwrap();
    // Three cases with one guest and one with two, two ways of ours and one of the peer's.
    assert_eq!(lines.of_kind("iteration").len(), (3 + 2) * 3);
    assert_eq!(lines.0[0]["kind"], "run");
    assert_eq!(lines.0[0]["guest"], "program");
    let summaries = lines.of_kind("summary");
    let clones = summaries.iter().find(|line| {
        line["clones"] == 2 && line["vmm"] == "frank" && line["measure"] == "result_us"
    });
    assert_eq!(clones.unwrap()["n"], 2);
    for line in lines.of_kind("iteration") {
        assert!(
            line["result_us"].as_f64() >= line["running_us"].as_f64(),
            "{line}"
        );
        assert_eq!(
            line["prepare_us"].is_number(),
            line["prepared"] == "vm",
            "{line}"
        );
        assert_eq!(line["hashed"], true, "{line}");
    }
    let page = page::write(&settings, &Circumstances::default(), &outcome);
    for id in ["distribution", "phases", "memory", "working-set", "clones"] {
        assert!(page.contains(&format!("id=\"{id}\"")), "{id}");
    }
    let left: Vec<_> = fs::read_dir(work.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 3, "nothing is left: {left:?}");
}

#[test]
fn who_does_not_go_on_where_it_was_saved_is_found_out() {
    for (way, words) in [
        ("rebooted", "a wrong reply"),
        ("forgetful", "a wrong hash"),
        ("silent", "the guest's answer"),
    ] {
        let work = tempfile::tempdir().unwrap();
        let (_, lines, outcome) = measure(&["honest", way], work.path());
        let said = outcome.unwrap_err().to_string();
        assert!(said.contains(words) && said.contains(way), "{said}");
        let told = lines.0.last().unwrap();
        assert_eq!(told["kind"], "failure");
        assert_eq!(told["failure"], said);
    }
}
