//! Tests of the stores and their leases, against real and hostile servers.

#![allow(
    clippy::single_range_in_vec_init,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "tests fail by panicking and print to the terminal"
)]

mod ahead;
mod contract;
mod copy;
mod flushes;
mod full_disk;
mod further;
mod hostile_server;
mod lock;
mod part;
mod sftp;
mod space;
