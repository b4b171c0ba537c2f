//! The messages between holder and worker, and the numbers that both must agree on.

#![allow(unreachable_pub, clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/belljar.holder.rs"));

/// What each frame of output counts for beside its bytes, in the window of a channel.
pub(crate) const FRAME_COST: u64 = 64;

/// First byte of a frame that holds `FromHolder.output`: field 5, length-delimited.
pub(crate) const OUTPUT_TAG: u8 = (5 << 3) | 2;

/// Descriptors a worker is started with.
pub(crate) const LISTENER_FD: i32 = 3;
pub(crate) const CONTROL_FD: i32 = 4;

/// Most bytes of a message on the control socket.
pub(crate) const MAX_CONTROL: usize = 16 << 10;
