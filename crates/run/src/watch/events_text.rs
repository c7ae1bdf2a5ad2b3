//! `notify list`: the events, what was delivered of each, and how the channels work.

use jiff::Timestamp;
use sprat_session::text;

use crate::notify::{Channel, ChannelStates, Event, Events, Report, Sender, State};

/// All of it, as text.
#[must_use]
pub fn events_text(
    events: &Events,
    channels: &[Channel],
    states: &ChannelStates,
    sender: &Sender,
) -> String {
    let time = |at: Timestamp| {
        let local = at.to_zoned_datetime(sender.zone.clone());
        local.strftime("%Y-%m-%d %H:%M").to_string()
    };
    let mut shown = String::new();
    for event in events.all() {
        shown.push_str(&headline(event, sender));
        shown.push('\n');
        for channel in channels {
            let mut delivered = event.delivered();
            let last = delivered.find(|(of, _)| *of == channel);
            let state = match last {
                Some((_, at)) => format!("delivered {}", time(at)),
                None => "not delivered".to_owned(),
            };
            shown.push_str(&format!("  {channel}: {state}\n"));
        }
    }
    if events.all().next().is_none() {
        shown.push_str("no event is open, and nothing waits to be sent\n");
    }
    shown.push('\n');
    for channel in channels {
        let state = states.channels.get(channel).cloned().unwrap_or_default();
        let how = match (state.failing_since, state.last_success) {
            (Some(since), _) => {
                let why = text::harmless(state.error.as_deref().unwrap_or_default());
                format!("FAILS since {}: {why}", time(since))
            }
            (None, Some(last)) => format!("works, last delivery {}", time(last)),
            (None, None) => "has delivered nothing yet".to_owned(),
        };
        shown.push_str(&format!("channel {channel}: {how}\n"));
    }
    if channels.is_empty() {
        shown.push_str("no channel is set in [notify]\n");
    }
    shown
}

fn headline(event: &Event, sender: &Sender) -> String {
    let state = if event.is_open() {
        State::Reminded
    } else {
        State::Passed
    };
    sender.headline(&Report {
        id: event.id.clone(),
        state,
        event: event.clone(),
    })
}
