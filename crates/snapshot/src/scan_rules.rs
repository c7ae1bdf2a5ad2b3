//! What a job excludes by what is in its sources.

use serde::{Deserialize, Serialize};

/// What a job excludes by what is in its sources, and not by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScanRules {
    /// Exclude the content of folders that a valid `CACHEDIR.TAG` marks. The tag itself stays.
    pub caches: bool,
    /// Exclude the content of folders that have an object of one of these names. That object stays.
    pub if_present: Vec<String>,
    /// Exclude regular files with more bytes than this.
    pub larger_than: Option<u64>,
}

impl ScanRules {
    /// Whether there is no rule, and the sources need no scan.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.caches && self.if_present.is_empty() && self.larger_than.is_none()
    }
}
