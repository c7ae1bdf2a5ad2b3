//! What a diagnosis found: one thing, how it is, and what to do about it.

use serde::Serialize;

use crate::Failure;

/// One thing that was checked.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What was checked.
    pub what: String,
    /// How it is.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How a checked thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Fine,
    /// It works, but is slower or less safe.
    Weak,
    /// It does not work.
    Missing,
}

impl Finding {
    /// A finding without a hint.
    pub fn new(what: impl Into<String>, state: State, detail: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            state,
            detail: detail.into(),
            hint: None,
        }
    }

    /// A check that failed.
    pub fn failed(what: impl Into<String>, failure: &Failure) -> Self {
        Self {
            hint: failure.hint.clone(),
            ..Self::new(what, State::Missing, failure.in_one_line())
        }
    }

    /// Sets the hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
