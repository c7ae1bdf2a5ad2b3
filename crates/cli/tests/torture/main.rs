//! Blows at random moments, in a short form, and in hours of a long one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod hostile;
mod kill;
mod line;
mod power;
mod shrink;
mod strikes;
