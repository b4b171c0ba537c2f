//! What a store does when nothing goes wrong.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::sim::Sim;
use super::{Random, restored};
use crate::{Error, FileSource, Kind, Options, PAGE, Settings, SnapshotId, Store, Stored};

const P: usize = PAGE as usize;

fn small() -> Settings {
    Settings {
        slot_bytes: 64 << 10,
        level: 1,
        pack_bytes: 256 << 10,
    }
}

fn put(store: &Store, memory: &[u8]) -> (SnapshotId, Stored) {
    let mut writer = store.begin(Options::default()).unwrap();
    writer.image("memory", Kind::Memory, memory).unwrap();
    writer.commit().unwrap()
}

fn none() -> HashSet<SnapshotId> {
    HashSet::new()
}

#[test]
fn a_snapshot_comes_back_as_it_was_whole_and_in_pieces() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path(), small()).unwrap();
    let mut random = Random(1);
    let memory = random.pages(1500, 3);
    let disk = random.pages(40, 5)[..40 * P - 1000].to_vec();
    let mut writer = store
        .begin(Options {
            tags: vec!["latest".into()],
            labels: BTreeMap::from([("box".into(), "web".into())]),
            ..Options::default()
        })
        .unwrap();
    writer.image("memory", Kind::Memory, &memory[..]).unwrap();
    writer.image("disk:vdb", Kind::Disk, &disk[..]).unwrap();
    writer.image("vm", Kind::State, &b"state"[..]).unwrap();
    writer.image("empty", Kind::Disk, &b""[..]).unwrap();
    assert!(
        store.list().unwrap().is_empty(),
        "nothing half-made is listed"
    );
    let (id, _) = writer.commit().unwrap();
    drop(store);

    let store = Store::open(folder.path()).unwrap();
    assert!(matches!(Store::open(folder.path()), Err(Error::Locked)));
    let beside = Store::open_read_only(folder.path()).unwrap();
    for store in [&store, &beside] {
        let listed = store.list().unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(
            (listed[0].id, &listed[0].tags[..]),
            (id, &["latest".to_owned()][..])
        );
        assert_eq!(listed[0].labels["box"], "web");
        let reader = store.read(store.find("latest").unwrap()).unwrap();
        assert!(restored(&reader, "memory").unwrap() == memory);
        assert!(restored(&reader, "disk:vdb").unwrap() == disk);
        assert_eq!(reader.read_all("vm", 100).unwrap(), b"state");
        assert_eq!(reader.read_all("empty", 100).unwrap(), b"");
        assert!(matches!(
            reader.read_all("memory", 100),
            Err(Error::OutOfRange { .. })
        ));
        for _ in 0..300 {
            let from = random.below(memory.len() as u64) as usize;
            let length = random.below((memory.len() - from).min(3 * P) as u64 + 1) as usize;
            let mut piece = vec![0xee; length];
            reader.read("memory", from as u64, &mut piece).unwrap();
            assert!(piece == memory[from..from + length], "{from}+{length}");
        }
        let mut over = [0; 2];
        assert!(matches!(
            reader.read("vm", 4, &mut over),
            Err(Error::OutOfRange { .. })
        ));
        assert!(matches!(
            reader.read("ram", 0, &mut over),
            Err(Error::NoImage { .. })
        ));
        assert!(store.verify(|_, _| ()).unwrap().is_good());
    }
    assert!(matches!(
        beside.begin(Options::default()),
        Err(Error::ReadOnly)
    ));
    assert!(matches!(beside.gc(0), Err(Error::ReadOnly)));
}

#[test]
fn equal_pages_are_stored_once_within_and_across_snapshots() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let slot = Random(2).pages(16, u64::MAX);
    let memory = [&slot[..], &vec![0; 16 * P], &slot, &slot].concat();
    let (_, first) = put(&store, &memory);
    assert_eq!((first.new_chunks, first.known_chunks), (1, 2));
    assert_eq!(first.data_bytes, 3 * 16 * P as u64);
    let (id, second) = put(&store, &memory);
    assert_eq!((second.new_chunks, second.known_chunks), (0, 3));
    assert!(restored(&store.read(id).unwrap(), "memory").unwrap() == memory);
}

#[test]
fn increments_cost_what_changed_and_stand_alone() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut random = Random(3);
    let mut memory = random.pages(4096, 4);
    let (mut id, _) = put(&store, &memory);
    for round in 0..6 {
        let mut changed: Vec<Range<u64>> = Vec::new();
        for _ in 0..100 {
            let page = random.below(4096);
            let bytes = if random.below(10) == 0 {
                vec![0; P]
            } else {
                random.page()
            };
            memory[page as usize * P..][..P].copy_from_slice(&bytes);
            changed.push(page * PAGE..(page + 1) * PAGE);
        }
        let base = store.read(id).unwrap();
        let mut writer = store
            .begin(Options {
                parents: vec![id],
                ..Options::default()
            })
            .unwrap();
        writer
            .image_changed("memory", &memory[..], &base, &changed)
            .unwrap();
        let (next, stored) = writer.commit().unwrap();
        drop(base);
        assert!(stored.data_bytes <= 100 * PAGE, "round {round}: {stored:?}");
        store.remove(id, &none()).unwrap();
        store.gc(0).unwrap();
        assert!(
            restored(&store.read(next).unwrap(), "memory").unwrap() == memory,
            "round {round}"
        );
        id = next;
    }
    assert!(store.verify(|_, _| ()).unwrap().is_good());
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn an_image_may_grow_and_shrink_between_snapshots() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut disk = Random(4).pages(50, 9)[..50 * P - 7].to_vec();
    let mut writer = store.begin(Options::default()).unwrap();
    writer.image("disk", Kind::Disk, &disk[..]).unwrap();
    let (mut id, _) = writer.commit().unwrap();
    for length in [60 * P + 5, 20 * P + 100, 20 * P + 90, 33 * P] {
        disk.resize(length, 0xab);
        let base = store.read(id).unwrap();
        let mut writer = store.begin(Options::default()).unwrap();
        writer.image_changed("disk", &disk[..], &base, &[]).unwrap();
        drop(base);
        id = writer.commit().unwrap().0;
        assert!(
            restored(&store.read(id).unwrap(), "disk").unwrap() == disk,
            "{length}"
        );
    }
}

#[test]
fn holes_of_a_file_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = tempfile::tempfile_in(folder.path()).unwrap();
    let data = Random(5).pages(20, u64::MAX);
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 5 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end", (7 << 30) + 12_345).unwrap();
    let store = Store::create(folder.path(), small()).unwrap();
    let mut writer = store.begin(Options::default()).unwrap();
    writer
        .image("disk", Kind::Disk, &FileSource::new(file).unwrap())
        .unwrap();
    assert_eq!(writer.stored().data_bytes, 21 * PAGE);
    let (id, _) = writer.commit().unwrap();
    let reader = store.read(id).unwrap();
    let mut piece = vec![1; data.len() + 2 * P];
    reader.read("disk", (5 << 30) - PAGE, &mut piece).unwrap();
    assert!(piece[P..][..data.len()] == data && piece[..P].iter().all(|byte| *byte == 0));
    let mut end = [1; 5];
    reader.read("disk", (7 << 30) + 12_343, &mut end).unwrap();
    assert_eq!(&end, b"\0\0end");
    let out = tempfile::tempfile_in(folder.path()).unwrap();
    out.set_len((7 << 30) + 12_348).unwrap();
    assert_eq!(
        reader.restore("disk", &out, 0).unwrap(),
        data.len() as u64 + 12_348 % PAGE
    );
}

#[test]
fn what_is_named_pinned_read_or_live_is_kept_and_the_rest_goes_after_the_grace() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut random = Random(6);
    let memories: Vec<_> = (0..5).map(|_| random.pages(30, 9)).collect();
    let ids: Vec<_> = memories
        .iter()
        .map(|memory| put(&store, memory).0)
        .collect();
    store.tag("base", ids[0]).unwrap();
    store.pin(ids[1], true).unwrap();
    let reader = store.read(ids[2]).unwrap();
    let live = HashSet::from([ids[3]]);
    let why = |at: usize| match store.remove(ids[at], &live) {
        Err(Error::Kept { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(why(0), "it is tagged base");
    assert_eq!(why(1), "it is pinned");
    assert_eq!(why(2), "it is being read");
    assert_eq!(why(3), "a sandbox uses it");
    store.remove(ids[4], &live).unwrap();
    assert!(matches!(
        store.remove(ids[4], &live),
        Err(Error::NoSnapshot(_))
    ));

    let done = store.gc(1000).unwrap();
    assert_eq!((done.packs, done.deleted_bytes), (1, 0));
    sim.pass(999);
    assert_eq!(store.gc(1000).unwrap().deleted_bytes, 0);
    sim.pass(2);
    assert!(
        store.gc(1000).unwrap().deleted_bytes > done.bytes,
        "the manifest too"
    );
    assert!(sim.paths("trash").is_empty());
    drop(reader);
    store.tag("base", ids[2]).unwrap();
    store.untag("nothing").unwrap();
    store.remove(ids[0], &none()).unwrap();
    for at in 1..4 {
        assert!(restored(&store.read(ids[at]).unwrap(), "memory").unwrap() == memories[at]);
    }
}

#[test]
fn tags_move_and_labels_change_and_both_survive_reopening() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let first = put(&store, &[1; P]).0;
    let mut writer = store
        .begin(Options {
            tags: vec!["now".into()],
            ..Options::default()
        })
        .unwrap();
    writer.image("memory", Kind::Memory, &[2; P][..]).unwrap();
    store.tag("now", first).unwrap();
    let (second, _) = writer.commit().unwrap();
    store.tag("first", first).unwrap();
    store
        .label(first, BTreeMap::from([("a".into(), "b".into())]))
        .unwrap();
    store.set_budget(1 << 30).unwrap();
    drop(store);
    let store = Store::open_on(sim.fs(), false).unwrap();
    assert_eq!(store.find("now").unwrap(), second);
    assert_eq!(store.find("first").unwrap(), first);
    assert_eq!(store.find(&first.to_string()[..8]).unwrap(), first);
    assert!(matches!(store.find("no"), Err(Error::NoSnapshot(_))));
    let listed = store.list().unwrap();
    let of = |id| listed.iter().find(|snapshot| snapshot.id == id).unwrap();
    assert_eq!(of(first).tags, ["first"]);
    assert_eq!(of(first).labels["a"], "b");
    assert_eq!(of(second).tags, ["now"]);
    assert_eq!(store.usage().unwrap().budget, 1 << 30);
    assert!(matches!(store.tag("a b", first), Err(Error::Name { .. })));
    assert!(matches!(
        store.tag("x", SnapshotId([0; 16])),
        Err(Error::NoSnapshot(_))
    ));
}

#[test]
fn a_budget_is_kept_by_refusing_and_made_by_evicting_the_oldest() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut random = Random(7);
    let mut ids = Vec::new();
    for _ in 0..4 {
        sim.pass(10);
        ids.push(put(&store, &random.pages(64, 9)).0);
    }
    store.pin(ids[0], true).unwrap();
    let used = store.usage().unwrap();
    assert_eq!(used.total(), used.pack_bytes + used.manifest_bytes);
    store.set_budget(used.total() + 1000).unwrap();
    let mut writer = store.begin(Options::default()).unwrap();
    let more = random.pages(64, 9);
    let refused = writer
        .image("memory", Kind::Memory, &more[..])
        .and_then(|()| writer.commit());
    assert!(
        matches!(refused, Err(Error::OverBudget { .. })),
        "{refused:?}"
    );
    assert_eq!(store.list().unwrap().len(), 4);

    store.set_budget(used.total() / 2).unwrap();
    let would = store.evict(&none(), true).unwrap();
    assert_eq!(store.list().unwrap().len(), 4);
    let done = store.evict(&none(), false).unwrap();
    assert_eq!(done, would);
    assert_eq!(done.removed, [ids[1], ids[2]]);
    assert_eq!(done.kept, [(ids[0], "it is pinned".to_owned())]);
    assert!(done.suffices());
    store.gc(0).unwrap();
    let left = store.usage().unwrap();
    assert!(left.total() <= left.budget, "{left:?}");
    store.set_budget(1).unwrap();
    let done = store.evict(&HashSet::from([ids[3]]), false).unwrap();
    assert!(!done.suffices() && done.removed.is_empty() && done.kept.len() == 2);
}

#[test]
fn usage_tells_shared_from_unique() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut random = Random(8);
    let common = random.pages(64, u64::MAX);
    put(&store, &common);
    put(&store, &[&common[..], &random.pages(32, u64::MAX)].concat());
    let usage = store.usage().unwrap();
    let unique: Vec<_> = usage.snapshots.iter().map(|one| one.unique_bytes).collect();
    let stored: Vec<_> = usage.snapshots.iter().map(|one| one.stored_bytes).collect();
    assert_eq!(unique.iter().filter(|bytes| **bytes == 0).count(), 1);
    assert_eq!(
        stored.iter().max().unwrap() - stored.iter().min().unwrap(),
        *unique.iter().max().unwrap()
    );
    assert_eq!(usage.live_bytes, *stored.iter().max().unwrap());
}

#[test]
fn sparse_packs_are_rewritten_and_small_ones_joined() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut random = Random(9);
    let mut kept = Vec::new();
    for _ in 0..12 {
        let memory = random.pages(20, 9);
        kept.push((put(&store, &memory).0, memory));
    }
    assert_eq!(sim.paths("packs").len(), 12);
    let done = store.gc(0).unwrap();
    assert!(done.copied_bytes > 0);
    assert!(sim.paths("packs").len() < 5, "{}", sim.paths("packs").len());
    let store = {
        drop(store);
        Store::open_on(sim.fs(), false).unwrap()
    };
    for (id, memory) in &kept {
        assert!(restored(&store.read(*id).unwrap(), "memory").unwrap() == *memory);
    }
    for (id, _) in kept.drain(..9) {
        store.remove(id, &none()).unwrap();
    }
    let before = store.usage().unwrap();
    store.gc(0).unwrap();
    let after = store.usage().unwrap();
    assert!(
        after.pack_bytes < before.pack_bytes / 2,
        "{before:?} {after:?}"
    );
    assert!(store.verify(|_, _| ()).unwrap().is_good());
}

#[test]
fn a_dropped_writer_leaves_nothing_but_garbage() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let memory = Random(10).pages(600, 9);
    let mut writer = store.begin(Options::default()).unwrap();
    writer.image("memory", Kind::Memory, &memory[..]).unwrap();
    assert!(matches!(
        writer.image("memory", Kind::Memory, &memory[..]),
        Err(Error::Name { .. })
    ));
    assert!(matches!(writer.commit(), Err(Error::Poisoned)));
    assert!(sim.paths("tmp").is_empty());
    assert!(store.gc(0).unwrap().packs > 0);
    sim.pass(1);
    store.gc(0).unwrap();
    assert!(sim.paths("packs").is_empty() && sim.paths("trash").is_empty());
}

#[test]
fn a_reader_beside_the_writer_follows_what_a_collection_moves() {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), small()).unwrap();
    let mut random = Random(17);
    let beside = Store::open_on(sim.fs(), true).unwrap();
    let (mut kept, mut moved) = (Vec::new(), 0);
    for round in 0..12 {
        let memory = random.pages(20, 9);
        kept.push((put(&store, &memory).0, memory));
        if round % 4 == 3 {
            sim.pass(1);
            moved += store.gc(0).unwrap().packs;
        }
        for (id, memory) in &kept {
            assert!(restored(&beside.read(*id).unwrap(), "memory").unwrap() == *memory);
        }
    }
    assert!(moved > 0);
    assert_eq!(beside.list().unwrap().len(), 12);
}
