//! A FUSE file, a loop device, file systems and processes, on a real kernel.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test fails by a panic, and says what it draws"
)]

#[path = "../roles/chain.rs"]
mod chain;
mod file_system;
mod kill;
mod support;
