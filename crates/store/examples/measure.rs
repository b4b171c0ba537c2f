//! Measures the choices of the store on real images of guest RAM and disks.
//!
//! ```sh
//! cargo run --release -p belljar-store --example measure -- sweep RAM…       # chunk size × level × dictionary
//! cargo run --release -p belljar-store --example measure -- levels RAM…      # the speed of levels, best of nine turns
//! cargo run --release -p belljar-store --example measure -- store RAM FOLDER # capture and restore, one thread and all
//! cargo run --release -p belljar-store --example measure -- increments RAM FOLDER
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_store::{FileSource, Kind, Options, PAGE, Settings, Sink, Store};

const P: usize = PAGE as usize;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let paths: Vec<&Path> = arguments.iter().skip(1).map(Path::new).collect();
    match (arguments.first().map(String::as_str), &paths[..]) {
        (Some("sweep"), files) if !files.is_empty() => files.iter().for_each(|file| sweep(file)),
        (Some("levels"), files) if !files.is_empty() => files.iter().for_each(|file| levels(file)),
        (Some("store"), [file, folder]) => store(file, folder),
        (Some("increments"), [file, folder]) => increments(file, folder),
        _ => panic!(
            "usage: measure sweep RAM… | levels RAM… | store RAM FOLDER | increments RAM FOLDER"
        ),
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().fold(0, |all, byte| all | byte) == 0
}

/// The chunks of that size, pages of zeros left out.
fn chunks(memory: &[u8], size: usize) -> Vec<Vec<u8>> {
    let pages = |slot: &[u8]| {
        slot.chunks(P)
            .filter(|page| !is_zero(page))
            .flatten()
            .copied()
            .collect()
    };
    let all = memory.chunks(size).map(pages);
    all.filter(|chunk: &Vec<u8>| !chunk.is_empty()).collect()
}

/// The CPU time of this thread: what others do does not count.
fn cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        now.tv_sec.cast_unsigned(),
        u32::try_from(now.tv_nsec).unwrap(),
    )
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = cpu();
    let done = work();
    (done, cpu() - begun)
}

fn sweep(path: &Path) {
    let memory = std::fs::read(path).unwrap();
    let data = memory.chunks(P).filter(|page| !is_zero(page)).count() * P;
    println!(
        "\n{}: {:.0} MiB, not zero {:.0} MiB",
        path.display(),
        mib(memory.len()),
        mib(data)
    );
    let (_, hashing) = timed(|| {
        for chunk in memory.chunks(64 << 10) {
            std::hint::black_box(blake3::keyed_hash(&[7; 32], chunk));
        }
    });
    println!(
        "BLAKE3, 64 KiB pieces: {:.0} MB/s",
        memory.len() as f64 / 1e6 / hashing.as_secs_f64()
    );
    println!(
        "| chunk | level | dictionary | stored | after dedup | hash + compress MB/s | decompress + verify MB/s | µs a chunk |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for size in [16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20] {
        let chunks = chunks(&memory, size);
        for level in [-5, -1, 1, 3, 6] {
            row(&chunks, data, size, level, None);
        }
        if size <= 64 << 10 {
            // Raw content: pieces from all over the image.
            let step = chunks.len() / 28 + 1;
            let dictionary: Vec<u8> = chunks
                .iter()
                .step_by(step)
                .flat_map(|chunk| &chunk[..P])
                .copied()
                .collect();
            row(&chunks, data, size, 1, Some(&dictionary));
        }
    }
}

fn row(chunks: &[Vec<u8>], data: usize, size: usize, level: i32, dictionary: Option<&[u8]>) {
    let dictionary = dictionary.unwrap_or_default();
    let mut compressor = zstd::bulk::Compressor::with_dictionary(level, dictionary).unwrap();
    let mut seen = HashSet::new();
    let (mut stored, mut once) = (0, 0);
    let (packed, packing) = timed(|| {
        let mut packed = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let name = blake3::keyed_hash(&[7; 32], chunk);
            let small = compressor.compress(chunk).unwrap();
            let length = small.len().min(chunk.len());
            stored += length;
            if seen.insert(*name.as_bytes()) {
                once += length;
            }
            packed.push(small);
        }
        packed
    });
    let mut decompressor = zstd::bulk::Decompressor::with_dictionary(dictionary).unwrap();
    let mut bytes = vec![0; size];
    let (_, unpacking) = timed(|| {
        for small in &packed {
            let length = decompressor
                .decompress_to_buffer(small, &mut bytes)
                .unwrap();
            std::hint::black_box(blake3::keyed_hash(&[7; 32], &bytes[..length]));
        }
    });
    println!(
        "| {} KiB | {level} | {} | {:.1} % | {:.1} % | {:.0} | {:.0} | {:.0} |",
        size >> 10,
        if dictionary.is_empty() {
            "–"
        } else {
            "112 KiB"
        },
        100.0 * stored as f64 / data as f64,
        100.0 * once as f64 / data as f64,
        data as f64 / 1e6 / packing.as_secs_f64(),
        data as f64 / 1e6 / unpacking.as_secs_f64(),
        1e6 * unpacking.as_secs_f64() / chunks.len() as f64,
    );
}

/// Levels take turns, over every eighth chunk, and the best turn counts: on a machine that others use, the rest is their noise.
fn levels(path: &Path) {
    let memory = std::fs::read(path).unwrap();
    let chunks: Vec<_> = chunks(&memory, 64 << 10).into_iter().step_by(8).collect();
    let data: usize = chunks.iter().map(Vec::len).sum();
    println!(
        "\n{}: {:.0} MiB of its pages, in chunks of 64 KiB",
        path.display(),
        mib(data)
    );
    println!(
        "| level | stored | name + compress MB/s | of that all RAM, zeros included | decompress + verify MB/s |"
    );
    println!("| --- | --- | --- | --- | --- |");
    let all = [-5, -3, -1, 1, 2, 3];
    let mut best = [(0, Duration::MAX, Duration::MAX); 6];
    for _ in 0..9 {
        for (level, best) in all.iter().zip(&mut best) {
            let mut compressor = zstd::bulk::Compressor::new(*level).unwrap();
            let (packed, packing) = timed(|| {
                let pack = |chunk: &Vec<u8>| {
                    std::hint::black_box(blake3::keyed_hash(&[7; 32], chunk));
                    compressor.compress(chunk).unwrap()
                };
                chunks.iter().map(pack).collect::<Vec<_>>()
            });
            let mut decompressor = zstd::bulk::Decompressor::new().unwrap();
            let mut bytes = vec![0; 64 << 10];
            let (_, unpacking) = timed(|| {
                for small in &packed {
                    let length = decompressor
                        .decompress_to_buffer(small, &mut bytes)
                        .unwrap();
                    std::hint::black_box(blake3::keyed_hash(&[7; 32], &bytes[..length]));
                }
            });
            *best = (
                packed.iter().map(Vec::len).sum(),
                best.1.min(packing),
                best.2.min(unpacking),
            );
        }
    }
    let pages = memory.chunks(P).filter(|page| !is_zero(page)).count() * P;
    let (_, looking) = timed(|| {
        memory
            .chunks(P)
            .filter(|page| std::hint::black_box(is_zero(page)))
            .count()
    });
    for (level, (stored, packing, unpacking)) in all.iter().zip(best) {
        let speed = |time: Duration| data as f64 / 1e6 / time.as_secs_f64();
        let whole = packing.as_secs_f64() * pages as f64 / data as f64 + looking.as_secs_f64();
        println!(
            "| {level} | {:.1} % | {:.0} | {:.0} | {:.0} |",
            100.0 * stored as f64 / data as f64,
            speed(packing),
            memory.len() as f64 / 1e6 / whole,
            speed(unpacking),
        );
    }
}

struct Nowhere;

impl Sink for Nowhere {
    fn write(&self, bytes: &[u8], _offset: u64) -> std::io::Result<()> {
        std::hint::black_box(bytes);
        Ok(())
    }
}

fn fresh(folder: &Path, name: &str, settings: Settings) -> (PathBuf, Store) {
    let place = folder.join(name);
    let _ = std::fs::remove_dir_all(&place);
    std::fs::create_dir_all(&place).unwrap();
    let store = Store::create(&place, settings).unwrap();
    (place, store)
}

/// CPU time of the whole process.
fn all_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        now.tv_sec.cast_unsigned(),
        u32::try_from(now.tv_nsec).unwrap(),
    )
}

fn store(path: &Path, folder: &Path) {
    println!(
        "| workers | capture: MB/s of data | a core | again | restore: MB/s | a core | stored |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for workers in [1, 0] {
        let (place, store) = fresh(folder, "measure", Settings::default());
        let mut took = Vec::new();
        let mut last = None;
        for _ in 0..2 {
            let (begun, used) = (Instant::now(), all_cpu());
            let mut writer = store
                .begin(Options {
                    workers,
                    ..Options::default()
                })
                .unwrap();
            let source = FileSource::new(File::open(path).unwrap()).unwrap();
            writer.image("memory", Kind::Memory, &source).unwrap();
            let (id, stored) = writer.commit().unwrap();
            took.push((
                stored.data_bytes as f64 / 1e6,
                begun.elapsed(),
                all_cpu() - used,
            ));
            last = Some(id);
        }
        let reader = store.read(last.unwrap()).unwrap();
        let (begun, used) = (Instant::now(), all_cpu());
        let bytes = reader.restore("memory", &Nowhere, workers).unwrap();
        took.push((bytes as f64 / 1e6, begun.elapsed(), all_cpu() - used));
        let speed = |at: usize| took[at].0 / took[at].1.as_secs_f64();
        let core = |at: usize| took[at].0 / took[at].2.as_secs_f64();
        let usage = store.usage().unwrap();
        println!(
            "| {workers} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} | {:.1} MiB |",
            speed(0),
            core(0),
            speed(1),
            speed(2),
            core(2),
            mib(usage.total() as usize),
        );
        std::fs::remove_dir_all(place).unwrap();
    }
}

/// Twenty snapshots with 8 MiB changed between each: what the store grows by, against what the changed pages alone take
/// when they are compressed as chunks of their own.
fn increments(path: &Path, folder: &Path) {
    let original = std::fs::read(path).unwrap();
    let pages: Vec<usize> = (0..original.len() / P)
        .filter(|page| !is_zero(&original[page * P..][..P]))
        .collect();
    println!(
        "| 8 MiB changed | compressed changed bytes | store grew by | ratio | of that manifests | extents at the end | capture |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for scattered in [false, true] {
        let mut memory = original.clone();
        let (place, store) = fresh(folder, "measure", Settings::default());
        let mut writer = store.begin(Options::default()).unwrap();
        writer.image("memory", Kind::Memory, &memory[..]).unwrap();
        let mut id = writer.commit().unwrap().0;
        let before = store.usage().unwrap().total();
        let mut seed = 5_u64;
        let mut random = move |limit: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % limit
        };
        let (mut alone, mut manifests, mut took) = (0, 0, Duration::ZERO);
        for _ in 0..20 {
            let start = random(pages.len() - 2048);
            let mut touched: Vec<usize> = if scattered {
                (0..2048).map(|_| pages[random(pages.len())]).collect()
            } else {
                pages[start..start + 2048].to_vec()
            };
            touched.sort_unstable();
            touched.dedup();
            // Contents as real as the rest: those of another page, with some words changed.
            for page in &touched {
                let from = pages[random(pages.len())] * P;
                let mut content = original[from..from + P].to_vec();
                for _ in 0..16 {
                    let at = random(P / 8) * 8;
                    content[at..at + 8].copy_from_slice(&(random(1 << 30) as u64).to_le_bytes());
                }
                memory[page * P..][..P].copy_from_slice(&content);
            }
            let changed: Vec<u8> = touched
                .iter()
                .flat_map(|page| &memory[page * P..][..P])
                .copied()
                .collect();
            let parts = changed.chunks(64 << 10).map(|chunk| {
                zstd::bulk::compress(chunk, Settings::default().level)
                    .unwrap()
                    .len()
            });
            alone += parts.sum::<usize>();
            let ranges: Vec<_> = touched
                .iter()
                .map(|page| (page * P) as u64..((page + 1) * P) as u64)
                .collect();
            let begun = Instant::now();
            let base = store.read(id).unwrap();
            let mut writer = store.begin(Options::default()).unwrap();
            writer
                .image_changed("memory", &memory[..], &base, &ranges)
                .unwrap();
            let (next, stored) = writer.commit().unwrap();
            took += begun.elapsed();
            manifests += stored.manifest_bytes;
            id = next;
        }
        let grew = store.usage().unwrap().total() - before;
        let extents = store
            .read(id)
            .unwrap()
            .image("memory")
            .unwrap()
            .extents
            .len();
        println!(
            "| {} | {:.1} MiB | {:.1} MiB | {:.2} | {:.1} MiB | {extents} | {:.0} ms each |",
            if scattered {
                "scattered pages"
            } else {
                "one run"
            },
            mib(alone),
            mib(grew as usize),
            grew as f64 / alone as f64,
            mib(manifests as usize),
            took.as_secs_f64() * 50.0,
        );
        std::fs::remove_dir_all(place).unwrap();
    }
}
