//! Looks after a run whether the tree that rsync calls done holds all that was asked for, and writes
//! into the record what it lacks.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::SnapshotError;
use crate::mounts_inside::asked_for;
use crate::record::{NAMES_MAX, RunRecord, Warning};
use crate::rsync::Outcome;
use crate::sources::Sources;
use crate::text::{escape_path, unescape_path};

/// So many files may vanish under way before their share counts: mail, temporary files, caches.
const VANISHED_HARMLESS_MAX: u64 = 100;
/// One file in so many may vanish, however many there are.
const VANISHED_SHARE: u64 = 100;

/// What was made, and from what.
pub(crate) struct Made<'a> {
    pub(crate) sources: &'a Sources,
    pub(crate) outcome: &'a Outcome,
    /// The `.inflight`, absolute.
    pub(crate) tree: PathBuf,
}

impl Made<'_> {
    /// Completes `record`, which so far says what rsync says.
    pub(crate) fn look_for_gaps(&self, record: &mut RunRecord) -> Result<(), SnapshotError> {
        let in_tree = |path: &Path| {
            let below = path.strip_prefix("/").unwrap_or(path);
            std::fs::symlink_metadata(self.tree.join(below)).is_ok()
        };
        let mounted = self.sources.mounts.iter().map(|mount| &mount.path);
        record.mounts = mounted
            .filter(|path| in_tree(path))
            .take(NAMES_MAX)
            .map(|path| escape_path(path))
            .collect();
        // What the job leaves out by now is no loss any more.
        record.warnings.retain(|warning| match warning {
            Warning::NotMounted { path, .. } => asked_for(&unescape_path(path), &in_tree),
            _ => true,
        });
        for change in self.sources.mount_changes(&in_tree)? {
            let path = escape_path(&change.path);
            record.unread.push(path.clone());
            record.warnings.push(if change.gone {
                Warning::UnmountedMeanwhile { path }
            } else {
                Warning::MountedMeanwhile { path }
            });
        }
        self.attributes_lost(record);
        let vanished = record.vanished.count;
        let many = vanished > VANISHED_HARMLESS_MAX
            && vanished.saturating_mul(VANISHED_SHARE) > record.stats.files;
        if many {
            record
                .warnings
                .push(Warning::ManyVanished { files: vanished });
        }
        record.complete = record.complete && record.unread.is_empty() && !many;
        Ok(())
    }

    /// The source file that found no room on the volume, escaped.
    pub(crate) fn no_room_for(&self) -> Option<String> {
        let name = self.outcome.no_room_for.as_ref()?;
        Some(escape_path(&self.source_of(&unescape_path(name))))
    }

    fn attributes_lost(&self, record: &mut RunRecord) {
        let lost = &self.outcome.attributes_lost;
        if lost.is_empty() {
            return;
        }
        record
            .warnings
            .push(Warning::AttributesTooLarge { files: lost.count });
        let seen = |name: &String| escape_path(&self.source_of(&unescape_path(name)));
        record.unread.append(&lost.map(seen));
    }

    /// The source file of which rsync told under `path`, where it wrote it: mostly under the name
    /// that it has until it is whole, `.NAME.XXXXXX`.
    fn source_of(&self, path: &Path) -> PathBuf {
        let folder = self.tree.file_name().unwrap_or_default();
        let mut parts = path.components().map(std::path::Component::as_os_str);
        let below: PathBuf = match parts.by_ref().find(|part| *part == folder) {
            Some(_) => parts.collect(),
            None => path.strip_prefix("/").unwrap_or(path).to_owned(),
        };
        if std::fs::symlink_metadata(self.tree.join(&below)).is_ok() {
            return Path::new("/").join(below);
        }
        let name = below.file_name().unwrap_or_default();
        let name = until_whole(name).unwrap_or(name);
        Path::new("/").join(below.with_file_name(name))
    }
}

/// The name that rsync gives a file whose temporary name is `name` (receiver.c, `get_tmpname`).
fn until_whole(name: &OsStr) -> Option<&OsStr> {
    let rest = name.as_bytes().strip_prefix(b".")?;
    let (name, random) = rest.split_at_checked(rest.len().checked_sub(7)?)?;
    (random[0] == b'.' && !name.is_empty()).then(|| OsStr::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_name_leads_to_the_name() {
        let cases = [
            (".file.a1B2c3", Some("file")),
            ("..hidden.a1B2c3", Some(".hidden")),
            (".a1B2c3", None),
            ("file", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(
                until_whole(name.as_ref()),
                expected.map(OsStr::new),
                "{name}"
            );
        }
    }
}
