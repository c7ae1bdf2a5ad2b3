//! The stores and their leases, against real and hostile servers.

#![allow(
    clippy::single_range_in_vec_init,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test fails by a panic, and says what it draws"
)]

mod contract;
mod copy;
mod flushes;
mod hostile_server;
mod lock;
mod part;
mod sftp;
mod space;
