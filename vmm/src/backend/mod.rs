//! Host resources behind devices: files, io_uring, sockets, descriptors. No virtio types.
#![allow(unsafe_code)]
mod iovec;
pub mod disk;
pub mod file;
pub mod inherited;
pub mod output;
pub mod unix;
pub mod uring;
