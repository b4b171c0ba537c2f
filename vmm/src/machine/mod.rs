//! The only module that sees all the others: builds the guest, runs the event loop, carries
//! out what the API asks for, and decides how the process ends.
mod ahead;
mod assemble;
mod devices;
mod ending;
mod events;
mod faults;
mod guest;
mod image;
mod ready;
mod restore;
mod run;
mod save;
mod signals;

pub use ending::Ending;
pub use run::main;
