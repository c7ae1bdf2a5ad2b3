//! `[watch.NAME]`: a container file that other machines write into is overdue by its modification time.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::config;
use crate::copy_state::CopyState;

/// Notes when each file was last written to, as a success of that time. A file that is not there is as
/// if nothing had been written since it was first looked for.
pub(super) fn note(
    watches: &[config::Watch],
    states: &mut BTreeMap<String, CopyState>,
    now: Timestamp,
) {
    states.retain(|name, _| watches.iter().any(|watch| watch.name == *name));
    for watch in watches {
        let state = states.entry(watch.name.clone()).or_default();
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
}
