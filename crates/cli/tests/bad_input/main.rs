//! What goes wrong, each with its message and exit code.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod field;
mod full_state;
mod limits;
mod server;
