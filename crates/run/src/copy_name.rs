//! The name of a copy: one job in one container.

use std::fmt;

use serde::{Deserialize, Serialize};
use sprat_session::address::Target;
use sprat_snapshot::JobName;

/// One job in one container, written `home@nas`. Schedule, state and events belong to copies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CopyName {
    /// The job's name.
    pub job: String,
    /// The container's name in the config.
    pub container: String,
}

impl CopyName {
    /// Makes the name from its two parts.
    pub fn new(job: impl Into<String>, container: impl Into<String>) -> Self {
        Self {
            job: job.into(),
            container: container.into(),
        }
    }

    /// Whether both names are as a config may have them. Others name no file: they may be too long for that, or
    /// lead out of the folder.
    #[must_use]
    pub(crate) fn is_valid(&self) -> bool {
        JobName::new(&self.job).is_ok() && Target::is_config_name(&self.container)
    }
}

impl fmt::Display for CopyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.job, self.container)
    }
}
