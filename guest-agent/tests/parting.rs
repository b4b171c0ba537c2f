//! A worker does not outlive its holder.

// Helpers outside of test functions fail tests as the functions themselves do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::process::Command;

use common::{Agent, is_running, wait_until};

#[test]
fn a_worker_whose_holder_is_gone_ends() {
    let mut agent = Agent::start();
    assert!(agent.is_alive());
    let worker = agent.worker_pid().unwrap();
    let holder = agent.pid().to_string();
    let killed = Command::new("kill").args(["-KILL", &holder]).status();
    assert!(killed.unwrap().success());
    agent.wait();
    wait_until("the worker ends", || !is_running(worker));
}
