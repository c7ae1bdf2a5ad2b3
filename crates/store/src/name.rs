//! The name of a file in a store's folder: one path component, nothing else.

use std::fmt;

/// A single path component: not empty, not `.` or `..`, without `/`, NUL or control characters,
/// at most 255 bytes (`NAME_MAX`, linux/limits.h).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileName(String);

/// A string that is not a [`FileName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a file name: one path component of 1 to 255 bytes without control characters"
)]
pub struct FileNameError(String);

impl FileName {
    /// Parses `name`.
    pub fn new(name: &str) -> Result<Self, FileNameError> {
        let plain = !name.is_empty()
            && name.len() <= 255
            && name != "."
            && name != ".."
            && !name.contains('/')
            && !name.chars().any(char::is_control);
        if plain {
            Ok(Self(name.to_owned()))
        } else {
            Err(FileNameError(name.to_owned()))
        }
    }

    /// Returns this name with `suffix` (such as `.lock.1`) appended.
    pub fn with_suffix(&self, suffix: &str) -> Result<Self, FileNameError> {
        Self::new(&format!("{}{suffix}", self.0))
    }

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
