//! virtio devices over MMIO (virtio 1.2). `device` is the contract, `mmio` the transport;
//! every device is one folder with the same file names.
pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod device;
pub mod mmio;
pub mod rng;
#[cfg(test)]
pub mod testing;
pub mod vsock;
