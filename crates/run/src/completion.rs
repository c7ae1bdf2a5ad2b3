//! What a shell can complete after `sprat`: names of the config, and snapshots that this machine made.
//!
//! Always true: only local files are read. Nothing connects to a server, asks or fails: what can't be
//! read is not offered.

use std::path::{Path, PathBuf};

use crate::config::{self, ConfigPlaces};
use crate::copy_name::CopyName;
use crate::public_status::PublicStatus;
use crate::run_history::RunHistory;

/// How many snapshots of each copy are offered: the newest.
const SNAPSHOTS_MAX: usize = 100;

/// Names of containers and copies.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The containers, in the order of the config.
    pub containers: Vec<String>,
    /// The copies, in the same order.
    pub copies: Vec<CopyName>,
}

impl Names {
    /// From the config, as far as it is right. If there is none that this user may read: from what the
    /// last run published in `state_dir`.
    #[must_use]
    pub fn load(files: &[PathBuf], places: &ConfigPlaces, state_dir: &Path) -> Self {
        let config = config::load(files, places).config;
        if config.containers.is_empty() {
            return Self::published(state_dir);
        }
        Self {
            containers: config.containers.iter().map(|c| c.name.clone()).collect(),
            copies: config.copies().map(|copy| copy.name()).collect(),
        }
    }

    fn published(state_dir: &Path) -> Self {
        let Ok(Some(status)) = PublicStatus::read(state_dir) else {
            return Self::default();
        };
        Self {
            containers: status.containers.into_iter().map(|c| c.name).collect(),
            copies: status.copies.into_iter().map(|copy| copy.copy).collect(),
        }
    }

    /// The jobs that back up into one of `containers`; of all containers if it is empty.
    #[must_use]
    pub fn jobs(&self, containers: &[&str]) -> Vec<String> {
        let mut jobs = Vec::new();
        for copy in self.copies_in(containers) {
            if !jobs.contains(&copy.job) {
                jobs.push(copy.job.clone());
            }
        }
        jobs
    }

    /// `JOB/SNAPSHOT` of the same copies, for snapshots that this machine made: the newest of each copy
    /// first. A snapshot may have been pruned since.
    #[must_use]
    pub fn snapshots(&self, containers: &[&str], state_dir: &Path) -> Vec<String> {
        let history = RunHistory::new(state_dir);
        let mut found = Vec::new();
        for copy in self.copies_in(containers) {
            let lines = history.load(copy).unwrap_or_default();
            let made = lines.into_iter().rev().filter_map(|line| line.snapshot);
            found.extend(
                made.take(SNAPSHOTS_MAX)
                    .map(|snapshot| format!("{}/{snapshot}", copy.job)),
            );
        }
        found
    }

    fn copies_in<'n>(&'n self, containers: &'n [&str]) -> impl Iterator<Item = &'n CopyName> {
        let is_in = |copy: &&CopyName| {
            containers.is_empty() || containers.contains(&copy.container.as_str())
        };
        self.copies.iter().filter(is_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_history::RunLine;
    use jiff::Timestamp;

    fn places(folder: &Path) -> ConfigPlaces {
        ConfigPlaces {
            root: false,
            home: None,
            folder: Some(folder.to_owned()),
        }
    }

    fn config(folder: &Path) -> PathBuf {
        let path = folder.join("sprat.toml");
        let text = "[container.nas]\ntarget = \"b@nas:x.luks\"\n[container.usb]\ntarget = \"/usb/x.luks\"\n\
            [job.home]\ncontainer = [\"nas\", \"usb\"]\nsources = \"/home\"\n\
            [job.etc]\ncontainer = \"usb\"\nsources = \"/etc\"\n";
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn names_come_from_the_config() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let names = Names::load(&[config(folder.path())], &places(folder.path()), &state);
        assert_eq!(names.containers, ["nas", "usb"]);
        let copies: Vec<_> = names.copies.iter().map(ToString::to_string).collect();
        assert_eq!(copies, ["home@nas", "home@usb", "etc@usb"]);
        assert_eq!(names.jobs(&[]), ["home", "etc"]);
        assert_eq!(names.jobs(&["nas"]), ["home"]);
    }

    #[test]
    fn snapshots_come_from_the_history_newest_first() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let names = Names::load(&[config(folder.path())], &places(folder.path()), &state);
        assert_eq!(names.snapshots(&[], &state), [""; 0]);
        let history = RunHistory::new(&state);
        let now = Timestamp::now();
        for (copy, snapshot) in [
            ("nas", Some("2026-11-26T01-00-00Z")),
            ("nas", None),
            ("nas", Some("2026-11-27T01-00-00Z")),
            ("usb", Some("2026-11-28T01-00-00Z")),
        ] {
            let line = RunLine {
                ended: now,
                snapshot: snapshot.map(str::to_owned),
                ..RunLine::default()
            };
            let copy = CopyName::new("home", copy);
            history.append(&copy, &line, now).unwrap();
        }
        let of_nas = ["home/2026-11-27T01-00-00Z", "home/2026-11-26T01-00-00Z"];
        assert_eq!(names.snapshots(&["nas"], &state), of_nas);
        assert_eq!(names.snapshots(&[], &state).len(), 3);
    }

    #[test]
    fn nothing_that_can_be_read_is_nothing_to_offer() {
        let folder = tempfile::tempdir().unwrap();
        let missing = [folder.path().join("sprat.toml")];
        let names = Names::load(&missing, &places(folder.path()), folder.path());
        assert_eq!(names, Names::default());
        std::fs::create_dir(folder.path().join("public")).unwrap();
        std::fs::write(PublicStatus::path(folder.path()), "no JSON").unwrap();
        let names = Names::load(&missing, &places(folder.path()), folder.path());
        assert_eq!(names, Names::default());
    }

    #[test]
    fn a_user_who_may_not_read_the_config_gets_the_published_names() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("public")).unwrap();
        let published = r#"{"schema": 1, "at": "2026-11-28T01:00:00Z", "code": 0, "events": [],
            "copies": [{"job": "home", "container": "nas", "failures_since": 0, "due": false,
                        "overdue": false, "held": false}],
            "containers": [{"name": "nas"}]}"#;
        std::fs::write(PublicStatus::path(folder.path()), published).unwrap();
        let missing = [folder.path().join("sprat.toml")];
        let names = Names::load(&missing, &places(folder.path()), folder.path());
        assert_eq!(names.containers, ["nas"]);
        assert_eq!(names.copies, [CopyName::new("home", "nas")]);
    }
}
