//! Header and map of a disk layer: as they come, and with checksums that are right.

use belljar_layers::probe;

pub(crate) fn layer(bytes: &[u8]) {
    probe::layer(bytes);
}

pub(crate) fn resealed(bytes: &[u8]) {
    probe::resealed(bytes);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    probe::seeds()
}
