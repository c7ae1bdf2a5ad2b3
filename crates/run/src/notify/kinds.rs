//! What an event is about: its kind, its subject and its cause.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::copy_name::CopyName;

/// The kind of an event, or of a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An attempt failed, a hook failed, or a channel failed for a day.
    Failure,
    /// The last attempt left an incomplete snapshot.
    Incomplete,
    /// A disk that a snapshot has was not there.
    Missing,
    /// No success for too long.
    Overdue,
    /// The container, or a source's content, is not what it was.
    Damage,
    /// More to upload than usual.
    Growth,
    /// More files changed than usual.
    Change,
    /// Pruning waits for a person.
    Held,
    /// Little room is left.
    Space,
    /// The config has a mistake, or a backup could not start because of what it names.
    Config,
    /// The clock of this machine is in doubt.
    Clock,
    /// One of the above closed. Only notices have this kind.
    Recovered,
    /// The regular summary.
    Digest,
}

impl Kind {
    /// All kinds, in the order of the documentation.
    pub const ALL: [Self; 13] = [
        Self::Failure,
        Self::Incomplete,
        Self::Missing,
        Self::Overdue,
        Self::Damage,
        Self::Growth,
        Self::Change,
        Self::Held,
        Self::Space,
        Self::Config,
        Self::Clock,
        Self::Recovered,
        Self::Digest,
    ];

    /// Its name in the config, in JSON and in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Failure => "failure",
            Self::Incomplete => "incomplete",
            Self::Missing => "missing",
            Self::Overdue => "overdue",
            Self::Damage => "damage",
            Self::Growth => "growth",
            Self::Change => "change",
            Self::Held => "held",
            Self::Space => "space",
            Self::Config => "config",
            Self::Clock => "clock",
            Self::Recovered => "recovered",
            Self::Digest => "digest",
        }
    }

    /// Whether `accept` closes an event of this kind.
    #[must_use]
    pub const fn is_acceptable(self) -> bool {
        matches!(
            self,
            Self::Growth | Self::Change | Self::Held | Self::Damage
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or(UnknownKind)
    }
}

/// A text that names no kind of event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no kind of event has this name")]
pub struct UnknownKind;

/// What has the event.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// One job in one container.
    Copy(CopyName),
    /// A container, by its name in the config.
    Container(String),
    /// A file that other machines write into, by its name in the config.
    Watch(String),
    /// A channel of notices. The others report it.
    Channel(Channel),
    /// This machine.
    Machine,
}

impl Subject {
    /// The container, where the subject is one or is a copy in one.
    #[must_use]
    pub fn container(&self) -> Option<&str> {
        match self {
            Self::Copy(copy) => Some(&copy.container),
            Self::Container(name) => Some(name),
            Self::Watch(_) | Self::Channel(_) | Self::Machine => None,
        }
    }

    /// The copy, where the subject is one.
    #[must_use]
    pub fn copy(&self) -> Option<&CopyName> {
        match self {
            Self::Copy(copy) => Some(copy),
            Self::Container(_) | Self::Watch(_) | Self::Channel(_) | Self::Machine => None,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Copy(copy) => copy.fmt(f),
            Self::Container(name) => f.write_str(name),
            Self::Watch(name) => write!(f, "watch {name}"),
            Self::Channel(channel) => write!(f, "notices by {channel}"),
            Self::Machine => f.write_str("this machine"),
        }
    }
}

/// A way of sending notices. Each address of `mail` is a channel of its own: one that is refused
/// neither stops nor repeats the mail to the others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Channel {
    /// Mail to this address.
    Mail(String),
    /// A notice on the screen of the person at this machine.
    Desktop,
    /// A program of the user.
    Command,
    /// A POST of JSON.
    Webhook,
    /// A POST of text.
    Ntfy,
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mail(address) => write!(f, "mail:{address}"),
            Self::Desktop => f.write_str("desktop"),
            Self::Command => f.write_str("command"),
            Self::Webhook => f.write_str("webhook"),
            Self::Ntfy => f.write_str("ntfy"),
        }
    }
}

impl From<Channel> for String {
    fn from(channel: Channel) -> Self {
        channel.to_string()
    }
}

impl TryFrom<String> for Channel {
    type Error = UnknownChannel;

    fn try_from(text: String) -> Result<Self, UnknownChannel> {
        match text.as_str() {
            "desktop" => Ok(Self::Desktop),
            "command" => Ok(Self::Command),
            "webhook" => Ok(Self::Webhook),
            "ntfy" => Ok(Self::Ntfy),
            other => match other.strip_prefix("mail:") {
                Some(address) => Ok(Self::Mail(address.to_owned())),
                None => Err(UnknownChannel),
            },
        }
    }
}

/// A text that names no channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no channel has this name")]
pub struct UnknownChannel;

/// Why an event is open: an exit code and a class, never a text. A new cause is reported again, a
/// new text is not.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cause {
    /// The exit code that belongs to it; 0 where there is none.
    pub code: u8,
    /// One word, such as `hook` or `min_free`.
    pub class: String,
}

impl Cause {
    /// Makes a cause.
    pub fn new(code: u8, class: impl Into<String>) -> Self {
        Self {
            code,
            class: class.into(),
        }
    }
}

/// What was found: the cause, and the words for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Decides whether it is reported again.
    pub cause: Cause,
    /// What happened, for a person. May name paths; never holds a secret. It goes to mail, `command`
    /// and `webhook` only.
    pub text: String,
    /// The state of the data, and the next step.
    pub hint: String,
}

/// Which event: two with the same key are one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// The kind. Never [`Kind::Recovered`].
    pub kind: Kind,
    /// What has it.
    pub subject: Subject,
    /// Which of several that can be open side by side: the disk of a [`Kind::Missing`], what found a
    /// [`Kind::Damage`]. Empty for other kinds.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub part: String,
}

impl Key {
    /// The key of a kind of which a subject has one.
    #[must_use]
    pub fn new(kind: Kind, subject: Subject) -> Self {
        Self {
            kind,
            subject,
            part: String::new(),
        }
    }

    /// A disk, by its identity, that was not there.
    pub fn missing(copy: CopyName, disk: impl Into<String>) -> Self {
        Self {
            kind: Kind::Missing,
            subject: Subject::Copy(copy),
            part: disk.into(),
        }
    }

    /// Damage, by what found it.
    #[must_use]
    pub fn damage(subject: Subject, found_by: FoundBy) -> Self {
        Self {
            kind: Kind::Damage,
            subject,
            part: found_by.name().to_owned(),
        }
    }
}

/// What found a damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    /// A command that ended with code 13.
    Command,
    /// A check.
    Check,
    /// A drill.
    Drill,
    /// A session that missed snapshots.
    Session,
    /// The re-hash of source files whose size and time stayed.
    Source,
}

impl FoundBy {
    /// Its name in the state file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Check => "check",
            Self::Drill => "drill",
            Self::Session => "session",
            Self::Source => "source",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kinds_and_channels_read_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("\"{}\"", kind.name()));
        }
        assert_eq!("failures".parse::<Kind>(), Err(UnknownKind));
        for channel in [
            Channel::Mail("a@b".to_owned()),
            Channel::Desktop,
            Channel::Command,
            Channel::Webhook,
            Channel::Ntfy,
        ] {
            assert_eq!(Channel::try_from(channel.to_string()), Ok(channel));
        }
        assert!(Channel::try_from("fax".to_owned()).is_err());
    }
}
