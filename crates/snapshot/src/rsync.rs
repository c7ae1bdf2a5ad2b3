//! The system's rsync: finds it, runs it as a child, and turns what it prints into values.

mod guard;
mod lines;
mod messages;
mod output;
mod pipe_search;
mod program;
mod run;
mod scope;
mod stillness;
mod waiting;

pub(crate) use guard::Guard;
pub(crate) use output::ITEM_FORMAT;
pub(crate) use program::Rsync;
pub(crate) use run::{
    Ended, ITEMS_MAX, Invocation, Obstacle, Outcome, SeveralNames, Side, room_at,
};
pub(crate) use scope::ends_run;
pub(crate) use stillness::written_in;
