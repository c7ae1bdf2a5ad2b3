//! sprat's own files and folders on this machine. They are never in a snapshot, and no restore
//! overwrites or deletes them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::mounts::{Mount, pattern_for, pattern_with_ending};
use crate::paths::{joined, real_path};
use crate::text::path_text;

/// A container file on this machine, and sprat's own files beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalContainer {
    /// Its absolute path.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// The endings of the files beside it, which follow its name. Each is plain text with the classes
    /// `[0-9]` and `[0-9a-f]`, as in rsync's patterns.
    pub endings: Vec<String>,
}

/// All of sprat's own places, by every path that leads to them.
#[derive(Debug)]
pub(crate) struct OwnPlaces {
    list: Vec<OwnPlace>,
}

#[derive(Debug)]
struct OwnPlace {
    /// The real path, without symbolic links.
    path: PathBuf,
    /// rsync patterns for the endings of the files beside it.
    endings: Vec<String>,
    is_container: bool,
}

impl OwnPlaces {
    /// Finds the real paths of `places` and of the `containers`, and other paths by which mounts show
    /// them.
    pub(crate) fn find(places: &[PathBuf], containers: &[LocalContainer], table: &[Mount]) -> Self {
        let places = places.iter().map(|path| OwnPlace {
            path: real_path(path),
            endings: Vec::new(),
            is_container: false,
        });
        let containers = containers.iter().map(|container| OwnPlace {
            path: real_path(&container.path),
            endings: container.endings.clone(),
            is_container: true,
        });
        let mut list: Vec<OwnPlace> = Vec::new();
        for place in places.chain(containers) {
            for path in also_at(table, &place.path) {
                list.push(OwnPlace {
                    path,
                    endings: place.endings.clone(),
                    is_container: place.is_container,
                });
            }
            list.push(place);
        }
        Self { list }
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.list.iter().map(|place| &*place.path)
    }

    /// rsync patterns for all places at or below the real path `real`, which rsync knows as `named`.
    pub(crate) fn patterns_in(&self, real: &Path, named: &Path) -> Vec<OsString> {
        let mut patterns = Vec::new();
        for place in &self.list {
            let Ok(below) = place.path.strip_prefix(real) else {
                continue;
            };
            let path = joined(named, below);
            patterns.push(pattern_for(&path, false));
            // If the container is the root of the transfer, rsync doesn't see the files beside it.
            if !below.as_os_str().is_empty() {
                let endings = place.endings.iter();
                patterns.extend(endings.map(|ending| pattern_with_ending(&path, ending)));
            }
        }
        patterns
    }

    /// A container that lies at or below the real path `real`.
    pub(crate) fn container_in(&self, real: &Path) -> Option<&Path> {
        let container = |place: &&OwnPlace| place.is_container && place.path.starts_with(real);
        self.list.iter().find(container).map(|place| &*place.path)
    }

    /// The place that is `real` or contains it, or whose file beside it is `real`.
    pub(crate) fn holding(&self, real: &Path) -> Option<&Path> {
        let holds = |place: &&OwnPlace| real.starts_with(&place.path) || place.has_beside(real);
        self.list.iter().find(holds).map(|place| &*place.path)
    }
}

impl OwnPlace {
    /// Whether `real` is one of the files beside it.
    fn has_beside(&self, real: &Path) -> bool {
        let name = |path: &Path| path.file_name().map(|name| name.as_bytes().to_owned());
        let (Some(own), Some(name)) = (name(&self.path), name(real)) else {
            return false;
        };
        let rest = name.strip_prefix(&*own);
        let is_ending = |rest: &[u8]| self.endings.iter().any(|ending| matches(ending, rest));
        real.parent() == self.path.parent() && rest.is_some_and(is_ending)
    }
}

/// Whether `text` matches `ending`, with the classes of [`LocalContainer::endings`].
fn matches(ending: &str, text: &[u8]) -> bool {
    let (mut ending, mut text) = (ending.as_bytes(), text);
    while let Some((first, rest)) = text.split_first() {
        let (fits, after) = if let Some(after) = ending.strip_prefix(b"[0-9]") {
            (first.is_ascii_digit(), after)
        } else if let Some(after) = ending.strip_prefix(b"[0-9a-f]") {
            (
                first.is_ascii_digit() || (b'a'..=b'f').contains(first),
                after,
            )
        } else if let Some((byte, after)) = ending.split_first() {
            (byte == first, after)
        } else {
            return false;
        };
        if !fits {
            return false;
        }
        (ending, text) = (after, rest);
    }
    ending.is_empty()
}

/// The other paths that lead to the file or folder at the real path `path`: a mount may show a part of a
/// file system at a second place.
fn also_at(table: &[Mount], path: &Path) -> Vec<PathBuf> {
    // Of several mounts at one place, the last one is visible.
    let own = table.iter().filter(|mount| path.starts_with(&mount.at));
    let Some(own) = own.max_by_key(|mount| mount.at.components().count()) else {
        return Vec::new();
    };
    let Ok(below) = path.strip_prefix(&own.at) else {
        return Vec::new();
    };
    let in_file_system = joined(&own.root, below);
    let mut others: Vec<PathBuf> = table
        .iter()
        .filter(|mount| mount.device == own.device)
        .filter_map(|mount| {
            let below = in_file_system.strip_prefix(&mount.root).ok()?;
            Some(joined(&mount.at, below))
        })
        // Another mount may hide it there.
        .filter(|other| other != path && is_same(other, path))
        .collect();
    others.sort();
    others.dedup();
    others
}

fn is_same(one: &Path, other: &Path) -> bool {
    let of = |path| std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()));
    matches!((of(one), of(other)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(path: &Path) -> LocalContainer {
        LocalContainer {
            path: path.to_owned(),
            endings: vec![".new".into(), ".lock.[0-9]".into()],
        }
    }

    #[test]
    fn patterns_use_the_path_by_which_rsync_reaches_a_place() {
        let folder = tempfile::tempdir().unwrap();
        let real = real_path(folder.path());
        let container = container(&real.join("st/a*b.luks"));
        let own = OwnPlaces::find(
            &["/nowhere/cache".into()],
            std::slice::from_ref(&container),
            &[],
        );
        assert_eq!(
            own.patterns_in(&real, Path::new("/S")),
            [
                "/S/st/a\\*b.luks",
                "/S/st/a\\*b.luks.new",
                "/S/st/a\\*b.luks.lock.[0-9]"
            ]
        );
        assert_eq!(
            own.patterns_in(Path::new("/nowhere/cache"), Path::new("/c")),
            ["/c"]
        );
        assert!(
            own.patterns_in(&real.join("other"), Path::new("/"))
                .is_empty()
        );
        assert_eq!(own.container_in(&real), Some(&*container.path));
        assert_eq!(own.container_in(Path::new("/nowhere")), None);
        let inside = Path::new("/nowhere/cache/deep");
        assert_eq!(own.holding(inside), Some(Path::new("/nowhere/cache")));
        assert_eq!(own.holding(Path::new("/nowhere")), None);
        for (name, is_own) in [
            ("a*b.luks", true),
            ("a*b.luks.new", true),
            ("a*b.luks.lock.7", true),
            ("a*b.luks.lock.", false),
            ("a*b.luks.lock.77", false),
            ("a*b.luks.newer", false),
            ("b.luks.new", false),
        ] {
            let found = own.holding(&real.join("st").join(name));
            assert_eq!(found.is_some(), is_own, "{name}");
        }
        assert_eq!(own.holding(&real.join("a*b.luks.new")), None);
    }

    #[test]
    fn a_second_mount_counts_only_where_it_shows_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let real = real_path(folder.path());
        std::fs::create_dir(real.join("disk")).unwrap();
        std::fs::write(real.join("disk/x"), "").unwrap();
        // A bind mount shows the same file. In this test a hard link replaces it.
        std::fs::create_dir(real.join("seen")).unwrap();
        std::fs::hard_link(real.join("disk/x"), real.join("seen/x")).unwrap();
        std::fs::create_dir(real.join("hidden")).unwrap();
        std::fs::write(real.join("hidden/x"), "").unwrap();
        let mount = |at: PathBuf, root: &str| Mount {
            id: 1,
            at,
            root: root.into(),
            device: (8, 1),
            ..Mount::default()
        };
        let table = [
            mount("/".into(), "/"),
            mount(real.join("disk"), "/sub"),
            mount(real.join("seen"), "/sub"),
            mount(real.join("hidden"), "/sub"),
        ];
        let others = also_at(&table, &real.join("disk/x"));
        assert_eq!(others, [real.join("seen/x")]);
    }
}
