//! Messages, framing and client between the host and the agent in the guest.
//!
//! The protocol itself is written down in `proto/belljar/agent/v1/agent.proto` and in
//! `docs/agent-protocol.md`. [`frame`] and [`transfer`] are the pure part that both sides share,
//! [`client`] the host's side of a call, [`hybrid`] the way to a guest's vsock port through its VMM.

pub mod client;
pub mod frame;
pub mod hybrid;
pub mod relay;
pub mod transfer;

/// The generated message types of `belljar.agent.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/belljar.agent.v1.rs"));
}

/// Generation this crate speaks; see the compatibility rules in the `.proto` file.
pub const GENERATION: u32 = 2;

/// vsock port in the guest where the agent takes calls.
pub const AGENT_PORT: u32 = 1024;

/// vsock port on the host where the agent announces itself once with [`v1::Ready`].
pub const READY_PORT: u32 = 1025;

/// `VMADDR_CID_HOST`: the only peer the agent talks to.
pub const HOST_CID: u32 = 2;

/// Milliseconds between SIGTERM and SIGKILL where a call does not say.
pub const DEFAULT_GRACE_MS: u64 = 2000;
