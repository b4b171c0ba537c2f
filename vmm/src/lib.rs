//! `belljar-vmm`: one process, one microVM. `docs/architecture.md` is the map.
#![deny(unsafe_code)]

pub mod api;
pub mod arch;
pub mod backend;
pub mod bus;
pub mod config;
pub mod kvm;
pub mod legacy;
pub mod log;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod snapshot;
pub mod virtio;
