//! Stories of those who drive the VMM by its API: with real guests, and with what can go wrong before one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod abuse;
mod balloon;
mod console;
mod descriptors;
mod drives;
mod endings;
mod kernels;
mod mistakes;
mod pause;
mod snapshot;
mod vsock;

use std::fs::File;

use belljar_e2e::vmm::Vmm;
use serde_json::json;

/// Deterministic bytes that do not compress or repeat: an xorshift generator.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A VMM with a kernel that only halts: a guest for what needs a running one, but not Linux.
fn halting() -> Vmm {
    let vmm = Vmm::new();
    let kernel = vmm.write("kernel", &belljar_e2e::files::halting_kernel());
    vmm.put("/boot-source", &json!({"kernel_image_path": kernel}));
    vmm
}

/// Opens a file to read.
fn open(path: impl AsRef<std::path::Path>) -> File {
    File::open(path).unwrap()
}
