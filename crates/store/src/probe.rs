//! Entrances for fuzzers: each takes any bytes, and must return.

use prost::Message;

use crate::codec::Decompressor;
use crate::envelope::{self, Kind};
use crate::id::PackId;
use crate::manifest::Manifest;
use crate::{names, pack, proto, transfer};

/// As a sealed file of each kind, and as a manifest's message without the seal, which would hide it.
pub fn sealed(bytes: &[u8]) {
    for kind in [Kind::Identity, Kind::Names, Kind::Manifest, Kind::Incoming] {
        let _ = envelope::unseal(kind, "input", bytes);
    }
    if let Ok(manifest) = Manifest::decode("input", bytes) {
        for image in &manifest.images {
            let _ = image.extents_in(0..image.pages()).count();
        }
        let _ = manifest.encode();
    }
    let _ = names::Names::decode(bytes);
    let _ = proto::Incoming::decode(bytes);
}

/// As a pack: its index, what can be saved of it, and each chunk that is found.
pub fn pack(bytes: &[u8]) {
    let file = bytes.to_vec();
    let id = bytes
        .get(16..32)
        .and_then(PackId::from_slice)
        .unwrap_or(PackId([0; 16]));
    let index = pack::index(&file, "input", id);
    let saved = pack::salvage(&file, "input", id);
    let Ok(mut decoder) = Decompressor::new() else {
        return;
    };
    let mut into = Vec::new();
    for entry in index.iter().chain(&saved).flatten() {
        if let Ok(packed) = pack::read_record(&file, "input", entry) {
            let _ = decoder.unpack(packed.encoding, packed.raw_len, &packed.bytes, &mut into);
        }
    }
}

/// As an exported stream, as far as it can be read without a store.
pub fn stream(bytes: &[u8]) {
    transfer::probe(bytes);
}

/// Some good input for each of the three, by name.
#[must_use]
pub fn seeds() -> [(&'static str, Vec<Vec<u8>>); 3] {
    let file = |bytes: &[u8]| bytes.to_vec();
    let message = |bytes: &[u8]| {
        bytes
            .get(24..bytes.len().saturating_sub(32))
            .unwrap_or_default()
            .to_vec()
    };
    let manifest = include_bytes!("../fixtures/v1/manifest");
    let names = include_bytes!("../fixtures/v1/names");
    [
        (
            "sealed",
            vec![
                file(manifest),
                file(names),
                message(manifest),
                message(names),
            ],
        ),
        ("pack", vec![file(include_bytes!("../fixtures/v1/pack"))]),
        (
            "stream",
            vec![file(include_bytes!("../fixtures/v1/stream"))],
        ),
    ]
}
