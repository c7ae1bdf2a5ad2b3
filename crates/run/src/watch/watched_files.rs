//! `[watch.NAME]`: a container file that other machines write into is overdue by its modification time.

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::Exit;

use super::{Watched, watch_file};
use crate::config;
use crate::copy_state::CopyState;
use crate::overdue::{is_overdue, overdue_at};

/// One watched file.
#[derive(Debug)]
pub struct WatchView {
    /// Its name in the config.
    pub name: String,
    /// When it was last written to; `None`: it was never seen.
    pub last_written: Option<Timestamp>,
    /// Whether it is overdue.
    pub is_overdue: bool,
    /// Since when, or from when on if nothing is written.
    pub overdue_at: Option<Timestamp>,
}

impl WatchView {
    /// Those of the config, in its order. Writes nothing.
    #[must_use]
    pub fn all(watched: &Watched<'_>, now: Timestamp) -> Vec<Self> {
        let watches = &watched.config.watches;
        if watches.is_empty() {
            return Vec::new();
        }
        let mut known = watch_file(&watched.state_dir).read().files;
        let view = |watch: &config::Watch| {
            let mut state = known.remove(&watch.name).unwrap_or_default();
            note(watch, &mut state, now);
            let after = Some(watch.alert_after);
            Self {
                name: watch.name.clone(),
                last_written: state.last_success,
                is_overdue: is_overdue(after, &state, now),
                overdue_at: overdue_at(after, &state, now),
            }
        };
        watches.iter().map(view).collect()
    }

    /// What a monitor should report of it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self.is_overdue {
            true => Exit::Overdue,
            false => Exit::Done,
        }
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "name": self.name,
            "last_written": self.last_written,
            "overdue": self.is_overdue,
            "overdue_at": self.overdue_at,
        })
    }
}

/// Notes when the file was last written to, as a success of that time. A file that is not there is as
/// if nothing had been written since the first check of it.
pub(super) fn note(watch: &config::Watch, state: &mut CopyState, now: Timestamp) {
    let written = watch.file.metadata().and_then(|about| about.modified());
    let written = written.ok().and_then(|time| Timestamp::try_from(time).ok());
    if let Some(written) = written {
        if state.last_success != Some(written) {
            state.found_overdue = None;
        }
        state.last_success = Some(written);
    }
    state.seen(now);
}
