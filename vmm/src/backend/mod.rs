//! Host resources behind devices: files, io_uring, sockets, descriptors. No virtio types.
#![allow(unsafe_code)]
pub mod aside;
pub mod behind;
pub mod disk;
mod engine;
pub mod file;
pub mod inherited;
mod iovec;
pub mod layers;
pub mod output;
pub mod page_handler;
pub mod unix;
pub mod uring;
