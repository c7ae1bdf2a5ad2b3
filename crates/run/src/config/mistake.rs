//! Mistakes in a config: where each stands, what is wrong, and what it stops.

use std::fmt;
use std::path::PathBuf;

/// A mistake, or a warning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// Counted from 1; `None` if it concerns the file as a whole.
    pub line: Option<usize>,
    /// What is wrong.
    pub what: String,
    /// The word that was probably meant.
    pub likely: Option<String>,
    /// What it stops. A warning stops nothing.
    pub stops: Stops,
}

impl Mistake {
    /// Notices don't go by the `[notify]` of this config: it is wrong, or stands in a file that could
    /// not be read.
    #[must_use]
    pub fn concerns_notices(&self) -> bool {
        matches!(self.stops, Stops::Notices | Stops::File)
    }
}

impl fmt::Display for Mistake {
    /// `FILE:LINE: WHAT; did you mean …?`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        write!(f, " {}", self.what)?;
        match &self.likely {
            Some(likely) => write!(f, "; did you mean {likely:?}?"),
            None => Ok(()),
        }
    }
}

/// What a mistake stops. Commands that a person starts refuse to start with any mistake.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stops {
    /// Nothing: the default counts.
    Nothing,
    /// Nothing: notices go by the last `[notify]` that was right.
    Notices,
    /// This job.
    Job(String),
    /// The copies into this container.
    Container(String),
    /// Every job.
    EveryJob,
    /// All that stands in the file: it can't be read, or is not TOML.
    File,
}

impl fmt::Display for Stops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing | Self::Notices => f.write_str("nothing"),
            Self::Job(name) => write!(f, "job {name}"),
            Self::Container(name) => write!(f, "container {name}"),
            Self::EveryJob => f.write_str("every job"),
            Self::File => f.write_str("the file"),
        }
    }
}

/// Why a value is wrong, in words that follow the key's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wrong {
    /// Begins with `: ` or with ` must `.
    pub(super) what: String,
    pub(super) likely: Option<String>,
}

impl Wrong {
    /// "`key`: WHAT".
    pub(super) fn because(what: impl fmt::Display) -> Self {
        Self {
            what: format!(": {what}"),
            likely: None,
        }
    }

    /// "`key` must WHAT".
    pub(super) fn must(what: impl fmt::Display) -> Self {
        Self {
            what: format!(" must {what}"),
            likely: None,
        }
    }

    /// "`key` must be one of WORDS".
    pub(super) fn not_one_of(text: &str, words: &[&str]) -> Self {
        let likely = crate::suggest::near_miss(text, words.iter().copied());
        Self {
            what: format!(": {text:?} is none of {}", words.join(", ")),
            likely: likely.map(str::to_owned),
        }
    }
}
