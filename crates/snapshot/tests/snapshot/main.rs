//! Snapshots made, read, restored and removed by the real rsync.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod adopted;
mod census;
mod changes;
mod checked;
mod digested;
mod drilled;
mod excluded;
mod existing;
mod exported;
mod folded;
mod folder;
mod in_place;
mod interrupted;
mod judged;
mod listed;
mod lives;
mod mounted;
mod no_links;
mod on_btrfs;
mod preserve;
mod pruned;
mod pulled;
mod removed;
mod retention;
mod source_checked;
mod staged;
