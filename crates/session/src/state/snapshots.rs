//! Which snapshots a container had when this machine last left it: for answers from the lists of changes.
//!
//! The file is beside the lists, and counts only for the state of the container that this machine knows. If it is
//! missing or torn, nothing is known.

use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sprat_snapshot::Lists;

use crate::Failure;
use crate::address::Target;
use crate::file_system::Stamp;
use crate::files;
use crate::protocol::reports::Finished;
use crate::settings::IdentityPolicy;
use crate::state::paths::StatePaths;
use crate::state::{KnownState, identity};

const FORMAT: u32 = 1;
/// No job's name begins with a dot.
const FILE: &str = ".snapshots.json";

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
        files::read_json(&path(paths))
            .filter(|noted: &Self| noted.format == FORMAT)
            .unwrap_or_default()
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
    Noted {
        // A clock may have run ahead.
        edited: newest.max(Some(Timestamp::now())),
        ..Noted::default()
    }
    .store(paths)
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
}
