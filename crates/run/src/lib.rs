//! What runs without a person: the config, what is due, conditions, hooks, events and notices; and the recovery sheet.
//!
//! Above: `cli`. Below: `session`, `inside`, `snapshot`; `luks` for keys.
//!
//! Always true:
//! - Nothing here reads the environment or prints; the caller passes both in and out.
//! - What depends on the time gets it from the caller, so a test plays years in a second.
//! - A mistake in the config is reported with file and line, and never guessed around.
#![forbid(unsafe_code)]

pub mod analyze_page;
pub mod analyze_text;
pub mod check_text;
pub mod clock;
pub mod completion;
pub mod conditions;
pub mod config;
pub mod copy_name;
pub mod copy_state;
pub mod copy_text;
pub mod day_part;
pub mod drill_text;
pub mod due;
pub mod export_text;
pub mod generations_text;
pub mod growth;
pub mod hooks;
mod html;
pub mod inside_text;
pub mod metrics;
pub mod notice_text;
pub mod notify;
pub mod overdue;
pub mod passphrase_command;
pub mod program;
pub mod progress_text;
pub mod prune_text;
pub mod public_status;
pub mod recovery_sheet;
pub mod restore_text;
pub mod run_history;
pub mod run_lock;
pub mod run_loop;
pub mod runner;
pub mod schedule;
pub mod secret_file;
pub mod setup;
pub mod snapshots_text;
pub mod sources;
pub mod state_file;
pub mod suggest;
pub mod target_disk;
pub mod timer;
pub mod times;
mod treemap;
pub mod watch;
