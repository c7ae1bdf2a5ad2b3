//! A source on another host, and its place in a snapshot.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::text::{escape_path, path_text};

/// A source on another host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PulledSource {
    /// The login; `None` leaves it to ssh.
    #[serde(default)]
    pub user: Option<String>,
    /// The host as written: a name, or an alias in ssh's configuration.
    pub host: String,
    /// Absolute.
    #[serde(with = "path_text")]
    pub path: PathBuf,
}

/// A pulled source that a snapshot has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledPart {
    /// The source.
    #[serde(flatten)]
    pub source: PulledSource,
    /// Whether the snapshot has all of it.
    pub full: bool,
}

impl PulledSource {
    /// Its place in a snapshot, relative to that.
    #[must_use]
    pub fn place(&self) -> PathBuf {
        within(host_folder(&self.host), &self.path)
    }
}

impl fmt::Display for PulledSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        write!(f, "{}:{}", self.host, escape_path(&self.path))
    }
}

/// `path` of a host within its `folder`.
pub(crate) fn within(folder: PathBuf, path: &Path) -> PathBuf {
    let below = path.strip_prefix("/").unwrap_or(path);
    // Joining nothing would add a slash.
    match below == Path::new("") {
        true => folder,
        false => folder.join(below),
    }
}

/// The folder of a host in a snapshot.
pub(crate) fn host_folder(host: &str) -> PathBuf {
    PathBuf::from(format!("@{host}"))
}

/// The folders at the top of a snapshot that these sources are in.
pub(crate) fn tops(parts: &[PulledPart]) -> Vec<PathBuf> {
    let hosts = parts.iter().map(|part| host_folder(&part.source.host));
    let tops: std::collections::BTreeSet<PathBuf> = hosts.collect();
    tops.into_iter().collect()
}
