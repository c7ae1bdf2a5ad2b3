//! What a diagnosis found: one thing, how it is, and what to do about it.

use serde::Serialize;

use crate::{Failure, text};

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

/// All findings, one a line, and how many things are missing.
#[must_use]
pub fn table(findings: &[Finding], missing: usize) -> String {
    let rows: Vec<Vec<String>> = findings
        .iter()
        .flat_map(|found| {
            let state = match found.state {
                State::Fine => "ok",
                State::Weak => "weak",
                State::Missing => "MISSING",
            };
            let row = [
                state.to_owned(),
                found.what.clone(),
                text::harmless(&found.detail),
            ];
            let hint = found.hint.as_ref().filter(|_| found.state != State::Fine);
            let hint = hint.map(|hint| vec![String::new(), String::new(), format!("-> {hint}")]);
            std::iter::once(row.to_vec()).chain(hint)
        })
        .collect();
    let mut report = text::table(&rows, &[]);
    report.push_str(&match missing {
        0 => "nothing is missing\n".to_owned(),
        1 => "1 thing is missing\n".to_owned(),
        _ => format!("{missing} things are missing\n"),
    });
    report
}
