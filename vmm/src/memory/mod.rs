//! Guest RAM.
#![allow(unsafe_code)]
pub mod segment;

/// Guest RAM as every device sees it. Looked up on every access: a raw pointer that
/// outlives one request is how peers turned queue bugs into memory-safety bugs.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
