//! The files of a schedule: written by sprat, changed by an admin, or somebody else's.

use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sprat_session::Failure;

use super::Changes;
use crate::timer::{self, Author};

/// A file of the schedule.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct InstalledFile {
    /// Its path.
    pub path: PathBuf,
    /// Who wrote it.
    pub state: FileState,
}

/// Who wrote a file of the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileState {
    /// sprat, and nobody changed it.
    Unchanged,
    /// sprat, and somebody changed it.
    Edited,
    /// Somebody else.
    Foreign,
}

/// A link to `/dev/null` masks a unit, and is somebody else's.
pub(super) fn read(path: &Path) -> Option<String> {
    let is_file = fs::symlink_metadata(path).is_ok_and(|about| about.is_file());
    is_file.then(|| fs::read_to_string(path).ok()).flatten()
}

/// `None`: nothing is there.
pub(super) fn installed(path: &PathBuf) -> Option<InstalledFile> {
    fs::symlink_metadata(path).ok()?;
    let state = match read(path).map(|content| timer::author(&content)) {
        Some(Author::Sprat) => FileState::Unchanged,
        Some(Author::Edited) => FileState::Edited,
        Some(Author::Other) | None => FileState::Foreign,
    };
    Some(InstalledFile {
        path: path.clone(),
        state,
    })
}

/// Writes a file unless it is there. One that somebody changed is left as it is.
pub(super) fn write(path: &PathBuf, text: &str, changes: &mut Changes) -> Result<(), Failure> {
    match installed(path).map(|file| file.state) {
        Some(FileState::Edited | FileState::Foreign) => changes.left.push(path.clone()),
        Some(FileState::Unchanged) if read(path).as_deref() == Some(text) => {}
        Some(FileState::Unchanged) | None => {
            replace(path, text).map_err(|error| {
                Failure::failed(format!("can't write {}", path.display()))
                    .caused_by(&error)
                    .with_hint("run the command again once that is corrected: it does what is left")
            })?;
            changes.written.push(path.clone());
        }
    }
    Ok(())
}

/// systemd and cron ignore the temporary file: its name ends in neither `.timer` nor `.service`, and
/// begins with a dot.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let mut part = tempfile::NamedTempFile::new_in(folder)?;
    part.write_all(text.as_bytes())?;
    let file = part.as_file();
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.sync_all()?;
    part.persist(path).map_err(|error| error.error)?;
    fs::File::open(folder)?.sync_all()
}

/// Deletes a file if sprat wrote it and nobody changed it, and a folder for drop-ins that is empty then.
pub(super) fn delete(path: &PathBuf, changes: &mut Changes) -> Result<(), Failure> {
    match installed(path).map(|file| file.state) {
        None => {}
        Some(FileState::Edited | FileState::Foreign) => changes.left.push(path.clone()),
        Some(FileState::Unchanged) => {
            fs::remove_file(path).map_err(|error| {
                Failure::failed(format!("can't delete {}", path.display())).caused_by(&error)
            })?;
            changes.deleted.push(path.clone());
        }
    }
    if let Some(folder) = path.parent().filter(|_| path.ends_with("minute.conf")) {
        // Fails where the folder holds anything else, and that stays.
        let _ = fs::remove_dir(folder);
    }
    Ok(())
}
