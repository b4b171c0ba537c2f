//! Host resources behind devices: files, io_uring, sockets, descriptors. No virtio types.
#![allow(unsafe_code)]
pub mod output;
pub mod inherited;
pub mod unix;
