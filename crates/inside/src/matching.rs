//! Finds what a restore by patterns restores.

use std::path::{Path, PathBuf};

use sprat_snapshot::tree::Tree;
use sprat_snapshot::{Cancel, SnapshotError};

use crate::answer::{Place, go_on, leads_on};
use crate::pattern::Pattern;

/// The paths at or below `place` that match one of the patterns. What is in a folder that matches is not among
/// them: it belongs to the folder.
///
/// # Errors
/// Nothing matches, a pattern is none, or the volume can't be read.
pub fn matching(
    volume_root: &Path,
    place: &Place,
    patterns: &[String],
    cancel: &Cancel,
) -> Result<Vec<PathBuf>, SnapshotError> {
    let parsed: Result<Vec<Pattern>, SnapshotError> = patterns
        .iter()
        .map(|text| {
            Pattern::parse(text, false).map_err(|_| SnapshotError::PathRefused {
                path: text.clone(),
                why: "is not a valid pattern",
            })
        })
        .collect();
    let parsed = parsed?;
    let matches = |path: &Path| parsed.iter().any(|pattern| pattern.matches(path));
    let tree = Tree::find(volume_root, &place.job, &place.snapshot)?;
    let top = place.path();
    if tree.stat(&top)?.is_none() {
        return Err(tree.no_such(&top));
    }
    if top != Path::new("/") && matches(&top) {
        return Ok(vec![top]);
    }
    let mut found = Vec::new();
    let mut waiting = vec![top];
    while let Some(path) = waiting.pop() {
        go_on(cancel)?;
        let failed = |error| tree.failed("list", &path, error);
        let Some(folder) = tree.folder(&path)? else {
            continue;
        };
        for entry in folder.entries().map_err(failed)? {
            let below = path.join(&entry.name);
            if matches(&below) {
                found.push(below);
            } else if leads_on(&folder, &entry).map_err(failed)? {
                waiting.push(below);
            }
        }
    }
    if found.is_empty() {
        return Err(SnapshotError::NoSuchPath {
            snapshot: tree.folder.clone(),
            path: patterns.join(", "),
        });
    }
    found.sort();
    Ok(found)
}
