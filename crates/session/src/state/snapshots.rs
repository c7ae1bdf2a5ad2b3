//! Which snapshots a container had when this machine last left it: for answers from the lists of changes.
//!
//! The file is beside the lists, and counts only for the state of the container that this machine knows. If it is
//! missing or torn, nothing is known.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sprat_snapshot::{Lists, local_file};

use crate::Failure;
use crate::address::Target;
use crate::file_system::Stamp;
use crate::files;
use crate::protocol::reports::Finished;
use crate::settings::IdentityPolicy;
use crate::state::paths::{KNOWN, StatePaths};
use crate::state::{KnownState, identity};

const FORMAT: u32 = 1;
/// No job's name begins with a dot.
const FILE: &str = ".snapshots.json";
/// Its time counts as [`Noted::edited`]. Made only if the disk is full: see [`mark`].
const MARK: &str = ".edited";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Noted {
    format: u32,
    /// The state that it is about. `None`: the snapshots are not known.
    stamp: Option<Stamp>,
    at: Option<Timestamp>,
    snapshots: Finished,
    /// The last mount for writing: a person could change any snapshot that existed then.
    edited: Option<Timestamp>,
}

impl Noted {
    fn load(paths: &StatePaths) -> Self {
        let noted = files::read_json(&path(paths));
        let noted = noted.filter(|noted: &Self| noted.format == FORMAT);
        let mut noted = noted.unwrap_or_default();
        noted.edited = noted.edited.max(read_mark(paths));
        noted
    }

    fn store(mut self, paths: &StatePaths) -> io::Result<()> {
        self.format = FORMAT;
        files::write_json_even_if_full(&path(paths), &self)
    }
}

/// Notes the snapshots in the state of `stamp`, in which a session has left the container.
pub(crate) fn note(paths: &StatePaths, stamp: Stamp, snapshots: Finished) -> io::Result<()> {
    Noted {
        stamp: Some(stamp),
        at: Some(Timestamp::now()),
        snapshots,
        ..Noted::load(paths)
    }
    .store(paths)
}

/// From now on a user writes, and may change any snapshot.
pub(crate) fn note_edited(paths: &StatePaths) -> io::Result<()> {
    let noted = Noted::load(paths);
    let newest = noted.snapshots.values().filter_map(|names| names.last());
    let newest = newest.map(|name| name.moment()).max();
    // A clock may have run ahead.
    let edited = newest.max(noted.edited).max(Some(Timestamp::now()));
    let stored = Noted {
        edited,
        ..Noted::default()
    }
    .store(paths);
    match (stored, edited) {
        // A full disk must not keep a user from mounting.
        (Err(error), Some(edited)) if local_file::is_full(&error) => {
            mark(paths, edited).map_err(|_| error)
        }
        (stored, _) => stored,
    }
}

/// Notes the time as that of an empty file: it needs no space on a full disk.
fn mark(paths: &StatePaths, edited: Timestamp) -> io::Result<()> {
    let file = File::create(paths.file(KNOWN, MARK))?;
    let since = edited.duration_since(Timestamp::UNIX_EPOCH).unsigned_abs();
    file.set_modified(SystemTime::UNIX_EPOCH + since)?;
    file.sync_all()
}

fn read_mark(paths: &StatePaths) -> Option<Timestamp> {
    let about = paths.file(KNOWN, MARK).symlink_metadata().ok()?;
    Timestamp::try_from(about.modified().ok()?).ok()
}

/// Until when a user could change files in snapshots, if that was ever possible.
#[must_use]
pub fn edited(paths: &StatePaths) -> Option<Timestamp> {
    Noted::load(paths).edited
}

/// What the lists of this machine can be asked about, and when it was noted.
///
/// # Errors
/// This machine does not know which snapshots the container has.
pub fn known_lists(state_dir: &Path, target: &Target) -> Result<(Timestamp, Lists), Failure> {
    let unknown = |why: &str| {
        Failure::failed(format!(
            "this machine can't answer for {target} without opening it"
        ))
        .because(why)
        .with_hint(
            "nothing was opened. Omit --offline. Each backup by this machine notes what it needs",
        )
    };
    let IdentityPolicy::Known(pins) = identity::policy(state_dir, target, None)? else {
        return Err(unknown("no session of this machine has opened it"));
    };
    let paths = StatePaths::new(state_dir, &pins.uuid, target);
    let noted = Noted::load(&paths);
    let known = KnownState::load(&paths);
    let (Some(stamp), Some(at)) = (noted.stamp, noted.at) else {
        return Err(unknown("it is not known which snapshots it has"));
    };
    if !known.is_of(&stamp) {
        return Err(unknown(
            "it was written to since this machine noted which snapshots it has",
        ));
    }
    let lists = Lists {
        folder: paths.change_lists(),
        snapshots: noted.snapshots,
        edited: noted.edited,
    };
    Ok((at, lists))
}

fn path(paths: &StatePaths) -> PathBuf {
    paths.change_lists().join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_system::{FileSystemState, stamp_block as block};
    use crate::state::paths::tests::paths;
    use sprat_snapshot::SnapshotName;
    use sprat_testkit::tmpfs::{SmallDisk, fill};
    use sprat_testkit::{needs, requires};

    fn stamp(counter: u64) -> Stamp {
        FileSystemState::read(&block(counter, 1, 0), 4096)
            .unwrap()
            .stamp
    }

    fn snapshots(name: &str) -> Finished {
        let name = SnapshotName::parse(name).unwrap();
        Finished::from([("home".to_owned(), vec![name])])
    }

    #[test]
    fn mount_for_writing_is_known_until_the_lists_are_forgotten() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        note(&paths, stamp(5), snapshots("2026-01-01T00-00-00Z")).unwrap();
        assert_eq!(Noted::load(&paths).edited, None);
        note_edited(&paths).unwrap();
        let edited = Noted::load(&paths).edited.unwrap();
        assert!(Noted::load(&paths).stamp.is_none());
        note(&paths, stamp(6), snapshots("2900-01-01T00-00-00Z")).unwrap();
        assert_eq!(Noted::load(&paths).edited, Some(edited));
        // That clock ran ahead, and its snapshot could be changed, too.
        note_edited(&paths).unwrap();
        let edited = Noted::load(&paths).edited.unwrap();
        assert_eq!(edited, "2900-01-01T00:00:00Z".parse().unwrap());
        paths.make_way().unwrap();
        assert_eq!(Noted::load(&paths).edited, None);
    }

    #[test]
    fn mount_for_writing_is_noted_on_a_full_disk() {
        requires!(needs::root());
        let disk = SmallDisk::new("size=64k");
        let paths = paths(disk.path(), "h:x.luks");
        std::fs::create_dir(disk.path().join(KNOWN)).unwrap();
        fill(disk.path());
        note_edited(&paths).unwrap();
        let edited = Noted::load(&paths).edited.unwrap();
        std::fs::remove_file(disk.path().join("somebody-else's")).unwrap();
        note(&paths, stamp(5), snapshots("2026-01-01T00-00-00Z")).unwrap();
        assert_eq!(Noted::load(&paths).edited, Some(edited));
        paths.make_way().unwrap();
        assert_eq!(Noted::load(&paths).edited, None);
    }
}
