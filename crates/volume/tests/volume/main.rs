//! Tests of the volume: order, cache, losses and takeovers.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
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
