//! What an earlier setup began and did not finish, in the state folder: so the same command goes on.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sprat_snapshot::local_file;

use crate::state_file::StateFile;

/// The first words of a recovery sheet are among its first bytes.
const BEGIN_BYTES: u64 = 4096;

/// The notes about one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Notes {
    /// Where the backups go: the answer, of which the login succeeded.
    pub(super) target: Option<String>,
    /// The container was being made.
    pub(super) making: bool,
    /// The file that the sheet was to be written to then.
    pub(super) sheet: Option<PathBuf>,
    /// Nobody has typed anything from the sheet yet.
    pub(super) unconfirmed: bool,
    /// The test notice has not arrived yet.
    pub(super) untested: bool,
    /// The answer about the first backup; `None`: not asked yet.
    pub(super) first_run: Option<bool>,
}

/// The notes on disk.
pub(super) struct Progress(StateFile<Notes>);

impl Progress {
    pub(super) fn of(state_dir: &Path, container: &str) -> std::io::Result<Self> {
        let folder = state_dir.join("setup");
        local_file::make_private_folder(&folder)?;
        let path = folder.join(format!("{container}.json"));
        let loss = "What an earlier setup began is not known.";
        Ok(Self(StateFile::new(path, loss)))
    }

    /// The notes, where nothing may be written yet.
    pub(super) fn peek(state_dir: &Path, container: &str) -> Notes {
        let path = state_dir.join("setup").join(format!("{container}.json"));
        sprat_session::files::read_json(&path).unwrap_or_default()
    }

    pub(super) fn read(&mut self) -> Notes {
        self.0.read()
    }

    pub(super) fn note(&mut self, change: impl FnOnce(&mut Notes)) {
        self.0.change(change);
    }
}

/// Removes the sheet of a container that was never made: its key opens nothing, and the next sheet needs the name.
/// Any other file stays. Returns whether it was removed.
pub(super) fn remove_void_sheet(notes: &Notes, sheet: &Path) -> bool {
    if !notes.making || notes.sheet.as_deref() != Some(sheet) {
        return false;
    }
    let Ok(file) = sprat_session::trusted_file::open(sheet) else {
        return false;
    };
    let mut begin = Vec::new();
    let is_ours = file.take(BEGIN_BYTES).read_to_end(&mut begin).is_ok()
        && (begin.is_empty()
            || String::from_utf8_lossy(&begin).contains(crate::recovery_sheet::TITLE));
    is_ours && std::fs::remove_file(sheet).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sheet_of_a_container_that_was_never_made_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let sheet = folder.path().join("sheet.txt");
        let interrupted = Notes {
            making: true,
            sheet: Some(sheet.clone()),
            ..Notes::default()
        };
        let title = crate::recovery_sheet::TITLE;
        let ours = format!("====\n{title}\n====\n");
        for (notes, content, removed) in [
            (&interrupted, "", true),
            (&interrupted, ours.as_str(), true),
            (&interrupted, "my own notes\n", false),
            (&Notes::default(), ours.as_str(), false),
        ] {
            std::fs::write(&sheet, content).unwrap();
            assert_eq!(remove_void_sheet(notes, &sheet), removed, "{content:?}");
            assert_eq!(sheet.exists(), !removed);
        }
        std::fs::write(&sheet, &ours).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&sheet, &link).unwrap();
        assert!(!remove_void_sheet(&interrupted, &link));
        assert!(sheet.exists());
    }

    #[test]
    fn notes_are_there_for_the_next_run() {
        let folder = tempfile::tempdir().unwrap();
        let mut progress = Progress::of(folder.path(), "nas").unwrap();
        progress.note(|notes| notes.first_run = Some(true));
        assert_eq!(
            Progress::of(folder.path(), "usb").unwrap().read(),
            Notes::default()
        );
        let read = Progress::of(folder.path(), "nas").unwrap().read();
        assert_eq!(read.first_run, Some(true));
    }
}
