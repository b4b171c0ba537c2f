//! The device against a driver and host programs of our own.
mod bad_drivers;
mod guest;
mod host_side;
mod model;
mod restore;
mod streams;
