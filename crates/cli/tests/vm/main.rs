//! A stock kernel in a virtual machine: its own dm-crypt, ext4 and rsync.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test fails by a panic, and says what it draws"
)]

mod grow;
mod modes;
mod power;
mod qemu;
mod recovery;
