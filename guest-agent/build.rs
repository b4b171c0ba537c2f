//! Generates the message types of the protocol between worker and holder. The types of the outer
//! protocol that it uses are those of `belljar-protocol`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let outer = "../crates/protocol/proto";
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed={outer}");
    let files = protox::compile(["holder.proto"], ["proto", outer])?;
    let mut config = prost_build::Config::new();
    config.extern_path(".belljar.agent.v1", "::belljar_protocol::v1");
    config.compile_fds(files)?;
    Ok(())
}
