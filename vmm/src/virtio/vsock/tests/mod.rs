//! The device against a driver and host programs of our own.
mod guest;
mod streams;
