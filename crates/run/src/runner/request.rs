//! Checks what a person asks to back up, before anything starts.

use std::path::{Component, Path, PathBuf};

use sprat_session::Failure;

use super::ContainerWork;

/// Reports all invalid sources and patterns together. A source that is missing or can't be read fails only
/// its own job.
///
/// # Errors
/// All that is invalid.
pub fn check_sources(groups: &[ContainerWork<'_>]) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for copy in groups.iter().flat_map(|group| &group.copies) {
        let mistakes = sprat_snapshot::mistakes(&copy.spec).into_iter();
        wrong.extend(mistakes.map(|mistake| format!("job {}: {mistake}", copy.spec.job)));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let failure = Failure::usage("invalid sources");
    let failure = wrong.into_iter().fold(failure, Failure::because);
    Err(failure.with_hint("nothing was started. Correct all of these, in the config or here"))
}

/// Resolves `..` as the kernel does; a symbolic link at the end stays one. A source must always have the same
/// path: otherwise the next run does not find its files in this run's snapshot.
///
/// # Errors
/// A part of the path before `..` is not there.
pub fn source_path(path: &Path) -> Result<PathBuf, Failure> {
    let is_up = |component: Component<'_>| component == Component::ParentDir;
    if !path.components().any(is_up) {
        return Ok(path.to_owned());
    }
    let resolve = |path: &Path| {
        std::fs::canonicalize(path).map_err(|error| {
            Failure::failed(format!("source {}: can't be found", path.display()))
                .caused_by(&error)
                .with_hint("nothing was started. Check the path")
        })
    };
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(resolve(parent)?.join(name)),
        _ => resolve(path),
    }
}
