//! Stories of users at the command line, with real guests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod bench;
mod cli;
mod crashes;
mod doctor;
mod endurance;
mod failures;
mod files;
mod lifecycle;
mod overload;
mod processes;
mod run;
mod snapshots;
mod snapshots_in_place;
mod system;
mod terminals;
mod watch_ports;
mod worker;
