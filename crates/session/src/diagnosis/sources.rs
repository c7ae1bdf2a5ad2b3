//! Checks whether the sources of a job can be backed up.

use std::path::Path;

use sprat_snapshot::{Cancel, SnapshotError, SnapshotSpec};

use super::finding::{Finding, State};
use crate::Failure;
use crate::interrupt::Interrupt;
use crate::session::without_questions;

/// Checks which sources of a job can't be backed up, and asks other hosts for theirs; one finding if all can.
#[must_use]
pub fn sources(spec: &SnapshotSpec, interrupt: &Interrupt) -> Vec<Finding> {
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
    for detail in missing_on_hosts(spec, interrupt) {
        let finding = Finding::new(&what, State::Missing, detail);
        findings.push(finding.hint(
            "a backup skips this source. The login must work as this user, without a question, and the host \
             needs rsync",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::new(what, State::Fine, "all are there"));
    }
    findings
}

/// The pulled sources that are not there, and why.
fn missing_on_hosts(spec: &SnapshotSpec, interrupt: &Interrupt) -> Vec<String> {
    let mut spec = spec.clone();
    without_questions(&mut spec);
    let cancel = Cancel::new();
    let mut watch = |_| {
        if interrupt.requested() {
            cancel.cancel();
        }
    };
    match sprat_snapshot::missing_on_hosts(&spec, Path::new("/"), &mut watch, &cancel) {
        Ok(missing) => missing
            .into_iter()
            .map(|(source, why)| format!("{source}: {why}"))
            .collect(),
        Err(error) => vec![Failure::from(error).in_one_line()],
    }
}
