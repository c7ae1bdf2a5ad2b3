//! Checks whether the sources of a job can be backed up.

use sprat_snapshot::{SnapshotError, SnapshotSpec};

use super::finding::{Finding, State};

/// Checks which sources of a job can't be backed up; one finding if all can.
#[must_use]
pub fn sources(spec: &SnapshotSpec) -> Vec<Finding> {
    let what = format!("job {}: sources", spec.job);
    let refused = sprat_snapshot::mistakes(spec).into_iter();
    let mut findings: Vec<Finding> = refused
        .map(|mistake| Finding::new(&what, State::Missing, mistake.to_string()))
        .collect();
    for (path, hint) in spec
        .sources
        .iter()
        .map(|path| (path, "mount its disk, or remove it from the job"))
        .chain(spec.exclude_from.iter().map(|path| {
            (
                path,
                "create the file with patterns, or remove it from the job",
            )
        }))
    {
        if let Err(error) = std::fs::symlink_metadata(path) {
            let detail = format!("{}: {error}", path.display());
            // Only root can see every folder.
            let state = if error.kind() == std::io::ErrorKind::PermissionDenied {
                State::Weak
            } else {
                State::Missing
            };
            findings.push(Finding::new(&what, state, detail).hint(hint));
        }
    }
    // What is missing, or is a link, was reported above.
    for path in spec.sources.iter().filter(|path| !path.is_symlink()) {
        let refused = sprat_snapshot::check_source(path, spec.allow_empty).err();
        if let Some(
            error @ (SnapshotError::SourceEmpty { .. } | SnapshotError::SourceRefused { .. }),
        ) = refused
        {
            let finding = Finding::new(&what, State::Missing, error.to_string());
            findings.push(finding.hint(
                "a backup refuses this source. Mount its disk, or remove it from the job. If it is \
                 meant to be empty, set allow_empty = true in the job",
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::new(what, State::Fine, "all are there"));
    }
    findings
}
