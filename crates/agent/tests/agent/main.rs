//! Tests of sprat-agent as a program: by raw requests, by sshd with stock clients, and under kill -9.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "tests fail by panicking and print to the terminal"
)]

mod accounts;
mod client;
mod clones;
mod commands;
mod confined;
mod damage;
mod days;
mod drops;
mod expiry;
mod fence;
mod full;
mod generations;
mod header;
mod hostile;
mod interleaved;
mod keepers;
mod kills;
mod limits;
mod mangled;
mod outside;
mod requests;
mod sessions;
mod siege;
mod slots;
mod sprat;
mod steps;
mod stock;
mod storm;
mod watched;
