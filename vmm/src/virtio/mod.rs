//! virtio devices over MMIO (virtio 1.2). `device` is the contract, `mmio` the transport;
//! every device is one folder with the same file names.
pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod rng;
pub mod vsock;
