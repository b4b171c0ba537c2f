//! What the benchmark and the program in its guests share.
pub mod wire;
