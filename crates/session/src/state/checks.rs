//! The results of the last check of each kind, kept on this machine for each container.
//!
//! `checks/UUID-TARGET.json` ([`StatePaths`]) in the state folder: `quick` (header and file system; every
//! check covers those), `read_data`, `drill`, `recovery`, and `against_source` with an entry for each job. One kind never replaces
//! another: a check of the metadata says nothing about damaged files.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sprat_snapshot::{CheckWhat, begin_known_from};

use crate::files;
use crate::state::paths::{self, StatePaths};
use crate::{Exit, Failure};

/// All results of one container.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct KeptChecks {
    /// Header, file length and file system.
    pub quick: Option<KeptCheck>,
    /// Every file read.
    pub read_data: Option<KeptCheck>,
    /// When the first part ended of a check of every file that is not finished.
    pub read_data_since: Option<Timestamp>,
    /// The last drill.
    pub drill: Option<KeptCheck>,
    /// The last drill by the recovery sheet alone.
    pub recovery: Option<KeptCheck>,
    /// The latest snapshot beside its source, by job.
    pub against_source: BTreeMap<String, KeptCheck>,
}

/// One check.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeptCheck {
    /// When it ended.
    pub at: Timestamp,
    /// [`Exit::Done`] or [`Exit::Damaged`].
    pub exit: Exit,
    /// It covered everything. If not, the next check continues.
    pub finished: bool,
    /// The JSON that `sprat check --json` printed, or the failure that it ended with.
    pub result: Value,
}

/// What was checked.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// The default check: header, lock, file system.
    Quick,
    /// All data was read.
    ReadData,
    /// The job of this name was compared with its source.
    AgainstSource(&'a str),
    /// A sample was restored.
    Drill,
    /// A sample was restored by the recovery sheet alone.
    Recovery,
}

/// The kept results of a container. Empty if the file is missing or unusable.
pub fn last(paths: &StatePaths) -> KeptChecks {
    files::read_json(&path(paths)).unwrap_or_default()
}

/// As [`last`], but a file that can't be read is a failure.
pub(crate) fn read(paths: &StatePaths) -> Result<KeptChecks, Failure> {
    files::read_json_if_there(&path(paths)).map(Option::unwrap_or_default)
}

impl KeptChecks {
    /// Stores a result. A check of only a part that found nothing replaces neither one that found damage nor
    /// one of everything.
    pub fn put(&mut self, kind: Kind<'_>, check: KeptCheck) {
        let part_only = !check.finished && check.exit == Exit::Done;
        if matches!(kind, Kind::ReadData) {
            let since = self.read_data_since.unwrap_or(check.at);
            self.read_data_since = (!check.finished).then_some(since);
        }
        let of_kind = match kind {
            Kind::Quick => self.quick.as_ref(),
            Kind::ReadData => self.read_data.as_ref(),
            Kind::AgainstSource(job) => self.against_source.get(job),
            // Each drill stands for itself. What was damaged is in the sample of the next one.
            Kind::Drill | Kind::Recovery => None,
        };
        let is_worth_more = |kept: &KeptCheck| kept.exit == Exit::Damaged || kept.finished;
        if part_only && of_kind.is_some_and(is_worth_more) {
            return;
        }
        match kind {
            Kind::Quick => self.quick = Some(check),
            Kind::ReadData => self.read_data = Some(check),
            Kind::Drill => self.drill = Some(check),
            Kind::Recovery => self.recovery = Some(check),
            Kind::AgainstSource(job) => {
                self.against_source.insert(job.to_owned(), check);
            }
        }
    }

    /// Writes the results to the state folder.
    pub fn store(&self, paths: &StatePaths) -> io::Result<()> {
        files::write_json(&path(paths), self)
    }
}

impl KeptCheck {
    /// The result of a check that ends now.
    #[must_use]
    pub fn now(exit: Exit, finished: bool, result: Value) -> Self {
        Self {
            at: Timestamp::now(),
            exit,
            finished,
            result,
        }
    }
}

/// Adds results to what is kept.
pub fn keep(paths: &StatePaths, results: Vec<(Kind<'_>, KeptCheck)>) -> io::Result<()> {
    let mut kept = last(paths);
    for (kind, check) in results {
        kept.put(kind, check);
    }
    kept.store(paths)
}

/// The file with what earlier checks of this kind read, from which the next one continues. The first check
/// of a container starts with what the last check of a copy of the container read, so that it has something
/// to compare with; the error says why it can't.
pub fn sums(paths: &StatePaths, what: &CheckWhat) -> (PathBuf, Option<io::Error>) {
    // An unfinished check of another kind is not continued.
    let name = match what {
        CheckWhat::Everything => ".sums".to_owned(),
        CheckWhat::AgainstSource(job) => format!(".against-{job}.sums"),
    };
    let own = paths.file(paths::CHECKS, &name);
    if own.exists() {
        return (own, None);
    }
    let others = paths.of_others(paths::CHECKS, &name).into_iter();
    let dated = others.filter_map(|other| {
        let written = other.path.metadata().ok()?.modified().ok()?;
        Some((written, other.path))
    });
    let error = dated
        .max()
        .and_then(|(_, newest)| begin_known_from(&newest, &own).err());
    (own, error)
}

/// The file with the results.
pub fn path(paths: &StatePaths) -> PathBuf {
    paths.file(paths::CHECKS, ".json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(exit: Exit, finished: bool) -> KeptCheck {
        KeptCheck {
            at: Timestamp::UNIX_EPOCH,
            exit,
            finished,
            result: Value::Null,
        }
    }

    #[test]
    fn damage_stays_known_until_a_whole_check_of_its_kind_finds_none() {
        let dir = tempfile::tempdir().unwrap();
        let paths = &paths::tests::paths(dir.path(), "host:x.luks");
        let mut kept = last(paths);
        kept.put(Kind::ReadData, check(Exit::Damaged, true));
        kept.put(Kind::Quick, check(Exit::Done, true));
        kept.put(Kind::AgainstSource("home"), check(Exit::Done, true));
        kept.put(Kind::ReadData, check(Exit::Done, false));
        kept.store(paths).unwrap();
        let mut kept = last(paths);
        assert_eq!(kept.read_data.as_ref().unwrap().exit, Exit::Damaged);
        assert_eq!(kept.quick.as_ref().unwrap().exit, Exit::Done);
        assert!(kept.against_source.contains_key("home"));
        kept.put(Kind::ReadData, check(Exit::Done, true));
        assert_eq!(kept.read_data.unwrap().exit, Exit::Done);
    }

    #[test]
    fn last_check_of_everything_stays_known_while_the_next_one_goes_on() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut kept = KeptChecks::default();
        let mut put = |second, exit, finished| {
            let mut check = check(exit, finished);
            check.at = at(second);
            kept.put(Kind::ReadData, check);
            let last = kept.read_data.as_ref().unwrap();
            (last.at, last.finished, kept.read_data_since)
        };
        assert_eq!(put(1, Exit::Done, false), (at(1), false, Some(at(1))));
        assert_eq!(put(2, Exit::Done, false), (at(2), false, Some(at(1))));
        assert_eq!(put(3, Exit::Done, true), (at(3), true, None));
        assert_eq!(put(4, Exit::Done, false), (at(3), true, Some(at(4))));
        assert_eq!(put(5, Exit::Damaged, false), (at(5), false, Some(at(4))));
        assert_eq!(put(6, Exit::Done, true), (at(6), true, None));
    }

    #[test]
    fn what_an_older_sprat_kept_or_a_crash_tore_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let paths = &paths::tests::paths(dir.path(), "host:x.luks");
        std::fs::create_dir(dir.path().join("checks")).unwrap();
        for text in ["{", "[]", r#"{"quick": 3}"#] {
            std::fs::write(path(paths), text).unwrap();
            assert!(last(paths).quick.is_none());
        }
    }
}
