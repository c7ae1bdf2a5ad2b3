//! Past states of a container that its server keeps: the choice of one, and how it is opened.
//!
//! A past state is another target: a file beside the others, which nobody can write to. Nothing that this
//! machine knows of the container itself applies to it, and nothing that is found there changes what this
//! machine knows.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_snapshot::{MomentError, parse_moment};
use sprat_store::FileName;
pub use sprat_store::PastState;

use crate::address::Target;
use crate::settings::{IdentityPolicy, SessionSettings};
use crate::{Exit, Failure, SshOptions, connect, text};

/// The folder below the state folder for what is known of past states.
const FOLDER: &str = "generations";
/// Part of the name of a state that was changed past the server's agent.
const SUSPECT: &str = "-suspect";
const LATEST_BEFORE: &str = "latest-before:";

/// Which past state is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The one with this name, or else the newest one whose name begins so.
    Named(String),
    /// The newest one that was written last before this moment.
    LatestBefore(Timestamp),
}

impl Wanted {
    /// Parses a name, the beginning of a name, or `latest-before:TIME`.
    ///
    /// # Errors
    /// TIME is not a time.
    pub fn parse(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Self, MomentError> {
        Ok(match text.strip_prefix(LATEST_BEFORE) {
            Some(time) => Self::LatestBefore(parse_moment(time, now, zone)?),
            None => Self::Named(text.to_owned()),
        })
    }

    /// Chooses from `states`, oldest first.
    fn choose<'s>(&self, states: &'s [PastState]) -> Option<&'s PastState> {
        if let Self::Named(text) = self
            && let Some(exact) = states.iter().find(|state| shown_name(state) == text)
        {
            return Some(exact);
        }
        let is_meant = |state: &&PastState| match self {
            Self::Named(text) => !text.is_empty() && state.name.as_str().starts_with(text),
            // The server's times are whole seconds: in the second of the moment itself it may be later.
            Self::LatestBefore(moment) => {
                i64::try_from(state.written_s).is_ok_and(|written_s| written_s < moment.as_second())
            }
        };
        states.iter().rev().find(is_meant)
    }
}

/// The name that a user types: the file's name without its ending.
#[must_use]
pub fn shown_name(state: &PastState) -> &str {
    let name = state.name.as_str();
    name.strip_suffix(".luks").unwrap_or(name)
}

/// Whether the container was changed past the server's agent after this state, so that the state may be
/// damaged.
#[must_use]
pub fn is_suspect(state: &PastState) -> bool {
    state.name.as_str().contains(SUSPECT)
}

/// How many past states there are, and of which time.
#[must_use]
pub fn kept_in_words(states: &[PastState]) -> String {
    match (states.first(), states.last()) {
        (Some(first), Some(last)) => format!(
            "sprat-agent on the server keeps {}, from {} to {}",
            text::counted(states.len() as u64, "past state", "past states"),
            text::harmless(shown_name(first)),
            text::harmless(shown_name(last))
        ),
        _ => "sprat-agent on the server keeps no past states yet".to_owned(),
    }
}

/// The past states of `target`, oldest first.
///
/// # Errors
/// The server was not reached, or keeps no past states.
pub fn list(target: &Target, ssh: &SshOptions) -> Result<Vec<PastState>, Failure> {
    connect::past_states(target, ssh)?.ok_or_else(|| {
        Failure::failed(format!("the server keeps no past states of {target}")).with_hint(
            "nothing was changed. sprat-agent on the server keeps past states. For a snapshot of the \
             server's file system, give the path of the container file in it as TARGET, such as \
             server:.zfs/snapshot/NAME/x.luks",
        )
    })
}

/// Finds the past state that is meant.
///
/// # Errors
/// As [`list`]; or there is no such state.
pub fn find(target: &Target, ssh: &SshOptions, wanted: &Wanted) -> Result<PastState, Failure> {
    let states = list(target, ssh)?;
    wanted.choose(&states).cloned().ok_or_else(|| {
        Failure::new(
            Exit::NoContainer,
            format!("there is no such past state of {target}"),
        )
        .because(kept_in_words(&states))
        .with_hint("nothing was started. `sprat generations` lists them")
    })
}

/// What to do if the agent refuses a write to the header.
pub(crate) fn header_refused(container: &FileName) -> String {
    format!(
        "sprat-agent on the server refuses changes of the header. Ask the server's admin to run `sprat-agent \
         allow-header {container}` there, which allows them for 10 minutes"
    )
}

/// What to know after a change of the keys if an agent on the server keeps these past states. `removed`: a key was
/// removed.
#[must_use]
pub(crate) fn note_of_key_change(name: &FileName, states: &[PastState], removed: bool) -> String {
    let mut note = kept_in_words(states);
    if removed && !states.is_empty() {
        // The state before this change is the newest one, or will be.
        let last = states.iter().map(|state| state.kept_until_s).max();
        let last = last.flatten().and_then(|last| i64::try_from(last).ok());
        let day = last.and_then(|last| Timestamp::from_second(last).ok());
        let until = match day {
            Some(day) if !states.iter().any(|state| state.pinned) => format!(
                "until the last of them has expired: by the server's policy about {}, if backups go on",
                day.strftime("%Y-%m-%d")
            ),
            _ => "until the last of them has expired by the policy of the server".to_owned(),
        };
        note.push_str(&format!(
            ". The removed key still opens them, {until}. There, `sprat-agent list` lists them, and \
             `sprat-agent expire` removes one earlier"
        ));
    }
    note.push_str(&format!(
        ". By its policy the agent may report this change of the header as an alarm. Then the server's admin \
         confirms it with `sprat-agent ack {name}`. `sprat-agent allow-header {name}`, before a change, avoids the \
         alarm"
    ));
    note
}

impl SessionSettings {
    /// Changes the settings of a session that only reads, so that it reads this past state of the
    /// container. The past state must be one of the same container: what this machine knows of that is
    /// compared, except how new the header is.
    #[must_use]
    pub fn reading_past(mut self, state: &PastState) -> Self {
        self.target = connect::past_target(&self.target, state);
        self.machine_state_dir = Some(self.state_dir.clone());
        self.state_dir = self.state_dir.join(FOLDER);
        // Each state would have a cache of its own, which is rarely read twice.
        self.cache_bytes_max = 0;
        if let IdentityPolicy::Known(pins) = &mut self.pins {
            pins.sequence_id = 0;
        }
        self
    }

    /// Whether a past state is read.
    #[must_use]
    pub fn is_past(&self) -> bool {
        self.machine_state_dir.is_some()
    }

    /// The state folder of this machine. No restore may change it.
    pub(crate) fn machine_state_dir(&self) -> &std::path::Path {
        self.machine_state_dir.as_ref().unwrap_or(&self.state_dir)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Access;
    use crate::state::identity::tests::pins;

    fn state(name: &str, written_s: u64) -> PastState {
        PastState {
            name: FileName::new(name).unwrap(),
            written_s,
            begun_s: written_s + 60,
            stood_s: 60,
            len: 4096,
            in_order: true,
            pinned: false,
            kept_until_s: None,
        }
    }

    fn states() -> Vec<PastState> {
        [
            ("2026-11-27T02-05-11Z.luks", 1_795_745_111),
            ("2026-11-28T02-05-11Z.luks", 1_795_831_511),
            ("2026-11-28T02-05-11Z-2.luks", 1_795_831_511),
            ("2026-11-28T20-00-00Z-suspect.luks", 1_795_896_000),
        ]
        .map(|(name, written_s)| state(name, written_s))
        .to_vec()
    }

    fn chosen(text: &str) -> Option<String> {
        let now = "2026-11-29T12:00:00Z".parse().unwrap();
        let wanted = Wanted::parse(text, now, &TimeZone::UTC).unwrap();
        let states = states();
        wanted
            .choose(&states)
            .map(|state| shown_name(state).to_owned())
    }

    #[test]
    fn a_past_state_is_named_by_its_time_or_by_a_moment_after_it() {
        let cases = [
            ("2026-11-27", Some("2026-11-27T02-05-11Z")),
            ("2026-11-28T02", Some("2026-11-28T02-05-11Z-2")),
            ("2026-11-28T02-05-11Z.luks", Some("2026-11-28T02-05-11Z")),
            // Its name is the beginning of the next one's.
            ("2026-11-28T02-05-11Z", Some("2026-11-28T02-05-11Z")),
            ("2026-11-26", None),
            ("", None),
            (
                "latest-before:2026-11-28 02:05:11",
                Some("2026-11-27T02-05-11Z"),
            ),
            (
                "latest-before:2026-11-28 02:05:12",
                Some("2026-11-28T02-05-11Z-2"),
            ),
            ("latest-before:36h", Some("2026-11-27T02-05-11Z")),
            ("latest-before:2026-11-27 01:00", None),
        ];
        for (text, expected) in cases {
            assert_eq!(chosen(text).as_deref(), expected, "{text}");
        }
        let wrong = Wanted::parse("latest-before:soon", Timestamp::now(), &TimeZone::UTC);
        assert!(wrong.is_err());
    }

    #[test]
    fn after_the_removal_of_a_key_the_note_says_until_when_it_opens_past_states() {
        let name = FileName::new("x.luks").unwrap();
        let mut states = states();
        let unknown = "until the last of them has expired by the policy";
        assert!(note_of_key_change(&name, &states, true).contains(unknown));
        for (index, state) in states.iter_mut().enumerate() {
            state.kept_until_s = Some(1_827_000_000 + 86_400 * index as u64);
        }
        let note = note_of_key_change(&name, &states, true);
        assert!(note.contains("about 2027-11-26"), "{note}");
        assert!(!note_of_key_change(&name, &states, false).contains("2027"));
        states[0].pinned = true;
        assert!(note_of_key_change(&name, &states, true).contains(unknown));
        assert!(!note_of_key_change(&name, &[], true).contains("removed key"));
    }

    #[test]
    fn a_past_state_is_read_without_the_machines_memory_of_the_container() {
        let target = Target::parse("host:b/x.luks", Path::new("/")).unwrap();
        let mut settings = SessionSettings::new(
            target,
            Access::ReadOnly,
            "/var/lib/sprat".into(),
            "/run/sprat".into(),
        );
        assert!(!settings.is_past());
        settings.pins = IdentityPolicy::Known(pins());
        let past = settings.clone().reading_past(&states()[0]);
        assert_eq!(
            past.target.to_string(),
            "host:b/.generations/x.luks/2026-11-27T02-05-11Z.luks"
        );
        assert_ne!(past.state_dir, settings.state_dir);
        assert_eq!(past.machine_state_dir(), settings.state_dir);
        // The same container with an older header.
        assert!(matches!(past.pins, IdentityPolicy::Known(found)
            if found.sequence_id == 0 && found.fingerprint() == pins().fingerprint()));
    }
}
