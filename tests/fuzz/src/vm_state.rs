//! The state of a machine, as a VMM restores it.

use belljar_vmm::snapshot::probe;

pub(crate) fn state(bytes: &[u8]) {
    probe::state(bytes);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    probe::seeds()
}
