//! Exports and imports: whole, in parts, damaged, hostile.

use std::collections::HashSet;

use proptest::prelude::*;

use super::sim::{Fault, Plan, Sim};
use super::{Random, restored};
use crate::{Error, Imported, Kind, Options, Settings, SnapshotId, Store};

fn tiny() -> Settings {
    Settings {
        slot_bytes: 16 << 10,
        level: 1,
        pack_bytes: 48 << 10,
    }
}

fn store() -> (Sim, Store) {
    let sim = Sim::new();
    let store = Store::create_on(sim.fs(), tiny()).unwrap();
    (sim, store)
}

/// A store with a snapshot, its memory, and its stream.
fn exported(pages: usize) -> (Store, SnapshotId, Vec<u8>, Vec<u8>) {
    let (_, store) = store();
    let memory = Random(21).pages(pages, 7);
    let mut writer = store
        .begin(Options {
            workers: 1,
            ..Options::default()
        })
        .unwrap();
    writer.image("memory", Kind::Memory, &memory[..]).unwrap();
    writer.image("vm", Kind::State, &b"state"[..]).unwrap();
    let (id, _) = writer.commit().unwrap();
    let mut stream = Vec::new();
    store.export(id, 0, &mut stream, |_, _| ()).unwrap();
    (store, id, memory, stream)
}

fn import(store: &Store, mut stream: &[u8]) -> crate::Result<Imported> {
    store.import(&mut stream, |_, _| ())
}

#[test]
fn a_snapshot_travels_to_a_store_with_another_key() {
    let (from, id, memory, stream) = exported(200);
    let sim = Sim::new();
    sim.set("unrelated", Vec::new());
    let to = {
        let mut random = [0; 16];
        crate::fs::Fs::random(&sim, &mut random).unwrap();
        Store::create_on(sim.fs(), tiny()).unwrap()
    };
    assert!(matches!(import(&to, &stream).unwrap(), Imported::New(new, _) if new == id));
    assert_eq!(import(&to, &stream).unwrap(), Imported::Known(id));
    let reader = to.read(id).unwrap();
    assert!(restored(&reader, "memory").unwrap() == memory);
    assert_eq!(reader.read_all("vm", 9).unwrap(), b"state");
    let theirs: HashSet<_> = from
        .read(id)
        .unwrap()
        .manifest()
        .chunks
        .iter()
        .copied()
        .collect();
    assert!(
        !reader
            .manifest()
            .chunks
            .iter()
            .any(|chunk| theirs.contains(chunk)),
        "names are keyed"
    );
    assert!(sim.paths("incoming").is_empty());
    let mut again = Vec::new();
    to.export(id, 0, &mut again, |_, _| ()).unwrap();
    assert!(
        again == stream,
        "the stream of a snapshot is the same everywhere"
    );
}

#[test]
fn a_stream_that_broke_off_goes_on_where_it_was_after_a_restart_and_a_collection() {
    let (from, id, memory, stream) = exported(300);
    let (sim, to) = store();
    assert!(matches!(
        import(&to, &stream[..stream.len() * 2 / 3]),
        Err(Error::Stream(_))
    ));
    assert!(to.list().unwrap().is_empty());
    drop(to);
    let to = Store::open_on(sim.fs(), false).unwrap();
    to.gc(0).unwrap();
    let have = to.received(id);
    assert!(have > 10, "{have}");
    let mut rest = Vec::new();
    assert!(matches!(
        from.export(id, 100_000, &mut rest, |_, _| ()),
        Err(Error::Stream(_))
    ));
    from.export(id, have + 1, &mut rest, |_, _| ()).unwrap();
    assert!(matches!(import(&to, &rest), Err(Error::StreamGap { .. })));
    rest.clear();
    from.export(id, have, &mut rest, |_, _| ()).unwrap();
    assert!(rest.len() < stream.len() * 2 / 3);
    assert!(matches!(import(&to, &rest).unwrap(), Imported::New(..)));
    assert!(restored(&to.read(id).unwrap(), "memory").unwrap() == memory);
    // One that is never taken up again is forgotten.
    let (sim, to) = store();
    import(&to, &stream[..stream.len() / 2]).unwrap_err();
    sim.pass(8 * 24 * 3600 * 1000);
    to.gc(0).unwrap();
    assert_eq!(to.received(id), 0);
    assert!(sim.paths("packs").is_empty());
}

#[test]
fn an_import_that_fails_anywhere_can_be_done_again() {
    let (_, id, memory, stream) = exported(60);
    for at in 0..60 {
        let (sim, to) = store();
        sim.plan(Some(Plan {
            at: sim.calls() + at,
            fault: Fault::NoSpace,
            forever: true,
        }));
        let first = import(&to, &stream);
        sim.plan(None);
        if first.is_err() {
            // Only if nothing but the last sync failed, and the removal then too, it is there: whole.
            let listed = to.list().unwrap().len();
            assert!(listed == 0 || sim.paths("tmp").is_empty(), "call {at}");
            import(&to, &stream).unwrap();
        }
        assert!(restored(&to.read(id).unwrap(), "memory").unwrap() == memory);
    }
}

/// A stream with a good checksum around anything.
fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    bytes
}

#[test]
fn a_bomb_in_a_stream_is_refused() {
    let head = crate::proto::StreamHead {
        version: 1,
        stream: vec![1; 32],
        snapshot: vec![2; 16],
        first: 0,
        records: 1,
    };
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    let chunk = [
        &[1, 0, 0, 0][..],
        &(1_u32 << 20).to_le_bytes(),
        &[3; 32],
        &bomb,
    ]
    .concat();
    let stream = [
        &b"BELLJARX"[..],
        &framed(1, &prost::Message::encode_to_vec(&head)),
        &framed(2, &chunk),
    ]
    .concat();
    let (_, to) = store();
    let error = import(&to, &stream).unwrap_err().to_string();
    assert!(
        error.contains("record 0: it cannot be decompressed"),
        "{error}"
    );
    // A promise of 4 GiB takes no memory.
    let promise = [&b"BELLJARX"[..], &[3, 0, 0, 0, 0, 0, 0, 4]].concat();
    assert!(matches!(import(&to, &promise), Err(Error::Stream(_))));
}

#[test]
fn a_foreign_version_is_named() {
    let head = crate::proto::StreamHead {
        version: 7,
        ..Default::default()
    };
    let stream = [
        &b"BELLJARX"[..],
        &framed(1, &prost::Message::encode_to_vec(&head)),
    ]
    .concat();
    let (_, to) = store();
    assert!(matches!(
        import(&to, &stream),
        Err(Error::Version { found: 7, .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_changed_stream_brings_nothing_into_the_list(bit in any::<usize>(), cut in any::<bool>()) {
        let (_, _, _, mut stream) = exported(20);
        let bit = bit % (stream.len() * 8);
        if cut {
            stream.truncate(bit / 8);
        } else {
            stream[bit / 8] ^= 1 << (bit % 8);
        }
        let (_, to) = store();
        prop_assert!(import(&to, &stream).is_err());
        prop_assert!(to.list().unwrap().is_empty());
    }
}
