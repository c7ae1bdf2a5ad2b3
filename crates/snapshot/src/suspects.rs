//! The list of suspects: files of a volume whose content is known to be wrong, as this machine's checks
//! found them.
//!
//! Backups never link or copy from a suspect. They read such a file from its source. Prune keeps a
//! snapshot with the right content if a kept snapshot has the wrong one. The list is a JSON file on this
//! machine, written by checks. A missing or damaged list counts as empty.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::check::Key;
use crate::local_file;
use crate::long_path::{self, size_and_time};
use crate::subvolumes;
use crate::text::{escape_path, path_text};

/// The longest list. A volume with more damaged files is not fit for backups.
const SUSPECTS_MAX: usize = 100_000;
const FILE_BYTES_MAX: u64 = 512 << 20;

/// One file of the volume, which may have several names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Suspect {
    pub(crate) inode: u64,
    /// Distinguishes it from another file that got the same inode later.
    pub(crate) key: Key,
    /// One of its names, relative to the volume's root.
    #[serde(with = "path_text")]
    pub(crate) path: PathBuf,
    /// It has, or may have, other names in one snapshot, because the source has hard links.
    pub(crate) several: bool,
    /// The volume damaged it. Otherwise only the source has changed, with equal size and time.
    pub(crate) damaged: bool,
    /// A comparison with the source found it. Then a checksum of an earlier check may be that of the
    /// wrong content, too.
    pub(crate) by_source: bool,
}

/// All suspects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Suspects {
    pub(crate) files: BTreeMap<Key, Suspect>,
    /// Symbolic links. A backup compares the target of each link with its source, so only what reads a snapshot uses them.
    pub(crate) links: BTreeMap<Key, Suspect>,
}

impl Suspects {
    pub(crate) fn load(path: &Path) -> Self {
        let is_small = fs::metadata(path).is_ok_and(|about| about.len() <= FILE_BYTES_MAX);
        let text = is_small.then(|| fs::read(path).ok()).flatten();
        let listed: Self = text
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default();
        // Older lists are by inode.
        let files = listed.files.into_values();
        Self {
            files: files.map(|suspect| (suspect.key, suspect)).collect(),
            links: listed.links,
        }
    }

    /// Writes the list. An empty list is removed.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        if self.files.is_empty() && self.links.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let content = serde_json::to_vec(self)?;
        local_file::replace(path, |file| file.write_all(&content))
    }

    /// Adds `suspect`, whose path is below `root`, where the volume is mounted.
    pub(crate) fn note(&mut self, root: &Path, suspect: Suspect) {
        add(&mut self.files, root, suspect);
    }

    /// The same for a symbolic link.
    pub(crate) fn note_link(&mut self, root: &Path, suspect: Suspect) {
        add(&mut self.links, root, suspect);
    }

    /// What is no suspect any more.
    pub(crate) fn remove(&mut self, key: Key) {
        self.files.remove(&key);
        self.links.remove(&key);
    }

    /// The suspect that is this file or link.
    pub(crate) fn get(&self, key: Key) -> Option<&Suspect> {
        self.files.get(&key).or_else(|| self.links.get(&key))
    }

    /// The suspect that is this file of the volume.
    pub(crate) fn find(&self, about: &fs::Metadata) -> Option<&Suspect> {
        self.files.get(&Key::of(about))
    }

    /// Calls `meet` with the names of the damaged files and symbolic links in a snapshot, `tree`, some of which are below `tops`.
    pub(crate) fn each_damaged(
        &self,
        root: &Path,
        tree: &Path,
        tops: &[PathBuf],
        cancel: &Cancel,
        meet: &mut dyn FnMut(&Path, &fs::Metadata, &Suspect),
    ) {
        let mut meet_damaged = |path: &Path, about: &fs::Metadata| {
            let suspect = match about.is_symlink() {
                true => self.links.get(&Key::of(about)),
                false => self.find(about).filter(|_| about.is_file()),
            };
            if let Some(suspect) = suspect.filter(|suspect| suspect.damaged) {
                meet(path, about, suspect);
            }
        };
        let mut has_several = false;
        let all = self.files.values().chain(self.links.values());
        for suspect in all.filter(|suspect| suspect.damaged) {
            has_several |= suspect.several;
            // A file has the same path in each snapshot.
            let within: PathBuf = suspect.path.components().skip(2).collect();
            for path in [root.join(&suspect.path), tree.join(within)] {
                if let Ok(about) = long_path::lstat(&path) {
                    meet_damaged(&path, &about);
                }
            }
        }
        for top in tops.iter().filter(|_| has_several) {
            if let Ok(about) = long_path::lstat(top) {
                meet_damaged(top, &about);
            }
            long_path::each(top, &mut |path, about| {
                if let Ok(about) = about {
                    meet_damaged(path, &about);
                }
                !cancel.is_cancelled()
            });
        }
    }

    /// Which snapshots of `job` must be kept because files in those of `kept` are damaged. For each
    /// damaged file that is the newest of `others` that has the same version in another, undamaged
    /// inode, unless one of `kept` has it.
    pub(crate) fn snapshots_to_keep(
        &self,
        job_folder: &Path,
        job: &str,
        kept: &[String],
        others: &[String],
    ) -> BTreeSet<String> {
        let mut keep = BTreeSet::new();
        for suspect in self.files.values().filter(|suspect| suspect.damaged) {
            let Some(below) = suspect.below(job) else {
                continue;
            };
            let in_snapshot = |name: &String| {
                let path = job_folder.join(name).join(below);
                long_path::lstat(&path).ok().filter(fs::Metadata::is_file)
            };
            let is_suspect = |about: &fs::Metadata| self.find(about).is_some();
            let damaged = kept
                .iter()
                .filter_map(&in_snapshot)
                .find(|about| about.ino() == suspect.inode && is_suspect(about));
            let Some(damaged) = damaged else { continue };
            let is_right = |name: &&String| {
                in_snapshot(name).is_some_and(|about| {
                    size_and_time(&about) == size_and_time(&damaged) && !is_suspect(&about)
                })
            };
            let has_one =
                kept.iter().any(|name| is_right(&name)) || keep.iter().any(|name| is_right(&name));
            if !has_one {
                keep.extend(others.iter().rev().find(is_right).cloned());
            }
        }
        keep
    }
}

impl Suspect {
    /// Its path within a snapshot of `job`, if it lies in one.
    pub(crate) fn below(&self, job: &str) -> Option<&Path> {
        let mut parts = self.path.components();
        let of_job = parts.next()?.as_os_str() == job;
        parts.next()?;
        of_job.then_some(parts.as_path())
    }
}

fn add(list: &mut BTreeMap<Key, Suspect>, root: &Path, mut suspect: Suspect) {
    let key = suspect.key;
    if list.len() >= SUSPECTS_MAX && !list.contains_key(&key) {
        return;
    }
    suspect.several = has_several_paths(root, &suspect.path, suspect.inode);
    if let Ok(below) = suspect.path.strip_prefix(root) {
        suspect.path = below.to_owned();
    }
    if let Some(known) = list.get(&key) {
        suspect.damaged |= known.damaged;
        suspect.by_source |= known.by_source;
    }
    list.insert(key, suspect);
}

/// Whether the file has other names than the same path in several snapshots of one job.
fn has_several_paths(root: &Path, path: &Path, inode: u64) -> bool {
    let links = long_path::lstat(path).map_or(2, |about| about.nlink());
    if subvolumes::is_btrfs(root) {
        // The names in other snapshots don't count.
        return links > 1;
    }
    let others = crate::check::same_path_elsewhere(root, path);
    let found = others
        .iter()
        .filter(|other| long_path::lstat(other).is_ok_and(|about| about.ino() == inode))
        .count();
    links > u64::try_from(found).unwrap_or(0).max(1)
}

/// The path with a leading slash, for messages.
pub(crate) fn name_of(path: &Path) -> String {
    escape_path(&Path::new("/").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(list: &mut Suspects, root: &Path, path: &Path) {
        let about = fs::symlink_metadata(path).unwrap();
        let suspect = Suspect {
            inode: about.ino(),
            key: Key::of(&about),
            path: path.to_owned(),
            several: false,
            damaged: true,
            by_source: false,
        };
        list.note(root, suspect);
    }

    #[test]
    fn a_list_is_read_back_and_a_torn_one_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let (root, file) = (dir.path(), dir.path().join("home/1/etc/f"));
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "x").unwrap();
        let mut list = Suspects::default();
        note(&mut list, root, &file);
        let path = dir.path().join("checks/x.json");
        list.save(&path).unwrap();
        let again = Suspects::load(&path);
        assert_eq!(again, list);
        let suspect = again.find(&fs::symlink_metadata(&file).unwrap()).unwrap();
        assert_eq!(suspect.below("home"), Some(Path::new("etc/f")));
        assert_eq!(suspect.below("other"), None);
        assert!(!suspect.several);
        fs::write(&path, "{").unwrap();
        assert_eq!(Suspects::load(&path), Suspects::default());
        Suspects::default().save(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn the_last_right_content_of_a_damaged_file_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let job = dir.path().join("home");
        let names: Vec<String> = ["1", "2", "3"].map(str::to_owned).to_vec();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        for name in &names {
            fs::create_dir_all(job.join(name)).unwrap();
            let file = fs::File::create(job.join(name).join("f")).unwrap();
            file.set_modified(time).unwrap();
        }
        let mut list = Suspects::default();
        note(&mut list, dir.path(), &job.join("3/f"));
        let keep = |list: &Suspects, kept: &[String], others: &[String]| {
            let keep = list.snapshots_to_keep(&job, "home", kept, others);
            keep.into_iter().collect::<Vec<_>>()
        };
        // The newest snapshot with the right content.
        assert_eq!(keep(&list, &names[2..], &names[..2]), ["2"]);
        // One of the kept snapshots has it.
        assert!(keep(&list, &names[1..], &names[..1]).is_empty());
        // No kept snapshot has the damaged file.
        assert!(keep(&list, &names[..1], &names[1..]).is_empty());
        // A snapshot with another version doesn't count.
        let other = fs::File::options()
            .write(true)
            .open(job.join("2/f"))
            .unwrap();
        other.set_len(7).unwrap();
        assert_eq!(keep(&list, &names[2..], &names[..2]), ["1"]);
    }
}
