//! Sessions: opened, written, struck and closed, on a real kernel.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod bad;
mod grow;
mod hold;
mod kill;
mod mount;
mod readers;
mod round_trip;
mod trim;
