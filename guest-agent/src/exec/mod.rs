//! Running programs for the host: what to start ([`plan`], [`users`]), how it ends
//! ([`lifecycle`]), and the cgroup it lives in ([`cgroup`]).

pub(crate) mod cgroup;
pub(crate) mod lifecycle;
pub(crate) mod plan;
pub(crate) mod streams;
pub(crate) mod users;
