//! Compares two snapshots, or parts of them.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sprat_snapshot::seen::{Change, Found};
use sprat_snapshot::tree::Tree;
use sprat_snapshot::tree_changes::{Part, changes};
use sprat_snapshot::{Cancel, EntryKind, SnapshotError};

use crate::answer::{Place, escaped, go_on};
use crate::room::Room;

/// What to compare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffSpec {
    /// The older one; `None`: the same path in the snapshot before `after`.
    pub before: Option<Place>,
    /// The newer one.
    pub after: Place,
}

/// One of the two that were compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The job; `None`: the source as it is now.
    pub job: Option<String>,
    /// The snapshot's folder; `None`: the source as it is now.
    pub snapshot: Option<String>,
    /// What the snapshot is.
    pub kind: Option<EntryKind>,
    /// The path, escaped.
    pub path: String,
}

/// A path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The path, escaped; of the newer side, unless it is gone there.
    pub path: String,
    /// How it differs.
    pub change: Change,
    /// What the older side has.
    pub before: Option<Found>,
    /// What the newer side has.
    pub after: Option<Found>,
}

/// How many paths differ in one way, and the sizes of the files among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Paths of every kind.
    pub paths: u64,
    /// The sizes on the older side.
    pub before_bytes: u64,
    /// The sizes on the newer side.
    pub after_bytes: u64,
}

/// All that differs, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in Change")]
pub struct Sums {
    pub new: Sum,
    pub gone: Sum,
    pub content: Sum,
    pub attributes: Sum,
    pub kind: Sum,
}

/// How two snapshots differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffReport {
    /// The older side.
    pub before: Side,
    /// The newer side.
    pub after: Side,
    /// The paths that differ, folders before what is in them. A path that was renamed is gone and new.
    pub differences: Vec<Difference>,
    /// How many more differ.
    pub more: u64,
    /// All of them, counted.
    pub sums: Sums,
}

/// Compares two snapshots by names, inode numbers and attributes. No content is read: files of equal size and
/// time are equal, as they are for rsync.
///
/// # Errors
/// There is no such snapshot, neither has the path, or the volume can't be read.
pub fn diff(
    volume_root: &Path,
    spec: &DiffSpec,
    cancel: &Cancel,
) -> Result<DiffReport, SnapshotError> {
    let find = |place: &Place| Tree::find(volume_root, &place.job, &place.snapshot);
    let part = |tree, path| Part { tree, path };
    let after = part(find(&spec.after)?, spec.after.path());
    let before = match &spec.before {
        Some(place) => part(find(place)?, place.path()),
        None => {
            let tree = after.tree.before()?;
            let tree = tree.ok_or_else(|| SnapshotError::NoSuchSnapshot {
                job: after.tree.job.clone(),
                snapshot: format!("before {}", after.tree.folder),
            })?;
            part(tree, spec.after.path())
        }
    };
    let mut report = DiffReport::between(Side::of(&before), Side::of(&after));
    let mut room = Room::new();
    changes(Some(&before), &after, None, &|| go_on(cancel), &mut |one| {
        report.add(&mut room, &one.path, one.change, one.before, one.after);
        Ok(())
    })?;
    Ok(report)
}

impl Side {
    pub(crate) fn of(part: &Part) -> Self {
        Self {
            job: Some(part.tree.job.clone()),
            snapshot: Some(part.tree.folder.clone()),
            kind: Some(part.tree.kind()),
            path: escaped(&part.path),
        }
    }
}

impl DiffReport {
    /// Nothing differs yet.
    pub(crate) fn between(before: Side, after: Side) -> Self {
        Self {
            before,
            after,
            differences: Vec::new(),
            more: 0,
            sums: Sums::default(),
        }
    }

    /// Counts a difference, and names it if it fits.
    pub(crate) fn add(
        &mut self,
        room: &mut Room,
        path: &Path,
        change: Change,
        before: Option<Found>,
        after: Option<Found>,
    ) {
        let sum = match change {
            Change::New => &mut self.sums.new,
            Change::Gone => &mut self.sums.gone,
            Change::Content => &mut self.sums.content,
            Change::Attributes => &mut self.sums.attributes,
            Change::Kind => &mut self.sums.kind,
        };
        let bytes = |found: &Option<Found>| found.as_ref().map_or(0, |found| found.bytes);
        sum.paths += 1;
        sum.before_bytes += bytes(&before);
        sum.after_bytes += bytes(&after);
        let path = escaped(path);
        if !room.takes(&path, before.iter().chain(&after)) {
            self.more += 1;
            return;
        }
        self.differences.push(Difference {
            path,
            change,
            before,
            after,
        });
    }
}
