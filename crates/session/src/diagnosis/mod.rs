//! Checks whether this machine, the sources and the servers are in order, for `doctor`.

mod finding;
mod host;
mod link_dest;
mod server;
mod sources;

pub use finding::{Finding, State, table};
pub use host::host;
pub use server::{ServerCheck, server};
pub use sources::sources;
