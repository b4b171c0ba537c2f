//! Power that goes at any moment, calls that fail, writers and collections at once: what is listed restores.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::sim::{Fault, Keep, Op, Plan, Sim};
use super::{Random, restored};
use crate::{Error, Kind, Options, PAGE, Result, Settings, SnapshotId, Store};

const P: usize = PAGE as usize;

fn tiny() -> Settings {
    Settings {
        slot_bytes: 16 << 10,
        level: 1,
        pack_bytes: 48 << 10,
    }
}

/// What must be in a store: each snapshot's memory, once its commit has returned; and what may be.
#[derive(Default, Clone)]
struct Expected {
    all: BTreeMap<SnapshotId, Vec<u8>>,
    /// In the log: from when on it must be there, and from when on it need not be.
    committed: BTreeMap<SnapshotId, usize>,
    removed: BTreeMap<SnapshotId, usize>,
    /// Where the tag is, from when on.
    tagged: Vec<(usize, SnapshotId)>,
}

fn memory(random: &mut Random, base: &[u8]) -> Vec<u8> {
    let mut memory = base.to_vec();
    for _ in 0..6 {
        let page = random.below(24) as usize;
        let bytes = if random.below(4) == 0 {
            vec![0; P]
        } else {
            random.page()
        };
        memory[page * P..][..P].copy_from_slice(&bytes);
    }
    memory
}

fn options(tag: bool) -> Options {
    Options {
        workers: 1,
        tags: tag.then(|| "latest".to_owned()).into_iter().collect(),
        ..Options::default()
    }
}

/// The life of a store: snapshots, some from others, a moving tag, removals, collections, a reopening.
fn life(sim: &Sim, expected: &mut Expected) -> Result<()> {
    let mut store = Store::create_on(sim.fs(), tiny())?;
    let mut random = Random(11);
    let mut now = memory(&mut random, &vec![0; 24 * P]);
    let mut last: Option<SnapshotId> = None;
    for round in 0..7 {
        now = memory(&mut random, &now);
        let mut writer = store.begin(options(round % 2 == 0))?;
        let id = writer.id();
        expected.all.insert(id, now.clone());
        match last.filter(|_| round % 3 != 0) {
            Some(base) => {
                let reader = store.read(base)?;
                // All that may differ; the writer stores no page that is zero or known.
                writer.image_changed(
                    "memory",
                    &now[..],
                    &reader,
                    std::slice::from_ref(&(0..24 * PAGE)),
                )?;
            }
            None => writer.image("memory", Kind::Memory, &now[..])?,
        }
        writer.commit()?;
        expected.committed.insert(id, sim.log_len());
        if round % 2 == 0 {
            expected.tagged.push((sim.log_len(), id));
        }
        sim.pass(10);
        match (round, last) {
            (2 | 4 | 6, Some(old)) => {
                let begun = sim.log_len();
                match store.remove(old, &HashSet::new()) {
                    Ok(()) => {
                        expected.removed.insert(old, begun);
                    }
                    Err(Error::Kept { .. }) => {}
                    Err(error) => {
                        expected.removed.insert(old, begun);
                        return Err(error);
                    }
                }
                store.gc(15)?;
            }
            (5, _) => {
                drop(store);
                store = Store::open_on(sim.fs(), false)?.with_pack_bytes(tiny().pack_bytes);
                store.gc(0)?;
            }
            _ => {}
        }
        last = Some(id);
    }
    store.gc(0)?;
    Ok(())
}

/// Everything that is listed restores, and what must be listed is; the store can be used.
fn check(sim: &Sim, expected: &Expected, at: usize, what: &str) {
    let store = match Store::open_on(sim.fs(), false) {
        Ok(store) => store,
        Err(Error::NoStore) if expected.committed.values().all(|done| *done > at) => return,
        Err(error) => panic!("{what}: {error}"),
    };
    let listed: Vec<_> = store
        .list()
        .unwrap()
        .iter()
        .map(|snapshot| snapshot.id)
        .collect();
    assert!(
        store.problems().is_empty(),
        "{what}: {:?}",
        store.problems()
    );
    for (id, done) in &expected.committed {
        let gone = expected
            .removed
            .get(id)
            .is_some_and(|removed| *removed < at);
        assert!(
            *done > at || gone || listed.contains(id),
            "{what}: {id} is lost"
        );
    }
    for pass in 0..2 {
        for id in store.list().unwrap().iter().map(|snapshot| snapshot.id) {
            let bytes = restored(&store.read(id).unwrap(), "memory");
            let bytes = bytes.unwrap_or_else(|error| panic!("{what}, pass {pass}: {id}: {error}"));
            assert!(bytes == expected.all[&id], "{what}: {id} is wrong");
        }
        if pass == 0 {
            store.gc(0).unwrap();
        }
    }
    let tagged = expected.tagged.iter().rev().find(|(done, _)| *done <= at);
    if let Some((_, id)) = tagged.filter(|(_, id)| listed.contains(id)) {
        let found = store.find("latest").unwrap();
        assert!(
            found == *id || expected.committed.get(&found).is_none_or(|done| *done > at),
            "{what}: the tag is lost"
        );
    }
    let mut writer = store.begin(options(true)).unwrap();
    let fresh = Random(99).pages(10, 9);
    writer.image("memory", Kind::Memory, &fresh[..]).unwrap();
    let (id, _) = writer.commit().unwrap();
    assert_eq!(store.find("latest").unwrap(), id);
    assert!(restored(&store.read(id).unwrap(), "memory").unwrap() == fresh);
    assert!(store.verify(|_, _| ()).unwrap().is_good(), "{what}");
}

#[test]
fn power_may_go_after_any_write() {
    let sim = Sim::new();
    let mut expected = Expected::default();
    life(&sim, &mut expected).unwrap();
    let log = sim.log();
    assert!(log.len() > 150, "{}", log.len());
    let kinds = log
        .iter()
        .filter(|op| matches!(op, Op::Rename(_, to) if to.starts_with("trash/")))
        .count();
    assert!(kinds >= 4, "the life has collections in it");
    let mut random = Random(12);
    for at in 0..=log.len() {
        let mut ways = vec![Keep::All, Keep::Nothing];
        ways.extend([Keep::Some; 5]);
        for (number, keep) in ways.into_iter().enumerate() {
            let after = Sim::after_power_loss(&log[..at], keep, &mut random);
            check(
                &after,
                &expected,
                at,
                &format!("after {at} of {} operations, {keep:?} {number}", log.len()),
            );
        }
    }
}

/// The model must be able to find a mistake: without the syncs of files, something is lost.
#[test]
fn the_model_finds_missing_syncs() {
    for missing in ["file", "packs", "manifests", "."] {
        let sim = Sim::new();
        let mut expected = Expected::default();
        life(&sim, &mut expected).unwrap();
        let mut log = sim.log();
        for op in &mut log {
            let is_missing = match op {
                Op::Sync(_) => missing == "file",
                Op::SyncDir(folder) => folder == missing,
                _ => false,
            };
            if is_missing {
                *op = Op::CreateDir;
            }
        }
        let found = std::panic::catch_unwind(|| {
            let mut random = Random(13);
            for at in 0..=log.len() {
                for keep in [Keep::Nothing, Keep::Some, Keep::Some] {
                    check(
                        &Sim::after_power_loss(&log[..at], keep, &mut random),
                        &expected,
                        at,
                        "expected",
                    );
                }
            }
        });
        assert!(found.is_err(), "nobody misses the sync of {missing}");
    }
}

#[test]
fn any_call_may_fail_once_or_from_then_on() {
    let clean = Sim::new();
    life(&clean, &mut Expected::default()).unwrap();
    for fault in [Fault::NoSpace, Fault::Broken, Fault::Short] {
        for forever in [false, true] {
            for at in 0..clean.calls() {
                let what = format!("{fault:?} at {at}, forever {forever}");
                let sim = Sim::new();
                let mut expected = Expected::default();
                sim.plan(Some(Plan { at, fault, forever }));
                let lived = life(&sim, &mut expected);
                assert!(lived.is_err() || !forever, "{what}: nothing was noticed");
                sim.plan(None);
                // As the disk is now, with the process dead; and with the power gone.
                check(&sim.copy(), &expected, sim.log_len(), &what);
            }
        }
    }
}

#[test]
fn a_store_in_use_goes_on_after_a_failure() {
    let mut random = Random(14);
    for fault in [Fault::NoSpace, Fault::Broken, Fault::Short] {
        for at in 0..40 {
            let sim = Sim::new();
            let store = Store::create_on(sim.fs(), tiny()).unwrap();
            let first = random.pages(24, 5);
            let mut writer = store.begin(options(true)).unwrap();
            writer.image("memory", Kind::Memory, &first[..]).unwrap();
            let (first_id, _) = writer.commit().unwrap();
            let second = random.pages(40, 5);
            sim.plan(Some(Plan {
                at: sim.calls() + at,
                fault,
                forever: false,
            }));
            let tried = store.begin(options(true)).and_then(|mut writer| {
                writer.image("memory", Kind::Memory, &second[..])?;
                writer.commit()
            });
            let _ = store.gc(0);
            sim.plan(None);
            let mut writer = store.begin(options(true)).unwrap();
            writer.image("memory", Kind::Memory, &second[..]).unwrap();
            let (again, _) = writer.commit().unwrap();
            store.gc(0).unwrap();
            assert!(restored(&store.read(first_id).unwrap(), "memory").unwrap() == first);
            assert!(restored(&store.read(again).unwrap(), "memory").unwrap() == second);
            let listed = store.list().unwrap().len();
            assert_eq!(
                listed,
                if tried.is_ok() { 3 } else { 2 },
                "{fault:?} at {at}"
            );
            assert!(store.verify(|_, _| ()).unwrap().is_good());
        }
    }
}

#[test]
fn reads_that_fail_are_told_and_nothing_is_collected_on_their_account() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), tiny()).unwrap();
    let memory = Random(15).pages(24, 5);
    let mut writer = store.begin(options(false)).unwrap();
    writer.image("memory", Kind::Memory, &memory[..]).unwrap();
    let (id, _) = writer.commit().unwrap();
    let reader = store.read(id).unwrap();
    sim.fail_reads(true);
    assert!(matches!(restored(&reader, "memory"), Err(Error::Io { .. })));
    assert!(matches!(store.gc(0), Err(Error::Io { .. })));
    sim.fail_reads(false);
    assert!(restored(&reader, "memory").unwrap() == memory);
}

#[test]
fn writers_readers_and_collections_at_once() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), tiny()).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let collector = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                sim.pass(1);
                store.gc(0).unwrap();
            }
        });
        let writers: Vec<_> = (0..3_u64)
            .map(|number| {
                let store = store.clone();
                scope.spawn(move || {
                    // The same contents in all threads: what one removes, another one finds again.
                    let mut random = Random(16);
                    let mut kept = Vec::new();
                    let mut memory = vec![0; 24 * P];
                    for round in 0..60 {
                        memory = self::memory(&mut random, &memory);
                        let mut writer = store.begin(options(false)).unwrap();
                        writer.image("memory", Kind::Memory, &memory[..]).unwrap();
                        if (round + number) % 5 == 0 {
                            continue;
                        }
                        let (id, _) = writer.commit().unwrap();
                        kept.push((id, memory.clone()));
                        let (id, bytes) =
                            &kept[Random(round + 1).below(kept.len() as u64) as usize];
                        assert!(restored(&store.read(*id).unwrap(), "memory").unwrap() == *bytes);
                        if kept.len() > 4 {
                            store.remove(kept.remove(0).0, &HashSet::new()).unwrap();
                        }
                    }
                    kept
                })
            })
            .collect();
        let kept: Vec<_> = writers
            .into_iter()
            .flat_map(|writer| writer.join().unwrap())
            .collect();
        stop.store(true, Ordering::Relaxed);
        collector.join().unwrap();
        assert_eq!(store.list().unwrap().len(), kept.len());
        for (id, memory) in kept {
            assert!(restored(&store.read(id).unwrap(), "memory").unwrap() == memory);
        }
    });
    assert!(store.verify(|_, _| ()).unwrap().is_good());
    drop(store);
    assert!(
        Store::open_on(sim.fs(), false)
            .unwrap()
            .verify(|_, _| ())
            .unwrap()
            .is_good()
    );
}
