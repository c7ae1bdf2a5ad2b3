//! The one error type that reaches the user, and the exit codes.

mod mapping;

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

/// How a run of sprat ended. The numbers are stable; scripts rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// Everything asked for is done, and durable on the server where that applies.
    Done,
    /// It failed, and no other code says it better.
    Failed,
    /// The command line or the config is wrong; nothing was started.
    Usage,
    /// The snapshot is made, but some source files could not be read.
    Unread,
    /// A copy has had no success for too long. Only commands that watch copies end so.
    Overdue,
    /// There is a container already, and the key opens it. Only `init --if-missing` ends so.
    Exists,
    /// There is no container at the target.
    NoContainer,
    /// Another session holds the container.
    Locked,
    /// The key file or passphrase opens none of the key slots.
    WrongKey,
    /// The remote data is damaged, or is not what was pinned.
    Damaged,
    /// The server was not reached, or was lost for longer than allowed.
    Unreachable,
    /// Ctrl-C, SIGTERM or SIGHUP ended it in order.
    Interrupted,
}

impl Exit {
    /// Every exit code, in the order of the numbers.
    pub const ALL: [Self; 12] = [
        Self::Done,
        Self::Failed,
        Self::Usage,
        Self::Unread,
        Self::Overdue,
        Self::Exists,
        Self::NoContainer,
        Self::Locked,
        Self::WrongKey,
        Self::Damaged,
        Self::Unreachable,
        Self::Interrupted,
    ];

    /// The process's exit status.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Unread => 3,
            Self::Overdue => 4,
            Self::Exists => 5,
            Self::NoContainer => 10,
            Self::Locked => 11,
            Self::WrongKey => 12,
            Self::Damaged => 13,
            Self::Unreachable => 14,
            Self::Interrupted => 130,
        }
    }

    /// Of several things: the one that a monitor should report first.
    pub fn worst(exits: impl Iterator<Item = Self>) -> Self {
        let rank = |exit: &Self| match exit {
            Self::Interrupted => 10,
            Self::Damaged => 9,
            Self::WrongKey => 8,
            Self::NoContainer => 7,
            Self::Usage => 6,
            Self::Failed => 5,
            Self::Overdue => 4,
            Self::Unreachable => 3,
            Self::Locked => 2,
            Self::Unread => 1,
            Self::Done | Self::Exists => 0,
        };
        exits.max_by_key(rank).unwrap_or(Self::Done)
    }

    /// What the code says, in the words of the documentation.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Usage => "wrong command line or config; nothing was started",
            Self::Unread => "snapshot made, some source files unread",
            Self::Overdue => "a backup is overdue",
            Self::Exists => "init --if-missing: the container is there, and the key opens it",
            Self::NoContainer => "no container there",
            Self::Locked => "locked by another session",
            Self::WrongKey => "wrong key file or passphrase",
            Self::Damaged => "container damaged, or not the one that this machine knows",
            Self::Unreachable => "server not reached",
            Self::Interrupted => "interrupted",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Why a command failed, ready to be shown; it also travels over the control sockets between
/// sprat's processes. Never holds a secret. Text of foreign origin is escaped when it is printed,
/// not here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What happened, one line, without a full stop.
    pub what: String,
    /// What caused it, nearest first.
    pub causes: Vec<String>,
    /// The state of the data and the next step.
    pub hint: Option<String>,
    /// The volume or the server has too little room. A prune may help.
    #[serde(default)]
    pub lacks_room: bool,
}

impl Failure {
    /// A failure without causes and hint.
    #[must_use]
    pub fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self {
            exit,
            what: what.into(),
            causes: Vec::new(),
            hint: None,
            lacks_room: false,
        }
    }

    /// A wrong command line or config.
    #[must_use]
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Exit::Usage, what)
    }

    /// A failure that no special exit code describes.
    #[must_use]
    pub fn failed(what: impl Into<String>) -> Self {
        Self::new(Exit::Failed, what)
    }

    /// The end after Ctrl-C, SIGTERM or SIGHUP.
    #[must_use]
    pub fn interrupted() -> Self {
        Self::new(Exit::Interrupted, "interrupted")
    }

    /// Appends one cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Appends `error` and the chain of its sources as causes.
    #[must_use]
    pub fn caused_by(mut self, error: &dyn Error) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            if self.causes.last() != Some(&text) {
                self.causes.push(text);
            }
            next = error.source();
        }
        self
    }

    /// What failed and why, without the hint.
    pub fn in_one_line(&self) -> String {
        let mut text = self.what.clone();
        for cause in &self.causes {
            text.push_str(": ");
            text.push_str(cause);
        }
        text
    }

    /// Marks it as one for lack of room, if `lacks` is true.
    #[must_use]
    pub fn for_lack_of_room(mut self, lacks: bool) -> Self {
        self.lacks_room = lacks;
        self
    }

    /// Sets the hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Appends a sentence to the hint.
    #[must_use]
    pub fn with_more_hint(mut self, more: &str) -> Self {
        self.hint = Some(match self.hint {
            Some(hint) => format!("{}. {more}", hint.trim_end_matches('.')),
            None => more.to_owned(),
        });
        self
    }

    /// Puts a sentence about the state of the data before the hint.
    #[must_use]
    pub fn with_state(mut self, state: &str) -> Self {
        self.hint = Some(match self.hint {
            Some(hint) => {
                let mut letters = hint.chars();
                let first = letters.next().into_iter().flat_map(char::to_uppercase);
                format!("{state}. {}{}", first.collect::<String>(), letters.as_str())
            }
            None => state.to_owned(),
        });
        self
    }

    /// Merges a failure with a later one that followed from it, such as that of closing a session. The more
    /// special of the two says what happened; the other one becomes a cause.
    #[must_use]
    pub fn merge(self, later: Self) -> Self {
        if self == later {
            return self;
        }
        let special = |failure: &Self| !matches!(failure.exit, Exit::Failed | Exit::Done);
        let (mut main, other) = if special(&self) || !special(&later) {
            (self, later)
        } else {
            (later, self)
        };
        main.causes.push(format!("also: {}", other.what));
        main.causes.extend(other.causes);
        main.hint = main.hint.or(other.hint);
        main.lacks_room |= other.lacks_room;
        main
    }

    /// Puts `what` in front: the present first line becomes the first cause.
    #[must_use]
    pub fn context(mut self, what: impl Into<String>) -> Self {
        let inner = std::mem::replace(&mut self.what, what.into());
        self.causes.insert(0, inner);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for Failure {}

#[cfg(test)]
mod tests {
    use sprat_snapshot::{NameList, SnapshotError};

    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes: Vec<u8> = Exit::ALL.iter().map(|exit| exit.code()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 130]);
        let page = include_str!("../../../../docs/exit-codes.md");
        let documented: Vec<String> = page
            .lines()
            .filter_map(|line| line.strip_prefix("| "))
            .filter(|row| row.starts_with(|c: char| c.is_ascii_digit()))
            .map(|row| row.split(" | ").take(2).collect::<Vec<_>>().join(" "))
            .collect();
        let known: Vec<String> = Exit::ALL
            .iter()
            .map(|exit| format!("{} {}", exit.code(), exit.meaning()))
            .collect();
        assert_eq!(documented, known);
    }

    #[test]
    fn of_two_failures_the_more_special_one_decides_the_exit_code() {
        let plain = || Failure::failed("rsync failed");
        let lost = || Failure::new(Exit::Unreachable, "line lost").with_hint("run again");
        for failure in [plain().merge(lost()), lost().merge(plain())] {
            assert_eq!(failure.exit, Exit::Unreachable);
            assert_eq!(failure.causes, ["also: rsync failed"]);
            assert_eq!(failure.hint.as_deref(), Some("run again"));
        }
        assert_eq!(plain().merge(plain()), plain());
    }

    #[test]
    fn a_state_comes_before_the_hint_and_both_are_sentences() {
        let hint = |failure: Failure| failure.with_state("it is as it was").hint;
        let lost = Failure::failed("lost").with_hint("run again");
        assert_eq!(hint(lost).as_deref(), Some("it is as it was. Run again"));
        let lost = Failure::failed("lost");
        assert_eq!(hint(lost).as_deref(), Some("it is as it was"));
    }

    #[test]
    fn context_moves_the_first_line_into_the_causes() {
        let failure = Failure::failed("inner").because("deep").context("outer");
        assert_eq!(failure.what, "outer");
        assert_eq!(failure.causes, ["inner", "deep"]);
    }

    #[test]
    fn restore_of_a_snapshot_that_was_removed_meanwhile_is_not_to_be_repeated() {
        let hint = |message: &str| {
            let error = SnapshotError::RestoreFailed {
                ended: "exit code 24".to_owned(),
                first_message: message.to_owned(),
                damaged: false,
                messages: NameList::default(),
            };
            Failure::from(&error).hint.unwrap()
        };
        assert!(hint("file has vanished: \"/a\"").contains("was removed meanwhile"));
        assert!(hint("rsync: write failed").contains("run the same command again"));
    }
}
