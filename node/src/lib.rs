//! What this machine can do with sandboxes. Every verb of the command line is a function here first.

pub mod assets;
pub mod drive;
pub mod size;
