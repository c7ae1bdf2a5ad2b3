//! Sessions and containers for tests, by the library; never ships.
//!
//! Above: the tests of `cli`. Below: `session`, `snapshot`, `luks`, `testkit`.
//!
//! Always true:
//! - Touching a session or the header rebuilds only the tests that need this crate: it is a crate of
//!   its own for that reason.
#![forbid(unsafe_code)]

pub mod plain_volume;
pub mod session_harness;
