//! Headers against the stock `cryptsetup`, damage, a hostile server, and interrupted changes.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and say why they are skipped"
)]

mod change;
mod damage;
mod forge;
mod hostile;
mod interop;
mod kept;
mod kernel;
mod sectors;
mod stock;
