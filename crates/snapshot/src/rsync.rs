//! The system's rsync: finds it, runs it as a child process, and parses its output.

mod ask;
mod guard;
mod invocation;
mod lines;
mod listed;
mod messages;
mod met;
mod no_links;
mod output;
mod pipe_search;
mod program;
mod room;
mod run;
mod scope;
mod stillness;
mod waiting;

pub(crate) use ask::within;
pub(crate) use guard::Guard;
pub(crate) use invocation::{Invocation, Side, TRANSFER_OPTIONS};
pub use listed::Excluded;
pub(crate) use listed::{Listed, Lists};
pub(crate) use messages::is_damage;
pub(crate) use met::Met;
pub(crate) use output::{Difference, Entry, ITEM_FORMAT, parse_difference, parse_entry};
pub(crate) use program::Rsync;
pub(crate) use room::volume_full_or;
pub(crate) use run::{Ended, ITEMS_MAX, Obstacle, Outcome, SeveralNames};
pub(crate) use scope::ends_run;
pub(crate) use stillness::{REPORT_AFTER, STILL_MAX, written_in};
pub(crate) use waiting::file_of_thread;
