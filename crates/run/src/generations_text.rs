//! What people and programs read of the past states that a server keeps.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::generations::{PastState, is_suspect, shown_name};
use sprat_session::text;

use crate::watch::Shown;

/// One past state a line, oldest first.
#[must_use]
pub fn table(states: &[PastState], shown: &Shown) -> String {
    if states.is_empty() {
        return "no past states yet\n".to_owned();
    }
    let title = ["GENERATION", "LAST WRITE", "CURRENT FOR", "STATE"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    rows.extend(states.iter().map(|state| {
        vec![
            text::harmless_within(shown_name(state), 60),
            time(state.written_s).map_or_else(|| "-".to_owned(), |at| shown.time(at)),
            text::duration(Duration::from_secs(state.stood_s)),
            notes(state),
        ]
    }));
    text::table(&rows, &[2])
}

fn notes(state: &PastState) -> String {
    let all = [
        (is_suspect(state), "suspect: changed without the agent"),
        (state.in_order, "closed in order"),
        (state.pinned, "pinned"),
    ];
    let notes: Vec<&str> = all
        .iter()
        .filter_map(|(is_so, what)| is_so.then_some(*what))
        .collect();
    match notes.is_empty() {
        true => "-".to_owned(),
        false => notes.join(", "),
    }
}

/// The same for programs.
#[must_use]
pub fn list(states: &[PastState]) -> Value {
    let one = |state: &PastState| {
        json!({
            "name": shown_name(state),
            "last_write": time(state.written_s),
            "begun": time(state.begun_s),
            "current_seconds": state.stood_s,
            "container_bytes": state.len,
            "closed_in_order": state.in_order,
            "pinned": state.pinned,
            "suspect": is_suspect(state),
        })
    };
    states.iter().map(one).collect()
}

/// The time comes from the server, so it may be none.
fn time(at_s: u64) -> Option<Timestamp> {
    Timestamp::from_second(i64::try_from(at_s).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    #[test]
    fn a_past_state_is_a_line_whatever_the_server_says() {
        let state = |name: &str, written_s, in_order| PastState {
            name: sprat_session::address::Target::parse(
                &format!("h:{name}"),
                std::path::Path::new("/"),
            )
            .unwrap()
            .name,
            written_s,
            begun_s: written_s,
            stood_s: 86_400,
            len: 4096,
            in_order,
            pinned: in_order,
            kept_until_s: None,
        };
        let states = [
            state("2026-11-27T02-05-11Z.luks", 1_795_745_111, true),
            state("2026-11-28T02-05-11Z-suspect.luks", u64::MAX, false),
        ];
        let shown = Shown {
            now: Timestamp::UNIX_EPOCH,
            zone: TimeZone::UTC,
        };
        insta::assert_snapshot!(table(&states, &shown), @"
        GENERATION                    LAST WRITE        CURRENT FOR  STATE
        2026-11-27T02-05-11Z          2026-11-27 02:05      1 d 0 h  closed in order, pinned
        2026-11-28T02-05-11Z-suspect  -                     1 d 0 h  suspect: changed without the agent
        ");
        assert_eq!(table(&[], &shown), "no past states yet\n");
        let list = list(&states);
        assert_eq!(list[0]["last_write"], "2026-11-27T02:05:11Z");
        assert_eq!(list[1]["last_write"], Value::Null);
        assert_eq!(list[1]["suspect"], true);
    }
}
