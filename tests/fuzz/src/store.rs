//! What the store reads: sealed files and manifests, packs, exported streams.

use belljar_store::probe;

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let found = probe::seeds().into_iter().find(|(kind, _)| *kind == name);
    found.map(|(_, seeds)| seeds).unwrap_or_default()
}

pub(crate) fn sealed(bytes: &[u8]) {
    probe::sealed(bytes);
}

pub(crate) fn sealed_seeds() -> Vec<Vec<u8>> {
    seeds("sealed")
}

pub(crate) fn pack(bytes: &[u8]) {
    probe::pack(bytes);
}

pub(crate) fn pack_seeds() -> Vec<Vec<u8>> {
    seeds("pack")
}

pub(crate) fn stream(bytes: &[u8]) {
    probe::stream(bytes);
}

pub(crate) fn stream_seeds() -> Vec<Vec<u8>> {
    seeds("stream")
}
