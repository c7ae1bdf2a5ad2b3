//! Everything that a user sees: results on stdout, the rest on stderr, as text or as JSON.

mod json;
mod reporter;
mod streams;

pub(crate) use json::{path_json, result_json};
pub(crate) use reporter::Reporter;
pub(crate) use sprat_session::json::{exit_json, failure_json};
pub(crate) use streams::{Output, complain};
