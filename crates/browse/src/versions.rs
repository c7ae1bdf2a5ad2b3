//! The versions of one path over all snapshots.

use sprat_inside::{Version, VersionsReport};
use sprat_run::inside_text;
use sprat_run::watch::Shown;
use sprat_session::text;
use sprat_snapshot::SnapshotName;

use crate::question::At;
use crate::rows::Rows;

#[derive(Debug)]
pub(crate) struct Versions {
    pub(crate) job: String,
    pub(crate) path: String,
    /// The newest one first.
    pub(crate) versions: Vec<Version>,
    pub(crate) rows: Rows,
}

impl Versions {
    pub(crate) fn new(report: VersionsReport) -> Self {
        let mut versions = report.versions;
        versions.reverse();
        Self {
            job: report.job,
            path: report.path,
            versions,
            rows: Rows::default(),
        }
    }

    /// The path in the newest snapshot that has the version under the cursor.
    pub(crate) fn current(&self) -> Option<(At, &Version)> {
        let version = self.versions.get(self.rows.cursor)?;
        let at = At::top(&self.job, &version.last).path(&self.path);
        Some((at, version))
    }

    /// The cells of a row: times of the first and the last snapshot, their number, size, time, change.
    pub(crate) fn cells(&self, row: usize, shown: &Shown) -> Vec<String> {
        let Some(version) = self.versions.get(row) else {
            return Vec::new();
        };
        let mut change = inside_text::version_change(version);
        if let Some(gone) = &version.gone {
            change.push_str(match gone.complete {
                true => ", then gone",
                false => ", then not there or unread",
            });
        }
        let time = |snapshot: &str| match SnapshotName::parse(snapshot) {
            Ok(name) => shown.time(name.moment()),
            Err(_) => snapshot.to_owned(),
        };
        vec![
            time(&version.first),
            time(&version.last),
            text::count(version.snapshots),
            inside_text::size(&version.found),
            shown.time(version.found.modified),
            change,
        ]
    }
}
