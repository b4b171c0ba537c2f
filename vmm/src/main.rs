//! Entry point of `belljar-vmm`: hands over to `machine`.
fn main() {
    std::process::exit(belljar_vmm::machine::main());
}
