//! Files that are damaged, cut, swapped or made up: an error, or the right bytes; never others, never a panic.
//! And files of every version that was ever written, which must stay readable.

use proptest::prelude::*;

use super::sim::Sim;
use super::{Random, restored};
use crate::{Error, Kind, Options, PAGE, Settings, SnapshotId, Store, probe};

const P: usize = PAGE as usize;

/// Two snapshots in three packs, with a tag and a pin.
fn made() -> (Sim, Vec<(SnapshotId, Vec<u8>)>) {
    let sim = Sim::new();
    let settings = Settings {
        slot_bytes: 16 << 10,
        level: 1,
        pack_bytes: 48 << 10,
    };
    let store = Store::create_on(sim.fs(), settings).unwrap();
    let mut random = Random(31);
    let mut made = Vec::new();
    for count in [40, 20] {
        let memory = random.pages(count, 6);
        let mut writer = store
            .begin(Options {
                workers: 1,
                ..Options::default()
            })
            .unwrap();
        writer.image("memory", Kind::Memory, &memory[..]).unwrap();
        made.push((writer.commit().unwrap().0, memory));
    }
    store.tag("first", made[0].0).unwrap();
    store.pin(made[1].0, true).unwrap();
    drop(store);
    (sim, made)
}

/// Uses the store in every way that reads; returns how many snapshots came back right.
fn used(sim: &Sim, made: &[(SnapshotId, Vec<u8>)]) -> Result<usize, Error> {
    let mut right = 0;
    for read_only in [true, false] {
        let store = Store::open_on(sim.fs(), read_only)?;
        right = 0;
        for snapshot in store.list()? {
            let (_, memory) = made
                .iter()
                .find(|(id, _)| *id == snapshot.id)
                .expect("it was made");
            if let Ok(bytes) = store
                .read(snapshot.id)
                .and_then(|reader| restored(&reader, "memory"))
            {
                assert!(bytes == *memory, "wrong bytes");
                right += 1;
            }
        }
        let verified = store.verify(|_, _| ())?;
        assert!(
            right == made.len() || !verified.is_good(),
            "what is broken is told"
        );
        let _ = store.usage();
        let _ = store.gc(u64::MAX);
    }
    Ok(right)
}

fn files(sim: &Sim) -> Vec<String> {
    [".", "packs", "manifests"]
        .iter()
        .flat_map(|folder| sim.paths(folder))
        .collect()
}

#[test]
fn a_damaged_index_loses_nothing_and_a_damaged_chunk_only_what_needs_it() {
    let (sim, made) = made();
    let pack = &sim.paths("packs")[0];
    let good = sim.bytes(pack);
    for cut in [1, 40, 64, 100] {
        sim.set(pack, good[..good.len() - cut].to_vec());
        assert_eq!(
            used(&sim, &made).unwrap(),
            2,
            "the last {cut} bytes are gone"
        );
        let store = Store::open_on(sim.fs(), false).unwrap();
        assert!(store.problems().iter().any(|problem| problem.path == *pack));
    }
    let mut bad = good;
    bad[96 + 48 + 500] ^= 1;
    sim.set(pack, bad);
    assert_eq!(used(&sim, &made).unwrap(), 1);
    let store = Store::open_on(sim.fs(), false).unwrap();
    let verified = store.verify(|_, _| ()).unwrap();
    assert_eq!((verified.damaged.len(), verified.broken.len()), (1, 1));
    let error = restored(&store.read(verified.broken[0].0).unwrap(), "memory").unwrap_err();
    assert!(matches!(error, Error::ChunkDamaged { .. }), "{error}");
}

#[test]
fn copies_stand_in_for_small_files_and_without_both_nothing_is_removed() {
    let (sim, made) = made();
    sim.set("store", b"nothing".to_vec());
    sim.set("names", b"nothing".to_vec());
    let store = Store::open_on(sim.fs(), false).unwrap();
    assert_eq!(store.problems().len(), 2);
    assert_eq!(store.find("first").unwrap(), made[0].0);
    drop(store);
    sim.set("names.copy", b"nothing".to_vec());
    let store = Store::open_on(sim.fs(), false).unwrap();
    assert_eq!(store.list().unwrap().len(), 2);
    for refused in [
        store.remove(made[0].0, &Default::default()),
        store.tag("x", made[0].0),
        store.evict(&Default::default(), false).map(drop),
    ] {
        // Nothing is to be evicted, as the budget is lost too.
        assert!(
            matches!(refused, Err(Error::Damaged { .. }) | Ok(())),
            "{refused:?}"
        );
    }
    assert_eq!(store.list().unwrap().len(), 2);
    drop(store);
    sim.set("store.copy", Vec::new());
    assert!(matches!(
        Store::open_on(sim.fs(), false),
        Err(Error::Damaged { .. })
    ));
}

#[test]
fn a_damaged_manifest_stops_collection_and_hides_only_itself() {
    let (sim, made) = made();
    let path = format!("manifests/{}", made[0].0);
    let mut bytes = sim.bytes(&path);
    *bytes.last_mut().unwrap() ^= 1;
    sim.set(&path, bytes);
    assert_eq!(used(&sim, &made).unwrap(), 1);
    let store = Store::open_on(sim.fs(), false).unwrap();
    assert!(matches!(store.gc(0), Err(Error::Damaged { .. })));
    // A manifest under another's name is not that one.
    sim.set(&path, sim.bytes(&format!("manifests/{}", made[1].0)));
    assert!(matches!(store.read(made[0].0), Err(Error::Damaged { .. })));
    let mut foreign = sim.bytes(&format!("manifests/{}", made[1].0));
    foreign[12] = 9;
    sim.set(&path, foreign);
    assert!(matches!(
        store.read(made[0].0),
        Err(Error::Version { found: 9, .. })
    ));
}

#[test]
fn a_pack_of_another_version_or_with_a_cipher_is_named_as_such() {
    let (sim, made) = made();
    let pack = &sim.paths("packs")[0];
    let good = sim.bytes(pack);
    for (at, value, told) in [(8, 2, "version 2"), (10, 1, "encrypted")] {
        let mut bytes = good.clone();
        bytes[at] = value;
        let sum = *blake3::hash(&bytes[..64]).as_bytes();
        bytes[64..96].copy_from_slice(&sum);
        sim.set(pack, bytes);
        assert!(used(&sim, &made).unwrap() < 2);
        let store = Store::open_on(sim.fs(), false).unwrap();
        let problems = store.problems();
        assert!(
            problems.iter().any(|problem| problem.what.contains(told)),
            "{problems:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_damage_to_any_file_gives_an_error_or_the_right_bytes(
        which in any::<prop::sample::Index>(), other in any::<prop::sample::Index>(), at in any::<usize>(), way in 0..5, seed in 1..u64::MAX,
    ) {
        let (sim, made) = made();
        let files = files(&sim);
        let path = &files[which.index(files.len())];
        let mut bytes = sim.bytes(path);
        let at = at % bytes.len().max(1);
        match way {
            0 => bytes[at] ^= 1 << (seed % 8),
            1 => bytes.truncate(at),
            // Reordered: two pieces change places.
            2 => bytes.rotate_left(at),
            3 => bytes = sim.bytes(&files[other.index(files.len())]),
            _ => {
                let mut random = Random(seed);
                bytes[at..].fill_with(|| random.next() as u8);
            }
        }
        sim.set(path, bytes);
        let _ = used(&sim, &made);
    }

    #[test]
    fn changed_seeds_and_noise_go_through_every_probe(seed in 1..u64::MAX, noise in proptest::collection::vec(any::<u8>(), 0..500)) {
        let mut random = Random(seed);
        for (name, mut seeds) in probe::seeds() {
            seeds.push(noise.clone());
            for mut bytes in seeds {
                for _ in 0..random.below(5) {
                    let at = random.below(bytes.len() as u64) as usize;
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = random.next() as u8;
                    }
                }
                match name {
                    "sealed" => probe::sealed(&bytes),
                    "pack" => probe::pack(&bytes),
                    _ => probe::stream(&bytes),
                }
            }
        }
    }
}

/// What the snapshot of the fixtures holds: a pattern, a hole, noise, and pages gathered from all over.
fn fixture_memory() -> Vec<u8> {
    let mut memory = vec![0; 64 * P];
    for (at, byte) in memory[..5 * P].iter_mut().enumerate() {
        *byte = (at / 64) as u8;
    }
    for page in [17, 33, 50] {
        memory[page * P..][..P].fill(page as u8);
    }
    memory
}

fn fixture_path(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/v1")
        .join(name)
}

/// Writes the fixtures of the current version: `cargo test -p belljar-store write_fixtures -- --ignored`.
/// Only for a new version, into a new folder: those that exist are kept as they are.
#[test]
#[ignore = "it changes the source tree"]
fn write_fixtures() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), Settings::default()).unwrap();
    let options = Options {
        workers: 1,
        tags: vec!["fixture".into()],
        labels: [("box".to_owned(), "web".to_owned())].into(),
        requirements: crate::Requirements {
            architecture: "x86_64".into(),
            memory_bytes: 64 * PAGE,
            vcpus: 1,
            ..Default::default()
        },
        ..Options::default()
    };
    let mut writer = store.begin(options).unwrap();
    writer
        .image("memory", Kind::Memory, &fixture_memory()[..])
        .unwrap();
    writer.image("vm", Kind::State, &b"state"[..]).unwrap();
    let (id, _) = writer.commit().unwrap();
    let mut stream = Vec::new();
    store.export(id, 0, &mut stream, |_, _| ()).unwrap();
    std::fs::write(fixture_path("stream"), stream).unwrap();
    for (name, path) in [
        ("store", "store".to_owned()),
        ("names", "names".to_owned()),
        ("manifest", format!("manifests/{id}")),
        ("pack", sim.paths("packs")[0].clone()),
    ] {
        let bytes = sim.bytes(&path);
        assert!(bytes.len() <= 4096, "{name}");
        std::fs::write(fixture_path(name), bytes).unwrap();
    }
}

#[test]
fn version_1_is_readable() {
    let file = |name| std::fs::read(fixture_path(name)).unwrap();
    let sim = Sim::new();
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let pack = file("pack");
    let names = file("names");
    // The id of the only snapshot: the last field of the only tag.
    let at = names
        .windows(7)
        .position(|window| window == b"fixture")
        .unwrap()
        + 9;
    let id = SnapshotId::from_slice(&names[at..at + 16]).unwrap();
    sim.set("store", file("store"));
    sim.set("names", names);
    sim.set(&format!("packs/{}.pack", hex(&pack[16..32])), pack);
    sim.set(&format!("manifests/{id}"), file("manifest"));
    let store = Store::open_on(sim.fs(), true).unwrap();
    assert_eq!(store.find("fixture").unwrap(), id);
    let listed = store.list().unwrap();
    assert_eq!((listed.len(), &listed[0].labels["box"][..]), (1, "web"));
    let check = |store: &Store| {
        let reader = store.read(id).unwrap();
        assert!(restored(&reader, "memory").unwrap() == fixture_memory());
        assert_eq!(reader.read_all("vm", 9).unwrap(), b"state");
        assert_eq!(reader.manifest().requirements.architecture, "x86_64");
    };
    check(&store);
    assert!(store.verify(|_, _| ()).unwrap().is_good());
    let mut stream = Vec::new();
    store.export(id, 0, &mut stream, |_, _| ()).unwrap();
    assert!(stream == file("stream"));

    let other = Store::create_on(Sim::new().fs(), Settings::default()).unwrap();
    other.import(&mut &stream[..], |_, _| ()).unwrap();
    check(&other);
}
