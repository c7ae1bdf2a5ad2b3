//! What the crate answers, compared with an independent model of the source.
#![allow(clippy::unwrap_used, reason = "a failing test panics")]

mod analyzed;
mod costs;
mod days;
mod lookups;
mod model;
mod offline;
