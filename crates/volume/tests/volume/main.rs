//! Tests of the volume: order, cache, losses and takeovers.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "tests fail by panicking and print to the terminal"
)]

mod behaviour;
mod cache;
mod crash;
mod fault;
mod flush_window;
mod losses;
mod model;
mod read_ahead;
mod read_only;
mod replay;
mod sftp;
mod support;
