//! A range of guest RAM.
use vm_memory::GuestAddress;

/// One buffer of a request: `len` bytes of guest RAM at `addr`. Plain numbers: whoever
/// touches the bytes looks the range up in `GuestRam` again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub addr: GuestAddress,
    pub len: u32,
}
