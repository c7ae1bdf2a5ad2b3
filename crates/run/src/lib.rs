//! What runs without a person: the config, what is due, conditions, hooks, events and notices.
//!
//! Above: `cli`. Below: `session`, `snapshot`.
#![forbid(unsafe_code)]

pub mod clock;
pub mod conditions;
pub mod due;
pub mod hooks;
pub mod notify;
