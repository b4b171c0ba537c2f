//! What this machine can do with sandboxes. Every verb of the command line is a function here first.
#![deny(unsafe_code)]

pub mod accounting;
mod again;
pub mod assets;
pub mod bounded_log;
pub mod cgroup;
pub mod console;
pub mod cpu;
pub mod diagnosis;
pub mod disk;
pub mod doctor;
pub mod drive;
pub mod ending;
pub mod files;
pub mod guest;
pub mod inspect;
pub mod layered;
pub mod leftovers;
pub mod lifecycle;
pub mod logs;
pub mod pipe;
pub mod poll;
pub mod ports;
pub mod process;
pub mod registry;
pub mod sandbox;
pub mod size;
pub mod snapshots;
pub mod stages;
pub mod state;
pub mod supervisor;
pub mod symptoms;
pub mod sys;
pub mod system;
pub mod vmm;
pub mod wait;
pub mod watch;

/// How a command in a guest ended.
pub use belljar_protocol::v1::end::How as End;
pub use belljar_protocol::{AGENT_PORT, v1};
