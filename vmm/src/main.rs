//! Entry point of `belljar-vmm`: hands over to `machine`.
fn main() {}
