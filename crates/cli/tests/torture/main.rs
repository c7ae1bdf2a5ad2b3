//! Blows at random moments, in a short form, and in hours of a long one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test fails by a panic, and says what it draws"
)]

mod hostile;
mod kill;
mod line;
mod power;
mod strikes;
