//! Entropy source (virtio 1.2 §5.4): fills the driver's buffers from the host's `getrandom`.
mod device;

pub use device::Rng;

#[cfg(test)]
mod tests;
