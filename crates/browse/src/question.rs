//! What the browser asks of the container, and what it gets.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use sprat_inside::{AnalyzeReport, FolderSize, Listing, Place, VersionsReport};
use sprat_session::Failure;
use sprat_snapshot::{
    JobName, RestoreReport, RestoreSpec, SnapshotChoice, SnapshotEntry, unescape_name,
};

/// A path in a snapshot. All three are escaped, as lists and listings have them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct At {
    pub(crate) job: String,
    pub(crate) snapshot: String,
    /// From the top of the snapshot: `/` or `/etc/fstab`.
    pub(crate) path: String,
}

impl At {
    /// The top of a snapshot.
    pub(crate) fn top(job: &str, snapshot: &str) -> Self {
        Self {
            job: job.to_owned(),
            snapshot: snapshot.to_owned(),
            path: "/".to_owned(),
        }
    }

    /// Another path of the same snapshot.
    pub(crate) fn path(&self, path: &str) -> Self {
        Self {
            path: path.to_owned(),
            ..self.clone()
        }
    }

    /// The folder that it is in; `None`: it is the top.
    pub(crate) fn parent(&self) -> Option<Self> {
        let (parent, name) = self.path.rsplit_once('/')?;
        if name.is_empty() {
            return None;
        }
        Some(self.path(if parent.is_empty() { "/" } else { parent }))
    }

    /// The job, if its name can be used.
    pub(crate) fn job_name(&self) -> Result<JobName, Failure> {
        JobName::new(&self.job).map_err(|error| Failure::failed(error.to_string()))
    }

    /// The path as bytes.
    pub(crate) fn raw_path(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(&unescape_name(&self.path)))
    }

    pub(crate) fn choice(&self) -> SnapshotChoice {
        SnapshotChoice::Named(self.snapshot.clone())
    }

    pub(crate) fn place(&self) -> Result<Place, Failure> {
        let path = self.raw_path();
        Ok(Place::new(self.job_name()?, self.choice(), Some(&path)))
    }

    /// `JOB/SNAPSHOT:PATH`.
    pub(crate) fn shown(&self) -> String {
        format!("{}/{}:{}", self.job, self.snapshot, self.path)
    }
}

/// What the container is asked.
#[derive(Debug, Clone)]
pub(crate) enum Question {
    Snapshots,
    Folder(At),
    Size(At),
    Versions(At),
    Preview(At),
    /// What the removal of these snapshots frees.
    Frees(Vec<At>),
    Restore(Box<RestoreSpec>),
}

/// The answer to a [`Question`].
#[derive(Debug)]
pub(crate) enum Answer {
    Snapshots(Vec<SnapshotEntry>),
    Folder(Box<Listing>),
    Size(FolderSize),
    Versions(Box<VersionsReport>),
    /// The beginning of a file.
    Preview(Vec<u8>),
    Frees(Box<AnalyzeReport>),
    Restored(Box<RestoreReport>),
}

/// What the thread that answers reports.
#[derive(Debug)]
pub(crate) enum Event {
    /// The answer to the question of that number.
    Answer(u64, Result<Answer, Failure>),
    /// What is being done.
    Progress(String),
    /// What the user should know.
    Notice(String),
    /// There will be no more answers.
    Over,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_end_at_the_top() {
        let at = At::top("home", "2026");
        assert_eq!(at.parent(), None);
        let file = at.path("/etc/fstab");
        assert_eq!(file.parent(), Some(at.path("/etc")));
        assert_eq!(file.parent().unwrap().parent(), Some(at));
    }
}
