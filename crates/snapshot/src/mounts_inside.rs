//! The mounts inside the sources, before and after a run. If a disk is mounted or unmounted while rsync
//! walks, files are missing, and rsync doesn't notice.

use std::path::{Path, PathBuf};

use crate::file_system::FileSystem;
use crate::mounts::Mount;

/// Folders whose mounts come and go with logins and services, and contain nothing of lasting value.
const IGNORED_MOUNTS: [&str; 2] = ["/run/user", "/run/credentials"];

/// A mount inside a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountInside {
    /// Its path as a walk of the source sees it.
    pub(crate) path: PathBuf,
    pub(crate) id: u32,
    pub(crate) device: (u32, u32),
    /// See [`Mount::on_automount`].
    pub(crate) on_automount: bool,
    /// An automount point with nothing on it: there is nothing to back up.
    pub(crate) is_empty_automount: bool,
    pub(crate) file_system: FileSystem,
}

impl MountInside {
    fn is_same_mount(&self, other: &Self) -> bool {
        (&self.path, self.id, self.device) == (&other.path, other.id, other.device)
    }

    /// Whether a walk that saw this mount first would see the same files now. A file system on an
    /// automount point is unmounted when it is idle. Each use mounts it again, or fails and is reported
    /// as unread.
    fn still_there(&self, after: &[Self]) -> bool {
        let now = after.iter().find(|now| now.path == self.path);
        match now {
            Some(now) if self.is_same_mount(now) => true,
            Some(now) if self.on_automount => {
                now.is_empty_automount || self.file_system.is_same(&now.file_system) == Some(true)
            }
            _ => false,
        }
    }
}

/// A mount inside a source that came or went during the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountChange {
    /// Its path as a walk of the source sees it.
    pub(crate) path: PathBuf,
    /// It was there at the beginning. Another mount may have replaced it.
    pub(crate) gone: bool,
}

/// A source: its real path, and its path in the job.
pub(crate) struct Place<'a> {
    pub(crate) real: &'a Path,
    pub(crate) named: &'a Path,
}

/// The mounts of `table` below `places`, except for those below `left_out` (real paths). Of several at
/// one place, the visible one.
pub(crate) fn mounts_inside(
    table: &[Mount],
    places: &[Place<'_>],
    left_out: &[PathBuf],
) -> Vec<MountInside> {
    let mut inside: Vec<MountInside> = Vec::new();
    for mount in table {
        let out = |place: &Path| mount.at.starts_with(place);
        if left_out.iter().any(|place| out(place))
            || IGNORED_MOUNTS.iter().any(|at| out(at.as_ref()))
        {
            continue;
        }
        for place in places {
            let Ok(below) = mount.at.strip_prefix(place.real) else {
                continue;
            };
            if below.as_os_str().is_empty() {
                continue;
            }
            let path = place.named.join(below);
            // The table has the order of mounting.
            inside.retain(|earlier| earlier.path != path);
            inside.push(MountInside {
                file_system: FileSystem::at(mount, &path, &mount.at),
                path,
                id: mount.id,
                device: mount.device,
                on_automount: mount.on_automount,
                is_empty_automount: mount.empty_automount,
            });
        }
    }
    inside.sort_by(|a, b| a.path.cmp(&b.path));
    inside
}

/// The mounts that came or went. `in_tree` returns whether a path of a source is in the tree that the
/// run made: mounts that the job's patterns exclude may come and go.
pub(crate) fn changes(
    before: &[MountInside],
    after: &[MountInside],
    in_tree: &dyn Fn(&Path) -> bool,
) -> Vec<MountChange> {
    let change = |gone| {
        move |mount: &MountInside| MountChange {
            path: mount.path.clone(),
            gone,
        }
    };
    let gone = before
        .iter()
        .filter(|mount| !mount.is_empty_automount && !mount.still_there(after));
    let came = |mount: &&MountInside| {
        let was_there =
            |earlier: &MountInside| earlier.path == mount.path && !earlier.is_empty_automount;
        !mount.is_empty_automount && !before.iter().any(was_there)
    };
    let came = after.iter().filter(came);
    gone.map(change(true))
        .chain(came.map(change(false)))
        .filter(|change| asked_for(&change.path, in_tree))
        .collect()
}

/// Whether the job's patterns include `path`. A mount point may have been removed with its disk, so the
/// nearest existing folder above decides.
pub(crate) fn asked_for(path: &Path, in_tree: &dyn Fn(&Path) -> bool) -> bool {
    path.ancestors()
        .find(|at| std::fs::symlink_metadata(at).is_ok())
        .is_none_or(in_tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(id: u32, at: &str, minor: u32) -> Mount {
        Mount {
            id,
            at: at.into(),
            root: "/".into(),
            device: (0, minor),
            kind: "ext4".into(),
            ..Mount::default()
        }
    }

    fn inside(table: &[Mount]) -> Vec<MountInside> {
        let place = Place {
            real: Path::new("/real/home"),
            named: Path::new("/home"),
        };
        mounts_inside(table, &[place], &["/real/home/out".into()])
    }

    #[test]
    fn only_visible_mounts_inside_a_source_count() {
        let table = [
            mount(1, "/", 1),
            mount(2, "/real/home", 2),
            mount(3, "/real/home/a", 3),
            mount(4, "/real/home/out/b", 4),
            mount(5, "/real/home/a", 5),
            mount(6, "/real/homes", 6),
        ];
        let seen = inside(&table);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].path, Path::new("/home/a"));
        assert_eq!(seen[0].device, (0, 5));
    }

    #[test]
    fn mounts_of_logins_and_services_are_ignored() {
        let table = [
            mount(1, "/run/user/1000", 1),
            mount(2, "/run/credentials/x.service", 2),
            mount(3, "/run/media/anna/disk", 3),
        ];
        let place = Place {
            real: Path::new("/"),
            named: Path::new("/"),
        };
        let seen = mounts_inside(&table, &[place], &[]);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].path, Path::new("/run/media/anna/disk"));
    }

    #[test]
    fn mounts_that_changed_are_reported_unless_excluded() {
        let before = inside(&[
            mount(1, "/real/home/stays", 1),
            mount(2, "/real/home/goes", 2),
            mount(3, "/real/home/changes", 3),
        ]);
        let after = inside(&[
            mount(1, "/real/home/stays", 1),
            mount(3, "/real/home/changes", 4),
            mount(5, "/real/home/comes", 5),
        ]);
        let found = changes(&before, &after, &|_| true);
        let found: Vec<_> = found
            .iter()
            .map(|change| (change.path.to_str().unwrap(), change.gone))
            .collect();
        assert_eq!(
            found,
            [
                ("/home/changes", true),
                ("/home/goes", true),
                ("/home/comes", false)
            ]
        );
        assert!(changes(&before, &after, &|_| false).is_empty());
    }
}
