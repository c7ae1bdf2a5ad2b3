//! How a run ended, and failures, as JSON: the same in every command.

use serde_json::{Value, json};

use crate::{Exit, Failure};

/// How a run ended.
#[must_use]
pub fn exit_json(exit: Exit) -> Value {
    json!({ "exit": exit, "code": exit.code() })
}

/// A failure, in results and on stderr.
#[must_use]
pub fn failure_json(failure: &Failure) -> Value {
    json!({
        "exit": failure.exit,
        "code": failure.exit.code(),
        "what": failure.what,
        "causes": failure.causes,
        "hint": failure.hint,
    })
}
