//! The whole program, against real servers, disks and file systems.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a failing test panics, and prints what it draws"
)]

mod alerts;
mod browse;
mod browser;
mod btrfs;
mod check;
mod check_disk;
mod commands;
mod copy;
mod copy_ends;
mod copy_lost;
mod copy_scene;
mod cost_page;
mod damage;
mod doctor;
mod drill;
mod export;
mod fio;
mod headers;
mod keys;
mod line;
mod lock;
mod log;
mod look_inside;
mod meet;
mod offline;
mod old_data;
mod other_server;
mod path;
mod prompts;
mod prune;
mod readme;
mod remove;
mod reserve;
mod restore;
mod room;
mod run;
mod run_room;
mod schedule;
mod server_clock;
mod setup;
mod sheet;
mod sheet_page;
mod silent_damage;
mod source_check;
mod sources;
mod status;
mod trips;
mod verbose;
mod year;
