//! Lists a folder of a snapshot.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::Tree;
use sprat_snapshot::{Cancel, EntryKind, SnapshotError};

use crate::answer::{Place, escaped, go_on};
use crate::room::Room;
use sprat_snapshot::seen::{Found, Kind, Seen};

/// What to list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListSpec {
    /// A folder, or one file.
    pub place: Place,
    /// Also everything below it.
    pub recursive: bool,
}

/// A folder of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The job.
    pub job: String,
    /// The snapshot's folder.
    pub snapshot: String,
    /// What the snapshot is.
    pub kind: EntryKind,
    /// The path that was listed, escaped.
    pub path: String,
    /// What is in it, sorted; the file itself if the path is no folder.
    pub entries: Vec<ListingEntry>,
    /// How many more there are.
    pub more: u64,
}

/// A path of a [`Listing`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListingEntry {
    /// The path in the source, escaped.
    pub path: String,
    /// Its attributes.
    #[serde(flatten)]
    pub found: Found,
}

/// Lists what `spec` names, on the volume that is mounted at `volume_root`.
///
/// # Errors
/// There is no such path, or the volume can't be read.
pub fn list(
    volume_root: &Path,
    spec: &ListSpec,
    cancel: &Cancel,
) -> Result<Listing, SnapshotError> {
    let place = &spec.place;
    let tree = Tree::find(volume_root, &place.job, &place.snapshot)?;
    let path = place.path();
    let mut listing = Listing {
        job: tree.job.clone(),
        snapshot: tree.folder.clone(),
        kind: tree.kind(),
        path: escaped(&path),
        entries: Vec::new(),
        more: 0,
    };
    let mut room = Room::new();
    let mut add = |path: &Path, found: Found| {
        let path = escaped(path);
        match room.takes(&path, [&found]) {
            true => listing.entries.push(ListingEntry { path, found }),
            false => listing.more += 1,
        }
    };
    if tree.folder(&path)?.is_none() {
        let here = tree
            .place(&path)?
            .map(|(folder, name)| Seen::of(&folder, &name));
        let here = here.transpose();
        let here = here.map_err(|error| tree.failed("examine", &path, error))?;
        let seen = here.flatten().ok_or_else(|| tree.no_such(&path))?;
        add(&path, seen.found);
        return Ok(listing);
    }
    let mut folders = vec![path];
    while let Some(path) = folders.pop() {
        go_on(cancel)?;
        let Some(folder) = tree.folder(&path)? else {
            continue;
        };
        let failed = |error| tree.failed("list", &path, error);
        let mut names: Vec<PathBuf> = folder
            .entries()
            .map_err(failed)?
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        names.sort();
        let mut below = Vec::new();
        for name in names {
            let Some(seen) = Seen::of(&folder, &name).map_err(failed)? else {
                continue;
            };
            let path = path.join(name);
            if spec.recursive && seen.found.kind == Kind::Folder {
                below.push(path.clone());
            }
            add(&path, seen.found);
        }
        folders.extend(below.into_iter().rev());
    }
    Ok(listing)
}
