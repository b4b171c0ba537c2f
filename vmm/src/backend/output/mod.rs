//! Where a guest's console output goes: a bounded ring of the last bytes, and readers of it.
//!
//! Readers (a file, a pipe, a terminal, a socket's client) have no buffer of their own, only a
//! position in the ring. One that is too slow loses the bytes that the ring has
//! overwritten; it cannot make the VMM wait or grow, and neither can the guest by writing fast.
mod printable;
mod scrollback;
mod sink;

pub use printable::printable;
pub use scrollback::Scrollback;
pub use sink::{Progress, Sink};
