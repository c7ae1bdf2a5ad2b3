//! Events and the channels that report them.
//!
//! `kinds` has what an event is about, `events` the state machine, `words` the texts, `channels` the ways
//! out, and `delivery` the repetitions until something has arrived.

pub mod channels;
pub mod delivery;
pub mod digest;
pub mod events;
pub mod kinds;
pub mod private_text;
pub mod words;

pub use channels::{Channels, Network};
pub use delivery::{ChannelState, ChannelStates, Delivery, Notifier, Outcome, Tick};
pub use events::{Attempt, By, Event, Events, Report, State, Wanted, Words};
pub use kinds::{Cause, Channel, Finding, FoundBy, Key, Kind, Subject};
pub use private_text::PrivateText;
pub use words::Sender;
