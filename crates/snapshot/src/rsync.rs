//! The system's rsync: finds it, runs it as a child, and turns what it prints into values.

mod messages;
mod output;
mod program;
mod run;
mod stillness;

pub(crate) use program::Rsync;
pub(crate) use run::{Ended, Invocation, Outcome, Side, room_at};
