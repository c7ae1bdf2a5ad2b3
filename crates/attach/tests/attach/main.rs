//! A FUSE file, a loop device, file systems and processes, on a real kernel.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod btrfs;
#[path = "../roles/chain.rs"]
mod chain;
mod file_system;
mod kill;
mod support;
