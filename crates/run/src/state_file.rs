//! A JSON file of the state folder that several processes change: whole, durable, one change at a time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sprat_session::files;

/// A JSON file. While it can't be written, what it would hold is kept in memory.
#[derive(Debug)]
pub struct StateFile<T> {
    path: PathBuf,
    /// What is lost with an unreadable file, as a sentence.
    loss: &'static str,
    /// What takes the place of an unreadable file.
    instead: fn() -> T,
    /// What could not be written.
    unwritten: Option<T>,
    problems: Vec<String>,
}

impl<T: Default + Clone + PartialEq + Serialize + DeserializeOwned> StateFile<T> {
    /// Reads and writes nothing yet. `loss` says what is lost if the file can't be read.
    #[must_use]
    pub fn new(path: PathBuf, loss: &'static str) -> Self {
        Self {
            path,
            loss,
            instead: T::default,
            unwritten: None,
            problems: Vec::new(),
        }
    }

    /// Content for a file that is there and can't be read; without this, the default.
    #[must_use]
    pub(crate) fn with_instead(mut self, instead: fn() -> T) -> Self {
        self.instead = instead;
        self
    }

    /// What the file holds. A file that is not there, is torn or can't be read counts as not known:
    /// the default, or what `with_instead` has for the last two. Those are a problem.
    pub fn read(&mut self) -> T {
        self.known().unwrap_or_else(self.instead)
    }

    /// What the file holds, or would hold; `None`: not known.
    fn known(&mut self) -> Option<T> {
        if let Some(unwritten) = &self.unwritten {
            return Some(unwritten.clone());
        }
        match self.try_read() {
            Ok(content) => Some(content.unwrap_or_default()),
            Err(error) => {
                let path = self.path.display();
                self.report(format!("can't read {path}: {error}. {}", self.loss));
                None
            }
        }
    }

    fn try_read(&self) -> io::Result<Option<T>> {
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    /// Changes the content and writes it, while no other process does; what stays as it was is not
    /// written. If it can't be written, that is a problem, and the change lasts as long as `self`.
    pub fn change<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        // A folder that can't be written has nobody to wait for.
        let _turn = self.lock().ok();
        let known = self.known();
        let mut content = known.clone().unwrap_or_else(self.instead);
        let result = change(&mut content);
        if known.as_ref() == Some(&content) && self.unwritten.is_none() {
            return result;
        }
        match files::write_json_even_if_full(&self.path, &content) {
            Ok(()) => self.unwritten = None,
            Err(error) => {
                let path = self.path.display();
                self.report(format!("can't write {path}: {error}"));
                self.unwritten = Some(content);
            }
        }
        result
    }

    fn lock(&self) -> io::Result<File> {
        let path = self.path.with_extension("lock");
        let turn = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        Ok(turn)
    }

    fn report(&mut self, problem: String) {
        tracing::warn!("{problem}");
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// What could not be read or written since the last call, each once.
    pub fn take_problems(&mut self) -> Vec<String> {
        std::mem::take(&mut self.problems)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    type Numbers = StateFile<Vec<u32>>;

    fn file(folder: &tempfile::TempDir) -> Numbers {
        StateFile::new(
            folder.path().join("state/numbers.json"),
            "The numbers are not known.",
        )
    }

    #[test]
    fn a_change_is_there_for_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let mut numbers = file(&folder);
        assert!(numbers.read().is_empty());
        let len = numbers.change(|numbers| {
            numbers.push(1);
            numbers.len()
        });
        assert_eq!(len, 1);
        assert_eq!(file(&folder).read(), [1]);
        assert_eq!(numbers.take_problems(), [""; 0]);
    }

    #[test]
    fn what_stays_as_it_was_is_not_written() {
        use std::os::unix::fs::MetadataExt;

        let folder = tempfile::tempdir().unwrap();
        let mut numbers = file(&folder);
        numbers.change(|_| ());
        let path = folder.path().join("state/numbers.json");
        assert!(!path.exists());
        numbers.change(|numbers| numbers.push(1));
        let before = path.metadata().unwrap().ino();
        numbers.change(|numbers| numbers[0] = 1);
        assert_eq!(path.metadata().unwrap().ino(), before);
    }

    #[test]
    fn changes_at_the_same_time_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        // The folder is there, so each has the lock.
        fs::create_dir(folder.path().join("state")).unwrap();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let mut numbers = file(&folder);
                scope.spawn(move || numbers.change(|numbers| numbers.push(number)));
            }
        });
        let mut numbers = file(&folder).read();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn torn_file_counts_as_not_known_and_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        file(&folder).change(|numbers| numbers.extend(0..100));
        let path = folder.path().join("state/numbers.json");
        let whole = fs::read(&path).unwrap();
        for len in [0, 1, whole.len() / 2, whole.len() - 2] {
            fs::write(&path, &whole[..len]).unwrap();
            let mut numbers = file(&folder);
            assert!(numbers.read().is_empty(), "{len}");
            let problems = numbers.take_problems();
            assert_eq!(problems.len(), 1);
            assert!(
                problems[0].ends_with(". The numbers are not known."),
                "{problems:?}"
            );
            // A torn file does not stay.
            numbers.change(|_| ());
            assert_eq!(fs::read_to_string(&path).unwrap(), "[]\n");
        }
    }

    #[test]
    fn what_can_not_be_written_lasts_in_memory_and_is_written_later() {
        let folder = tempfile::tempdir().unwrap();
        // A file where the folder should be.
        fs::write(folder.path().join("state"), "").unwrap();
        let mut numbers = file(&folder);
        numbers.change(|numbers| numbers.push(1));
        numbers.change(|numbers| numbers.push(2));
        assert_eq!(numbers.read(), [1, 2]);
        assert!(!numbers.take_problems().is_empty());
        fs::remove_file(folder.path().join("state")).unwrap();
        numbers.change(|numbers| numbers.push(3));
        assert_eq!(file(&folder).read(), [1, 2, 3]);
    }
}
