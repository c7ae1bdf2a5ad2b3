//! Where this machine files what it keeps of a container: by its UUID and its target.
//!
//! A copy of a container has its UUID too, but keys, jobs and damage of its own. So the files are
//! called `UUID-TARGET`, the target being 16 digits of a hash, with an ending that says what they
//! are.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::address::Target;
use crate::files::short_hash;
use crate::state::identity;

/// Kept headers.
pub const HEADERS: &str = "headers";
/// How jobs went and what room was left.
pub const STATUS: &str = "status";
/// Results of checks, and the checksums of what was read.
pub const CHECKS: &str = "checks";
/// What each run changed: a folder for each job.
const LISTS: &str = "lists";
/// What `analyze` found in snapshots.
const COSTS: &str = "costs";
/// Hashes of the blocks of large files: a folder for each job.
pub const BLOCKS: &str = "blocks";
/// In which state the container was left (see `state`).
pub const KNOWN: &str = "known";

/// Among those: the files of the volume whose content is wrong.
pub const SUSPECTS: &str = ".suspects.json";

/// A container at a place, as what is kept of it is filed.
#[derive(Debug, Clone)]
pub struct StatePaths {
    state_dir: PathBuf,
    uuid: String,
    target_id: String,
}

/// A file that is kept of another container with the same UUID.
#[derive(Debug)]
pub struct Elsewhere {
    /// The file.
    pub path: PathBuf,
    /// Where that one lies, if that is known here.
    pub target: Option<String>,
}

impl StatePaths {
    /// A header's UUID was parsed as one, so it can name a file.
    pub fn new(state_dir: &Path, uuid: &str, target: &Target) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            uuid: uuid.to_owned(),
            target_id: target.id(),
        }
    }

    /// One of its files; `what` begins with a dot.
    pub fn file(&self, folder: &str, what: &str) -> PathBuf {
        let (uuid, target_id) = (&self.uuid, &self.target_id);
        self.state_dir
            .join(folder)
            .join(format!("{uuid}-{target_id}{what}"))
    }

    /// The folder with the copies of the lists of what the runs changed, in a folder for each job.
    pub fn change_lists(&self) -> PathBuf {
        self.file(LISTS, "")
    }

    /// The folder with what `analyze` found in the snapshots of each job.
    pub fn costs(&self) -> PathBuf {
        self.file(COSTS, "")
    }

    /// Removes what `analyze` found: somebody else may have changed snapshots.
    pub fn forget_costs(&self) -> io::Result<()> {
        remove_folder(&self.costs())
    }

    /// The folder with the hashes of the blocks of the large files of a job.
    pub fn blocks(&self, job: &str) -> PathBuf {
        self.file(BLOCKS, "").join(job)
    }

    /// The same file of every other container with this UUID: copies, the same container at an old or
    /// otherwise spelled target, and a file that has only the UUID in its name.
    pub fn of_others(&self, folder: &str, what: &str) -> Vec<Elsewhere> {
        let elsewhere = |name: &str| {
            let place = name.strip_prefix(&self.uuid)?.strip_suffix(what)?;
            if place.is_empty() {
                return Some(None);
            }
            let id = place.strip_prefix('-')?;
            let is_id = id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            (is_id && id != self.target_id).then(|| identity::target_of(&self.state_dir, id))
        };
        let names = names(&self.state_dir.join(folder)).unwrap_or_default();
        names
            .iter()
            .filter_map(|name| {
                Some(Elsewhere {
                    target: elsewhere(name)?,
                    path: self.state_dir.join(folder).join(name),
                })
            })
            .collect()
    }

    /// All of its files in a folder, each with its ending.
    pub fn all(&self, folder: &str) -> io::Result<Vec<(PathBuf, String)>> {
        let dir = self.state_dir.join(folder);
        let begin = format!("{}-{}", self.uuid, self.target_id);
        let names = names(&dir)?;
        Ok(names
            .iter()
            .filter_map(|name| {
                let what = name.strip_prefix(&begin)?;
                what.starts_with('.')
                    .then(|| (dir.join(name), what.to_owned()))
            })
            .collect())
    }

    /// Another container file comes to this target. What was found of the old one is removed. A kept header
    /// stays, but not as that of this target.
    pub fn make_way(&self) -> io::Result<()> {
        for folder in [STATUS, CHECKS, KNOWN] {
            for (path, _) in self.all(folder)? {
                fs::remove_file(path)?;
            }
        }
        self.forget_lists()?;
        let newest = self.file(HEADERS, ".luks");
        match newest.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(_) => fs::rename(&newest, self.aside(&newest)?),
        }
    }

    /// The container moves to `to`: links its files there. A file that is there already stays. A header
    /// with other content stays beside it.
    pub fn link_to(&self, to: &Self) -> io::Result<()> {
        self.link_folders_to(to, &[HEADERS, STATUS, CHECKS, KNOWN])
    }

    /// The container moves to `to` and gets another volume key: links only the files about its content.
    pub fn link_content_to(&self, to: &Self) -> io::Result<()> {
        self.link_folders_to(to, &[STATUS, CHECKS])
    }

    fn link_folders_to(&self, to: &Self, folders: &[&str]) -> io::Result<()> {
        for folder in folders {
            let all = self.all(folder)?;
            for (path, what) in &all {
                let there = to.file(folder, what);
                let linked = link(path, &there)?;
                if !linked && *folder == HEADERS && fs::read(path)? != fs::read(&there)? {
                    link(path, &to.aside(path)?)?;
                }
            }
            if !all.is_empty() {
                File::open(to.state_dir.join(folder))?.sync_all()?;
            }
        }
        Ok(())
    }

    /// Removes its files.
    pub fn forget(&self) -> io::Result<()> {
        for folder in [HEADERS, STATUS, CHECKS, KNOWN] {
            for (path, _) in self.all(folder)? {
                fs::remove_file(path)?;
            }
        }
        self.forget_lists()
    }

    /// The lists are in the volume, too, and the hashes can be made again.
    fn forget_lists(&self) -> io::Result<()> {
        for folder in [LISTS, BLOCKS, COSTS] {
            remove_folder(&self.file(folder, ""))?;
        }
        Ok(())
    }

    /// A name for a header that is not the newest: one for each content.
    fn aside(&self, header: &Path) -> io::Result<PathBuf> {
        let hash = short_hash(&fs::read(header)?);
        Ok(self.file(HEADERS, &format!(".differs-{hash}.luks")))
    }
}

/// Makes a second name for a file. False if that name is taken. These files are replaced and never
/// changed, so one file with two names is as good as two files.
fn link(path: &Path, there: &Path) -> io::Result<bool> {
    match fs::hard_link(path, there) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes a folder, if it is there.
fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const UUID: &str = "8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46";

    /// Some container on a server.
    pub(crate) fn paths(state_dir: &Path, target: &str) -> StatePaths {
        StatePaths::new(
            state_dir,
            UUID,
            &Target::parse(target, Path::new("/")).unwrap(),
        )
    }

    fn write(path: &Path, content: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn contents(state_dir: &Path, folder: &str) -> Vec<String> {
        let mut names = names(&state_dir.join(folder)).unwrap();
        names.sort();
        let read = |name| fs::read_to_string(state_dir.join(folder).join(name)).unwrap();
        names.iter().map(read).collect()
    }

    #[test]
    fn files_of_other_places_are_found_and_are_not_ones_own() {
        let state = tempfile::tempdir().unwrap();
        let (x, c) = (
            paths(state.path(), "h:x.luks"),
            paths(state.path(), "h:c.luks"),
        );
        assert!(x.of_others(HEADERS, ".luks").is_empty());
        write(&x.file(HEADERS, ".luks"), "x");
        write(&c.file(HEADERS, ".luks"), "c");
        write(&c.file(HEADERS, ".differs-1-2.luks"), "older");
        write(
            &state.path().join("headers").join(format!("{UUID}.luks")),
            "nobody's",
        );
        write(&state.path().join("headers").join("other.luks"), "other");
        let others = x.of_others(HEADERS, ".luks");
        let mut others: Vec<String> = others
            .iter()
            .map(|other| fs::read_to_string(&other.path).unwrap())
            .collect();
        others.sort();
        assert_eq!(others, ["c", "nobody's"]);
    }

    #[test]
    fn what_moves_takes_the_place_of_nothing() {
        let state = tempfile::tempdir().unwrap();
        let (x, c) = (
            paths(state.path(), "h:x.luks"),
            paths(state.path(), "h:c.luks"),
        );
        write(&x.file(HEADERS, ".luks"), "x");
        write(&x.file(HEADERS, ".differs-1-2.luks"), "x before");
        write(&x.file(STATUS, ".json"), "x");
        write(&x.file(CHECKS, ".sums"), "x");
        write(&c.file(HEADERS, ".luks"), "c");
        write(&c.file(STATUS, ".json"), "c");
        for _ in 0..2 {
            x.link_to(&c).unwrap();
        }
        x.forget().unwrap();
        assert!(fs::read_to_string(c.file(HEADERS, ".luks")).unwrap() == "c");
        let mut headers = contents(state.path(), HEADERS);
        headers.sort();
        assert_eq!(headers, ["c", "x", "x before"]);
        assert_eq!(contents(state.path(), STATUS), ["c"]);
        assert_eq!(fs::read_to_string(c.file(CHECKS, ".sums")).unwrap(), "x");
    }

    #[test]
    fn a_new_file_at_a_place_has_the_header_and_the_checks_of_no_other() {
        let state = tempfile::tempdir().unwrap();
        let c = paths(state.path(), "h:c.luks");
        c.make_way().unwrap();
        write(&c.file(HEADERS, ".luks"), "old");
        write(&c.file(STATUS, ".json"), "old");
        write(&c.file(CHECKS, ".json"), "old");
        c.make_way().unwrap();
        assert!(!c.file(HEADERS, ".luks").exists());
        assert_eq!(contents(state.path(), HEADERS), ["old"]);
        assert!(contents(state.path(), STATUS).is_empty());
        assert!(contents(state.path(), CHECKS).is_empty());
    }
}
