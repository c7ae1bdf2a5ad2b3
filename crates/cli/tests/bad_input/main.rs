//! What goes wrong, each with its message and exit code.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test fails by a panic, and says what it draws"
)]

mod field;
mod limits;
mod server;
