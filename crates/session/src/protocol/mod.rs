//! What the processes of a session say to each other: messages, their frames on a socket, and how a
//! process is started.

pub(crate) mod frames;
pub(crate) mod messages;
pub(crate) mod reports;
pub(crate) mod spawn;
