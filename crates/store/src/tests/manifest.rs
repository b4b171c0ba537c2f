//! Manifests: what is written comes back, what cannot be is refused, overlays keep what did not change.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;

use crate::manifest::overlay;
use crate::{ChunkId, Extent, Image, Kind, Manifest, Requirements, SnapshotId};

fn sample() -> Manifest {
    let extent = |page, pages, chunk, chunk_page| Extent {
        page,
        pages,
        chunk,
        chunk_page,
    };
    Manifest {
        id: SnapshotId([7; 16]),
        created_ms: 1_700_000_000_000,
        parents: vec![SnapshotId([8; 16])],
        labels: BTreeMap::from([("box".into(), "web 1".into())]),
        requirements: Requirements {
            architecture: "x86_64".into(),
            cpu_baseline: "amd-1".into(),
            memory_bytes: 1 << 28,
            vcpus: 2,
            ..Requirements::default()
        },
        images: vec![
            Image {
                name: "memory".into(),
                kind: Kind::Memory,
                length: 1 << 28,
                extents: vec![
                    extent(0, 16, 1, 0),
                    extent(20, 3, 0, 13),
                    extent(65_000, 1, 1, 0),
                ],
            },
            Image {
                name: "vm".into(),
                kind: Kind::State,
                length: 5,
                extents: vec![extent(0, 1, 0, 0)],
            },
        ],
        chunks: vec![ChunkId([1; 32]), ChunkId([2; 32])],
    }
}

#[test]
fn a_manifest_comes_back_as_it_was() {
    let bytes = sample().encode();
    assert_eq!(Manifest::decode("x", &bytes).unwrap(), sample());
    assert!(bytes.len() < 250, "{}", bytes.len());
}

#[test]
fn extents_that_overlap_lie_outside_or_name_no_chunk_are_refused() {
    let with = |change: fn(&mut Manifest)| {
        let mut manifest = sample();
        change(&mut manifest);
        Manifest::decode("x", &manifest.encode())
            .unwrap_err()
            .to_string()
    };
    assert!(with(|m| m.images[0].extents[1].chunk = 2).contains("outside"));
    assert!(with(|m| m.images[0].extents[2].page = 1 << 16).contains("outside"));
    assert!(with(|m| m.images[0].extents[0].chunk_page = 241).contains("outside"));
    assert!(with(|m| m.images[0].extents[1].pages = 0).contains("outside"));
    // An overlap is a negative gap, which cannot be written: it wraps.
    assert!(with(|m| m.images[0].extents[1].page = 15).contains("out of range"));
    assert!(with(|m| m.images[1].name = "memory".into()).contains("two images"));
    assert!(with(|m| m.images[1].name = "../vm".into()).contains("no name"));
    assert!(with(|m| m.images[0].length = u64::MAX).contains("longer"));
    assert!(with(|m| m.labels = BTreeMap::from([("a b".into(), String::new())])).contains("label"));
}

#[test]
fn extents_are_cut_to_the_range_that_is_asked_for() {
    let manifest = sample();
    let found: Vec<_> = manifest.images[0].extents_in(14..22).collect();
    let parts: Vec<_> = found
        .iter()
        .map(|e| (e.page, e.pages, e.chunk_page))
        .collect();
    assert_eq!(parts, [(14, 2, 14), (20, 2, 13)]);
    assert_eq!(manifest.images[0].extents_in(23..65_000).count(), 0);
}

/// Which chunk page each page of an image comes from.
fn pages(extents: &[Extent], count: u64) -> Vec<Option<(u32, u32)>> {
    let mut pages = vec![None; count as usize];
    for extent in extents {
        for n in 0..extent.pages {
            let page = &mut pages[(extent.page + u64::from(n)) as usize];
            assert!(page.is_none(), "pages overlap");
            *page = Some((extent.chunk, extent.chunk_page + n));
        }
    }
    pages
}

fn layout(chunk: u32) -> impl Strategy<Value = Vec<Extent>> {
    proptest::collection::vec((0..6_u64, 1..6_u32), 0..12).prop_map(move |runs| {
        let mut at = 0;
        let place = |(gap, pages)| {
            let page = at + gap;
            at = page + u64::from(pages);
            Extent {
                page,
                pages,
                chunk,
                chunk_page: (page % 7) as u32,
            }
        };
        runs.into_iter().map(place).collect()
    })
}

#[test]
fn many_small_things_are_refused_before_they_are_large() {
    // Empty images; empty labels; empty base images within the requirements.
    let nested = [
        &[0x2a, 0x80, 0x80, 0x80, 0x04][..],
        &[0x2a, 0].repeat(4 << 20),
    ]
    .concat();
    for bytes in [
        [0x32, 0].repeat(16 << 20),
        [0x22, 0].repeat(16 << 20),
        nested,
    ] {
        let begun = std::time::Instant::now();
        let error = Manifest::decode("x", &bytes).unwrap_err().to_string();
        assert!(error.contains("more or larger fields"), "{error}");
        assert!(begun.elapsed().as_secs() < 5);
    }
}

proptest! {
    #[test]
    fn an_overlay_is_the_parent_but_for_what_changed(
        parent in layout(0), fresh in layout(1), bits in proptest::collection::vec(any::<bool>(), 160),
    ) {
        let mut changed: Vec<Range<u64>> = fresh.iter().map(|e| e.page..e.end()).collect();
        for (page, _) in bits.iter().enumerate().filter(|(_, set)| **set) {
            changed.push(page as u64..page as u64 + 1);
        }
        let changed = crate::cut::joined(changed);
        let (old, new) = (pages(&parent, 200), pages(&fresh, 200));
        let merged = pages(&overlay(&parent, &changed, &fresh), 200);
        for (page, found) in merged.iter().enumerate() {
            let is_changed = changed.iter().any(|range| range.contains(&(page as u64)));
            prop_assert_eq!(*found, if is_changed { new[page] } else { old[page] }, "page {}", page);
        }
    }

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Manifest::decode("x", &bytes);
    }

    #[test]
    fn a_changed_manifest_decodes_to_something_valid_or_is_refused(at in any::<usize>(), to in any::<u8>()) {
        let mut bytes = sample().encode();
        let at = at % bytes.len();
        bytes[at] = to;
        if let Ok(manifest) = Manifest::decode("x", &bytes) {
            prop_assert_eq!(&Manifest::decode("x", &manifest.encode()).unwrap(), &manifest);
            for image in &manifest.images {
                for extent in &image.extents {
                    prop_assert!(extent.end() <= image.pages());
                    prop_assert!((extent.chunk as usize) < manifest.chunks.len());
                }
            }
        }
    }
}
