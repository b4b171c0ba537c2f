//! What twenty snapshots of a guest take, of which each differs from the one before by the same amount.
//!
//! An eighth of the real thing: 1 MiB changed of 24; `examples/measure` (`increments`) does it with real guest RAM.

use std::collections::HashSet;

use super::Random;
use crate::{Kind, Options, PAGE, Settings, Store};

const P: usize = PAGE as usize;
const PAGES: usize = 24 << 8;
const CHANGED: usize = 1 << 8;

/// What the store grew by, divided by the changed pages alone, compressed in pieces of a chunk.
fn growth(scattered: bool) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings::default();
    let level = settings.level;
    let store = Store::create(folder.path(), settings).unwrap();
    let mut random = Random(5);
    let mut memory: Vec<u8> = (0..PAGES).flat_map(|_| random.page()).collect();
    let mut writer = store.begin(Options::default()).unwrap();
    writer.image("memory", Kind::Memory, &memory[..]).unwrap();
    let mut id = writer.commit().unwrap().0;
    let before = store.usage().unwrap().total();
    let mut alone = 0;
    for _ in 0..20 {
        let start = random.below((PAGES - CHANGED) as u64) as usize;
        let mut pages: Vec<usize> = if scattered {
            (0..CHANGED)
                .map(|_| random.below(PAGES as u64) as usize)
                .collect()
        } else {
            (start..start + CHANGED).collect()
        };
        pages.sort_unstable();
        pages.dedup();
        let mut changed = Vec::new();
        for page in &pages {
            let content = random.page();
            memory[page * P..][..P].copy_from_slice(&content);
            changed.extend(content);
        }
        let parts = changed.chunks(64 << 10);
        alone += parts
            .map(|part| zstd::bulk::compress(part, level).unwrap().len())
            .sum::<usize>();
        let ranges: Vec<_> = pages
            .iter()
            .map(|page| (page * P) as u64..((page + 1) * P) as u64)
            .collect();
        let base = store.read(id).unwrap();
        let mut writer = store.begin(Options::default()).unwrap();
        writer
            .image_changed("memory", &memory[..], &base, &ranges)
            .unwrap();
        id = writer.commit().unwrap().0;
    }
    // The last one is whole, whatever it shares.
    let mut back = vec![0; memory.len()];
    let reader = store.read(id).unwrap();
    reader.read("memory", 0, &mut back).unwrap();
    assert!(back == memory, "the last snapshot is what was saved");
    (store.usage().unwrap().total() - before) as f64 / alone as f64
}

#[test]
fn twenty_snapshots_take_little_more_than_what_changed_between_them() {
    let (contiguous, scattered) = (growth(false), growth(true));
    assert!(contiguous <= 1.3, "in one run: {contiguous:.2}");
    assert!(scattered <= 2.0, "scattered: {scattered:.2}");
    assert!(contiguous > 0.9, "what changed is stored: {contiguous:.2}");
}

/// What is left of older increments' chunks is gathered, at a price that has a bound: here increments are so small
/// that it is as high as it can be.
#[test]
fn an_image_of_many_increments_does_not_fall_apart() {
    const ROUNDS: u64 = 100;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path(), Settings::default()).unwrap();
    let mut random = Random(11);
    let mut memory: Vec<u8> = (0..8 << 8).flat_map(|_| random.page()).collect();
    let mut writer = store.begin(Options::default()).unwrap();
    writer.image("memory", Kind::Memory, &memory[..]).unwrap();
    let mut id = writer.commit().unwrap().0;
    let (mut most, mut new) = (0, 0);
    for _ in 0..ROUNDS {
        let mut ranges = Vec::new();
        for region in 0..8 {
            for _ in 0..3 {
                let page = region * 256 + random.below(256);
                let range = page * PAGE..(page + 1) * PAGE;
                let bytes = range.start as usize..range.end as usize;
                memory[bytes].copy_from_slice(&random.page());
                ranges.push(range);
            }
        }
        ranges.sort_by_key(|range| range.start);
        let base = store.read(id).unwrap();
        let mut writer = store.begin(Options::default()).unwrap();
        writer
            .image_changed("memory", &memory[..], &base, &ranges)
            .unwrap();
        let (next, stored) = writer.commit().unwrap();
        drop(base);
        store.remove(id, &HashSet::new()).unwrap();
        (id, new) = (next, new + stored.new_bytes);
        let reader = store.read(id).unwrap();
        let image = reader.image("memory").unwrap();
        let chunks: HashSet<u32> = image.extents.iter().map(|extent| extent.chunk).collect();
        most = most.max(chunks.len());
    }
    let reader = store.read(id).unwrap();
    let mut back = vec![0; memory.len()];
    reader.read("memory", 0, &mut back).unwrap();
    assert!(back == memory, "the last snapshot is what was saved");
    let growth = new as f64 / (ROUNDS * 24 * PAGE) as f64;
    // Nothing stored again: 849 chunks, and 1. As few as can be: 128.
    assert!(most <= 400, "{most} chunks");
    assert!(growth <= 2.4, "{growth:.2} times what was changed");
}
