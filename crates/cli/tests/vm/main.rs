//! A stock kernel in a virtual machine: its own dm-crypt, ext4 and rsync.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod agent;
mod drops;
mod grow;
mod modes;
mod power;
mod qemu;
mod recovery;
mod schedule;
