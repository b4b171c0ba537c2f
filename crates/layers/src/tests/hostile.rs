//! Files that are no layers, or not any more.
use std::fs::File;
use std::sync::Arc;

use proptest::prelude::*;

use super::{disk, file, named};
use crate::format::BLOCK;
use crate::{CLUSTER, Content, Damage, Error, Layer, LayerId, Medium, Stack, View, probe};

const SIZE: u64 = 64 * CLUSTER;

/// A layer with clusters 3 to 9, closed, after several flushes.
fn layer(base: &Arc<File>) -> Arc<File> {
    let top = file(0);
    let mut stack = disk(base, &top);
    for cluster in 3..10u8 {
        let at = u64::from(cluster) * CLUSTER;
        stack.write(&[cluster; CLUSTER as usize], at).unwrap();
        stack.flush().unwrap();
    }
    stack.close().unwrap();
    top
}

fn open(base: &Arc<File>, top: &Arc<File>) -> Result<Stack<Arc<File>>, Error> {
    Stack::open((Arc::clone(base), "base"), named(&[top]), true)
}

fn content(stack: &Stack<Arc<File>>) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    stack.read(&mut bytes, 0).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Header and map are checked down to the last bit: what is read is right, or refused.
    #[test]
    fn a_flipped_bit_of_a_closed_layer_is_noticed_or_harmless(
        bit in 0u64..(4 * BLOCK as u64) * 8,
    ) {
        let base = file(SIZE);
        let top = layer(&base);
        let wanted = content(&open(&base, &top).unwrap());
        let mut byte = [0];
        top.read(&mut byte, bit / 8).unwrap();
        top.write(&[byte[0] ^ (1 << (bit % 8))], bit / 8).unwrap();
        match open(&base, &top) {
            Ok(stack) => prop_assert!(content(&stack) == wanted),
            Err(Error::Damaged { .. }) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn a_layer_that_was_cut_is_refused(length in 0u64..(1 << 20) + SIZE) {
        let base = file(SIZE);
        let top = layer(&base);
        top.set_len(length).unwrap();
        if length == 0 {
            // An empty file is how a new layer is asked for.
            return Ok(());
        }
        let error = open(&base, &top).map(|_| ()).unwrap_err();
        prop_assert!(matches!(error, Error::Length { .. } | Error::Damaged { .. }), "{}", error);
    }

    #[test]
    fn any_bytes_are_refused_or_a_layer(seed in 0usize..3, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
        let mut bytes = probe::seeds().remove(seed);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        probe::layer(&bytes);
        probe::resealed(&bytes);
    }
}

#[test]
fn an_older_page_put_back_is_noticed_in_a_closed_layer() {
    let base = file(SIZE);
    let top = layer(&base);
    // Of both slots of page 0 the newer one is wiped out.
    for slot in [8192, 8192 + BLOCK as u64] {
        let mut before = [0; BLOCK];
        top.read(&mut before, slot).unwrap();
        top.write(&[0; BLOCK], slot).unwrap();
        let opened = open(&base, &top);
        top.write(&before, slot).unwrap();
        if let Err(error) = opened {
            let Error::Damaged { damage, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(damage, Damage::Map);
            return;
        }
    }
    panic!("no slot counts");
}

#[test]
fn an_unknown_version_is_said_and_a_foreign_file_too() {
    let base = file(SIZE);
    let top = layer(&base);
    for slot in [0, BLOCK as u64] {
        let mut block = [0; BLOCK];
        top.read(&mut block, slot).unwrap();
        block[8] = 2;
        let sum = crc32fast::hash(&block[..BLOCK - 4]).to_le_bytes();
        block[BLOCK - 4..].copy_from_slice(&sum);
        top.write(&block, slot).unwrap();
    }
    let error = open(&base, &top).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("version 2"), "{error}");
    let error = open(&base, &file(1 << 20)).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("does not begin"), "{error}");
}

/// A file that says it is for the largest disk costs little: its map is mostly a hole.
#[test]
fn the_largest_disk_is_opened_quickly() {
    let top = file(0);
    crate::create(&top, "huge", crate::MAX_SIZE, LayerId::BASE).unwrap();
    let started = std::time::Instant::now();
    let layer = Layer::open(Arc::clone(&top), "huge").unwrap();
    assert_eq!(layer.size(), crate::MAX_SIZE);
    assert!(started.elapsed().as_secs() < 5);
    assert!(crate::create(&file(0), "x", crate::MAX_SIZE + CLUSTER, LayerId::BASE).is_err());
}

/// The files of this version, which later ones must still read.
#[test]
fn the_fixtures_of_this_version_are_read() {
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures");
    for (name, state) in [
        ("frozen", crate::State::Frozen),
        ("cut", crate::State::Open),
    ] {
        let kept = std::fs::read(format!("{place}/{name}.v1")).unwrap();
        // Kept without the data, of which there is some in cluster 3: the name of the layer.
        let (top, size) = (file(0), 130u64 << 20);
        top.set_len((1 << 20) + size).unwrap();
        top.write(&kept, 0).unwrap();
        top.write(&[b'3'; CLUSTER as usize], (1 << 20) + 3 * CLUSTER)
            .unwrap();
        let layer = Layer::open(Arc::clone(&top), name).unwrap();
        assert_eq!((layer.state(), layer.size()), (state, size));
        assert_eq!(layer.id(), LayerId([0x11; 16]));
        if state == crate::State::Open {
            continue;
        }
        let view = View::open(vec![(top, name.to_owned())]).unwrap();
        let extents: Vec<_> = view.extents().map(Result::unwrap).collect();
        let places: Vec<_> = extents
            .iter()
            .map(|e| (e.offset / CLUSTER, e.length / CLUSTER, e.content))
            .collect();
        let wanted = [
            (3, 1, Content::Data),
            (4, 6, Content::Zero),
            (33_000, 100, Content::Zero),
        ];
        assert_eq!(places, wanted);
    }
}
