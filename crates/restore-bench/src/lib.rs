//! How soon a saved guest answers again: `belljar bench restore`, and what other benchmarks share with it.
//!
//! It drives VMMs as processes, by the API of docs/api.md, so that any of them can be compared; docs/restore-benchmark.md
//! tells what is measured.

pub mod archive;
pub mod cache;
pub mod failure;
pub mod host;
pub mod http;
pub mod lazy;
pub mod page;
pub mod record;
pub mod run;
pub mod settings;
pub mod stats;
pub mod subject;
pub mod vmm;
pub mod wire;
