//! Events and the channels that report them.
//!
//! `kinds` has the words, `events` the state machine.

pub mod events;
pub mod kinds;

pub use events::{Attempt, By, Event, Events, Report, State, Wanted, Words};
pub use kinds::{Cause, Channel, Finding, FoundBy, Key, Kind, Subject};
