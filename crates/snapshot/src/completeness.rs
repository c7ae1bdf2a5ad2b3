//! Checks after a run whether the tree that rsync made has all that was requested, and records what it
//! lacks.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::disks::Disks;
use crate::error::SnapshotError;
use crate::file_system::FileSystem;
use crate::job::WORK_PATH;
use crate::listing;
use crate::mounts_inside::asked_for;
use crate::name_list::NAMES_MAX;
use crate::record::{RunRecord, Warning};
use crate::rsync::Outcome;
use crate::sources::Sources;
use crate::text::{escape_path, unescape_path};

/// So many files may vanish during a run before their share counts: mail, temporary files, caches.
const VANISHED_HARMLESS_MAX: u64 = 100;
/// One file in so many may vanish, whatever the total.
const VANISHED_SHARE: u64 = 100;

/// The result of rsync's run, and what it was made from.
pub(crate) struct Made<'a> {
    pub(crate) sources: &'a Sources,
    /// The disks as the run found them.
    pub(crate) disks: &'a Disks,
    pub(crate) outcome: &'a Outcome,
    /// The absolute path of `.inflight`.
    pub(crate) tree: PathBuf,
}

impl Made<'_> {
    /// Completes `record`, which has only what rsync reported so far.
    pub(crate) fn check(&self, record: &mut RunRecord) -> Result<(), SnapshotError> {
        let in_tree = |path: &Path| {
            let below = path.strip_prefix("/").unwrap_or(path);
            crate::long_path::lstat(&self.tree.join(below)).is_ok()
        };
        let mounted = self
            .sources
            .mounts
            .iter()
            .filter(|mount| !mount.is_empty_automount);
        record.mounts = mounted
            .map(|mount| &mount.path)
            .filter(|path| in_tree(path))
            .take(NAMES_MAX)
            .map(|path| escape_path(path))
            .collect();
        self.add_disks(record, &in_tree);
        for change in self.sources.mount_changes(&in_tree)? {
            let path = escape_path(&change.path);
            record.unread.push(path.clone());
            record.warnings.push(if change.gone {
                Warning::UnmountedMeanwhile { path }
            } else {
                Warning::MountedMeanwhile { path }
            });
        }
        for left_out in &self.sources.missing {
            record.unread.push(left_out.clone());
        }
        let subvolumes = self.sources.subvolumes_left_out(&in_tree)?;
        if let Some(first) = subvolumes.first() {
            record.warnings.push(Warning::SubvolumesLeftOut {
                path: escape_path(first),
                subvolumes: subvolumes.len() as u64,
            });
        }
        self.ended_early(record)?;
        self.attributes_lost(record);
        self.folders_vanished(record, &in_tree);
        let refused = &self.outcome.attributes_refused;
        if !refused.is_empty() {
            let files = refused.count;
            record.warnings.push(Warning::AttributesRefused { files });
        }
        for list in [refused, &self.outcome.unwritten] {
            let seen = |name: &String| escape_path(&source_of(&self.tree, &unescape_path(name)));
            record.unread.append(&list.map(seen));
        }
        let vanished = record.vanished.count;
        let many = vanished > VANISHED_HARMLESS_MAX
            && vanished.saturating_mul(VANISHED_SHARE) > record.stats.files;
        if many {
            record
                .warnings
                .push(Warning::ManyVanished { files: vanished });
        }
        record.complete = record.complete && record.unread.is_empty() && !many;
        record.file_systems = self.file_systems(record, many, &in_tree);
        Ok(())
    }

    /// Records which disks are missing or gone.
    fn add_disks(&self, record: &mut RunRecord, in_tree: &dyn Fn(&Path) -> bool) {
        // A missing disk that the job now excludes is no loss.
        let sources_missing: Vec<PathBuf> = self
            .sources
            .missing
            .iter()
            .map(|one| unescape_path(one))
            .collect();
        // A missing source still counts as included.
        let left_out = |path: &Path| {
            !asked_for(path, in_tree) && !sources_missing.iter().any(|one| path.starts_with(one))
        };
        let mut disks = self.disks.clone();
        disks.leave_out(&left_out);
        record.warnings.retain(|warning| match warning {
            Warning::AutomountEmpty { path } => !left_out(&unescape_path(path)),
            _ => true,
        });
        let missing = disks.missing.into_iter().map(|one| one.warning);
        record.warnings.extend(missing);
        record.disks_gone = disks.gone;
        record.disks_left_out = disks.left_out;
    }

    /// Records folders whose listing ended with an error that rsync did not see.
    fn ended_early(&self, record: &mut RunRecord) -> Result<(), SnapshotError> {
        let known: Vec<PathBuf> = record
            .unread
            .names
            .iter()
            .map(|one| unescape_path(one))
            .collect();
        for one in &self.sources.file_systems {
            if !listing::may_end_early(&one.kind) {
                continue;
            }
            let early = listing::ended_early(&self.tree, &unescape_path(&one.place));
            for folder in early.map_err(|source| SnapshotError::Volume {
                op: "check",
                object: self
                    .tree
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                source,
            })? {
                if !known.contains(&folder) {
                    record.unread.push(escape_path(&folder));
                }
            }
        }
        Ok(())
    }

    /// The file systems that are in the tree, and whether the tree has all of each.
    fn file_systems(
        &self,
        record: &RunRecord,
        many_vanished: bool,
        in_tree: &dyn Fn(&Path) -> bool,
    ) -> Vec<FileSystem> {
        let met = self.sources.file_systems.iter();
        let mut all: Vec<FileSystem> = met
            .filter(|one| in_tree(&unescape_path(&one.place)))
            .take(NAMES_MAX)
            .cloned()
            .collect();
        let places: Vec<PathBuf> = all.iter().map(|one| unescape_path(&one.place)).collect();
        let holding = |path: &Path| {
            let above = places.iter().filter(|place| path.starts_with(place));
            above.max_by_key(|place| place.as_os_str().len())
        };
        // A missing source belongs to none of the file systems that were found.
        let names = record.unread.names.iter();
        let unread: Vec<PathBuf> = names
            .filter(|one| !self.sources.missing.contains(*one))
            .map(|one| unescape_path(one))
            .filter(|path| !self.sources.is_pulled(path))
            .collect();
        let all_named = record.unread.count == record.unread.names.len() as u64;
        for (one, place) in all.iter_mut().zip(&places) {
            let lacks = |path: &PathBuf| holding(path).is_none_or(|holding| holding == place);
            let all_known = !many_vanished && all_named && record.rsync_exit.is_some();
            one.full = record.complete || (all_known && !unread.iter().any(lacks));
        }
        all
    }

    /// A folder that vanished was most often moved. All its files are missing then, and rsync prints one
    /// message or none, not one for each file.
    fn folders_vanished(&self, record: &mut RunRecord, in_tree: &dyn Fn(&Path) -> bool) {
        let is_there = |path: &Path| crate::long_path::lstat(path).is_ok();
        let mut folders: Vec<PathBuf> = Vec::new();
        let vanished = record.vanished.names.iter().map(|name| unescape_path(name));
        // Those of other hosts were asked for there.
        for path in vanished.filter(|path| !self.sources.is_pulled(path)) {
            let is_folder = |path: &Path| {
                let below = path.strip_prefix("/").unwrap_or(path);
                crate::long_path::lstat(&self.tree.join(below)).is_ok_and(|made| made.is_dir())
            };
            // The outermost folder that is gone.
            let gone = path.ancestors().take_while(|at| !is_there(at)).last();
            let gone = gone.filter(|gone| *gone != path || is_folder(gone));
            let back_as_other = gone.is_none() && is_folder(&path);
            let folder = gone.or(back_as_other.then_some(&*path));
            if let Some(folder) = folder
                && asked_for(folder, in_tree)
                && !folders.iter().any(|known| known == folder)
            {
                folders.push(folder.to_owned());
            }
        }
        if folders.is_empty() {
            return;
        }
        record.warnings.push(Warning::FoldersVanished {
            folders: folders.len() as u64,
        });
        for folder in folders {
            record.unread.push(escape_path(&folder));
        }
    }

    /// The source file that did not fit on the volume, escaped.
    pub(crate) fn file_that_did_not_fit(&self) -> Option<String> {
        let name = self.outcome.did_not_fit.as_ref()?;
        Some(escape_path(&source_of(&self.tree, &unescape_path(name))))
    }

    fn attributes_lost(&self, record: &mut RunRecord) {
        let lost = &self.outcome.attributes_lost;
        if lost.is_empty() {
            return;
        }
        record
            .warnings
            .push(Warning::AttributesTooLarge { files: lost.count });
        let seen = |name: &String| escape_path(&source_of(&self.tree, &unescape_path(name)));
        record.unread.append(&lost.map(seen));
    }
}

/// The source file that rsync reported under `path`, where it wrote it in `tree`. Mostly that is its
/// temporary name, `.NAME.XXXXXX`.
pub(crate) fn source_of(tree: &Path, path: &Path) -> PathBuf {
    let parts: Vec<&OsStr> = path.components().map(Component::as_os_str).collect();
    let of_tree: Vec<&OsStr> = match tree.ends_with(WORK_PATH) {
        true => Path::new(WORK_PATH).iter().collect(),
        false => tree.file_name().into_iter().collect(),
    };
    let mut places = parts.windows(of_tree.len().max(1));
    let below: PathBuf = match places.position(|part| part == of_tree) {
        Some(at) => parts[at + of_tree.len()..].iter().collect(),
        None => path.strip_prefix("/").unwrap_or(path).to_owned(),
    };
    if crate::long_path::lstat(&tree.join(&below)).is_ok() {
        return Path::new("/").join(below);
    }
    let name = below.file_name().unwrap_or_default();
    let name = final_name(name).unwrap_or(name);
    Path::new("/").join(below.with_file_name(name))
}

/// The name that rsync gives a file whose temporary name is `name` (receiver.c, `get_tmpname`).
pub(crate) fn final_name(name: &OsStr) -> Option<&OsStr> {
    let rest = name.as_bytes().strip_prefix(b".")?;
    let (name, random) = rest.split_at_checked(rest.len().checked_sub(7)?)?;
    (random[0] == b'.' && !name.is_empty()).then(|| OsStr::from_bytes(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_on_the_volume_belongs_to_its_source() {
        let seen = |tree: &str, path: &str| source_of(Path::new(tree), Path::new(path));
        let inflight = "/run/volume/home/2026-01-01T00-00-00Z.inflight";
        let written = format!("{inflight}/etc/.hosts.a1B2c3");
        assert_eq!(seen(inflight, &written), Path::new("/etc/hosts"));
        let work = "/srv/work/volume/home/.sprat/work";
        let written = format!("{work}/etc/work/.hosts.a1B2c3");
        assert_eq!(seen(work, &written), Path::new("/etc/work/hosts"));
        assert_eq!(seen(work, "etc/hosts"), Path::new("/etc/hosts"));
    }

    #[test]
    fn the_final_name_is_found_in_a_temporary_name() {
        let cases = [
            (".file.a1B2c3", Some("file")),
            ("..hidden.a1B2c3", Some(".hidden")),
            (".a1B2c3", None),
            ("file", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(
                final_name(name.as_ref()),
                expected.map(OsStr::new),
                "{name}"
            );
        }
    }
}
