//! The status that everybody on this machine may read, for monitors: `public/status.json`.
//!
//! Always true: it holds names of the config, times, codes, sizes and words of fixed lists, and no
//! path, target or file name.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use sprat_session::{Exit, text};
use sprat_snapshot::local_file;

use crate::copy_name::CopyName;
use crate::metrics::publish;
use crate::notify::Kind;
use crate::watch::{Shown, worst};

/// What the file holds. Fields are added, never renamed or removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicStatus {
    /// 1.
    pub schema: u32,
    /// When it was written.
    pub at: Timestamp,
    /// The exit code of `status` then.
    pub code: u8,
    /// The copies of the config.
    pub copies: Vec<PublicCopy>,
    /// The containers of the config.
    pub containers: Vec<PublicContainer>,
    /// The open events.
    pub events: Vec<PublicEvent>,
    /// The watched files of the config.
    #[serde(default)]
    pub watches: Vec<PublicWatch>,
}

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicCopy {
    /// Which.
    #[serde(flatten)]
    pub copy: CopyName,
    /// Start of the last attempt that left a snapshot.
    pub last_success: Option<Timestamp>,
    /// Start of the last attempt that left a complete one.
    pub last_complete: Option<Timestamp>,
    /// Start of the last attempt.
    pub last_attempt: Option<Timestamp>,
    /// Its exit code.
    pub last_code: Option<u8>,
    /// Attempts since the last success that ended with other than 0, 3 and 130.
    pub failures_since: u64,
    /// Whether it is due.
    pub due: bool,
    /// When it is next.
    pub next: Option<Timestamp>,
    /// Whether it is overdue.
    pub overdue: bool,
    /// Overdue so many seconds after the last success.
    pub alert_after_seconds: Option<i64>,
    /// Overdue from then on without a success.
    #[serde(default)]
    pub overdue_at: Option<Timestamp>,
    /// Whether it waits for `accept`.
    pub held: bool,
    /// Which condition skipped it: a word of a fixed list.
    pub skipped: Option<Word>,
    /// What the last success uploaded.
    pub sent_bytes: Option<u64>,
    /// Snapshots in the container.
    pub snapshots: Option<u64>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicContainer {
    /// Its name in the config.
    pub name: String,
    /// Free in the volume at the end of the last session.
    pub volume_free_bytes: Option<u64>,
    /// Free on the server, likewise.
    pub server_free_bytes: Option<u64>,
    /// When all data was last checked.
    pub check: Option<Timestamp>,
    /// The last drill.
    pub drill: Option<Timestamp>,
    /// Whether it passed.
    pub drill_passed: Option<bool>,
    /// When the recovery key was last rehearsed.
    pub key_rehearsed: Option<Timestamp>,
}

/// One watched file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicWatch {
    /// Its name in the config.
    pub name: String,
    /// When it was last written to.
    pub last_written: Option<Timestamp>,
    /// Whether it is overdue.
    pub overdue: bool,
    /// Overdue from then on if nothing is written.
    pub overdue_at: Option<Timestamp>,
}

/// An open event, without its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicEvent {
    /// Its kind.
    pub kind: Kind,
    /// The copy, if it has one.
    pub copy: Option<String>,
    /// The container, if it has one.
    pub container: Option<String>,
    /// When it opened.
    pub opened: Timestamp,
    /// The exit code that belongs to it.
    pub code: u8,
}

impl PublicEvent {
    /// What may be public of an event.
    #[must_use]
    pub fn of(event: &crate::notify::Event) -> Self {
        let subject = &event.key.subject;
        Self {
            kind: event.key.kind,
            copy: subject.copy().map(ToString::to_string),
            container: subject.container().map(str::to_owned),
            opened: event.opened,
            code: event.cause.code,
        }
    }
}

/// A word in small letters with `_`, such as `metered`: it can't be a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Word(String);

/// A text that is no such word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a word in small letters")]
pub struct NotAWord;

impl TryFrom<String> for Word {
    type Error = NotAWord;

    fn try_from(text: String) -> Result<Self, NotAWord> {
        let is_word = |c: char| c.is_ascii_lowercase() || c == '_';
        match !text.is_empty() && text.len() <= 30 && text.chars().all(is_word) {
            true => Ok(Self(text)),
            false => Err(NotAWord),
        }
    }
}

impl From<Word> for String {
    fn from(word: Word) -> Self {
        word.0
    }
}

impl PublicStatus {
    /// Where it lies below the state folder.
    #[must_use]
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("public").join("status.json")
    }

    /// Writes it: aside, then renamed, mode 0644 in a folder of mode 0755.
    ///
    /// # Errors
    /// It could not be written; the file is as it was.
    pub fn write(&self, state_dir: &Path) -> io::Result<()> {
        let path = Self::path(state_dir);
        let folder = path.parent().unwrap_or(state_dir);
        local_file::make_private_folder(folder)?;
        // Others may pass through the state folder, and list nothing in it.
        let mode = state_dir.metadata()?.permissions().mode() & 0o7777;
        if mode | 0o011 != mode {
            std::fs::set_permissions(state_dir, PermissionsExt::from_mode(mode | 0o011))?;
        }
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755))?;
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        publish(&path, &text)
    }

    /// Reads it; `None` if it is not there.
    ///
    /// # Errors
    /// It can't be read or understood.
    pub fn read(state_dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(Self::path(state_dir)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes it (`public_status = false`).
    ///
    /// # Errors
    /// It is still there.
    pub fn remove(state_dir: &Path) -> io::Result<()> {
        match std::fs::remove_file(Self::path(state_dir)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// As it is at `now`, of these containers, jobs and copies; no word: of all. A copy becomes overdue
    /// by itself.
    #[must_use]
    pub fn at_time(mut self, now: Timestamp, words: &[String]) -> Self {
        let is_meant = |copy: &CopyName| {
            let names = [copy.job.clone(), copy.container.clone(), copy.to_string()];
            words.is_empty() || names.iter().any(|name| words.contains(name))
        };
        self.copies.retain(|copy| is_meant(&copy.copy));
        let is_there = |name: &String| {
            words.is_empty() || self.copies.iter().any(|copy| copy.copy.container == *name)
        };
        self.containers
            .retain(|container| is_there(&container.name));
        let is_late = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
        for copy in &mut self.copies {
            copy.overdue |= is_late(copy.overdue_at);
        }
        self.watches.retain(|_| words.is_empty());
        for watch in &mut self.watches {
            watch.overdue |= is_late(watch.overdue_at);
        }
        self
    }

    /// The code of `status`: the published one, or that a copy is overdue since then.
    #[must_use]
    pub fn exit(&self) -> Exit {
        let published = Exit::ALL.into_iter().find(|exit| exit.code() == self.code);
        let overdue = self.copies.iter().any(|copy| copy.overdue)
            || self.watches.iter().any(|watch| watch.overdue);
        worst(
            published
                .into_iter()
                .chain(overdue.then_some(Exit::Overdue)),
        )
    }

    /// As text: a table of the copies, and the open events.
    #[must_use]
    pub fn text(&self, shown: &Shown) -> String {
        let time =
            |at: Option<Timestamp>| at.map_or_else(|| "never".to_owned(), |at| shown.time(at));
        let mut rows = Vec::new();
        for copy in &self.copies {
            let mut parts = Vec::new();
            parts.extend(copy.overdue.then(|| "OVERDUE".to_owned()));
            parts.push(format!("last backup {}", time(copy.last_success)));
            if let Some(code) = copy.last_code.filter(|code| !matches!(code, 0 | 3)) {
                parts.push(format!("last run FAILED (code {code})"));
            }
            if copy.failures_since > 1 {
                parts.push(format!(
                    "{} failures since the last backup",
                    copy.failures_since
                ));
            }
            parts.extend(copy.held.then(|| "held".to_owned()));
            parts.extend(copy.skipped.as_ref().map(|_| "skipped".to_owned()));
            match (copy.due, copy.next) {
                (true, _) => parts.push("due".to_owned()),
                (false, Some(next)) => parts.push(format!("next {}", shown.time(next))),
                (false, None) => {}
            }
            rows.push(vec![copy.copy.to_string(), parts.join("; ")]);
        }
        for container in &self.containers {
            let mut parts = Vec::new();
            let free = |bytes: Option<u64>, place: &str| {
                bytes.map(|bytes| format!("{} free {place}", text::bytes(bytes)))
            };
            parts.extend(free(container.volume_free_bytes, "in the volume"));
            parts.extend(free(container.server_free_bytes, "on the server"));
            parts.push(format!("all data checked: {}", time(container.check)));
            parts.push(format!("key rehearsed: {}", time(container.key_rehearsed)));
            rows.push(vec![container.name.clone(), parts.join("; ")]);
        }
        rows.extend(self.watches.iter().map(|watch| {
            let overdue = if watch.overdue { "OVERDUE; " } else { "" };
            let what = format!("{overdue}last written {}", time(watch.last_written));
            vec![format!("watch {}", watch.name), what]
        }));
        let events = self.events.len() as u64;
        format!(
            "as of {}, {} open\n{}",
            shown.time(self.at),
            text::counted(events, "event", "events"),
            text::table(&rows, &[])
        )
    }

    /// Whether nothing wrote it for so long that it says nothing about now.
    #[must_use]
    pub fn is_old(&self, now: Timestamp) -> bool {
        now.duration_since(self.at) > SignedDuration::from_hours(3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn status() -> PublicStatus {
        PublicStatus {
            schema: 1,
            at: at(1_795_874_400),
            code: 4,
            copies: vec![PublicCopy {
                copy: CopyName::new("home", "nas"),
                last_success: Some(at(1)),
                last_complete: None,
                last_attempt: Some(at(2)),
                last_code: Some(14),
                failures_since: 3,
                due: true,
                next: None,
                overdue: true,
                alert_after_seconds: Some(259_200),
                overdue_at: Some(at(259_201)),
                held: false,
                skipped: Some("metered".to_owned().try_into().unwrap()),
                sent_bytes: Some(7),
                snapshots: Some(3),
            }],
            containers: vec![PublicContainer {
                name: "nas".to_owned(),
                volume_free_bytes: Some(1),
                server_free_bytes: None,
                check: None,
                drill: None,
                drill_passed: None,
                key_rehearsed: None,
            }],
            events: Vec::new(),
            watches: vec![PublicWatch {
                name: "pi".to_owned(),
                last_written: None,
                overdue: false,
                overdue_at: Some(at(1_795_960_800)),
            }],
        }
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn everybody_can_read_it_and_it_reads_back() {
        let state = tempfile::tempdir().unwrap();
        let path = PublicStatus::path(state.path());
        assert_eq!(PublicStatus::read(state.path()).unwrap(), None);
        // Folders that something made too narrow, as sprat makes the state folder.
        std::fs::set_permissions(state.path(), PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::create_dir(state.path().join("public")).unwrap();
        std::fs::set_permissions(
            state.path().join("public"),
            PermissionsExt::from_mode(0o700),
        )
        .unwrap();
        status().write(state.path()).unwrap();
        assert_eq!(mode(&path), 0o644);
        assert_eq!(mode(path.parent().unwrap()), 0o755);
        assert_eq!(mode(state.path()), 0o711);
        assert_eq!(PublicStatus::read(state.path()).unwrap(), Some(status()));
        std::fs::write(&path, "torn {").unwrap();
        assert!(PublicStatus::read(state.path()).is_err());
        PublicStatus::remove(state.path()).unwrap();
        PublicStatus::remove(state.path()).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn no_path_gets_into_it() {
        use crate::notify::{Cause, Events, Finding, Key, Subject};

        let mut events = Events::default();
        let found = Finding {
            cause: Cause::new(1, "class"),
            text: "can't read /home/secret".to_owned(),
            hint: "see backup@nas.example:/laptop.luks".to_owned(),
        };
        let key = Key::new(Kind::Failure, Subject::Copy(CopyName::new("home", "nas")));
        events.observe(at(5), &key, Some(&found));
        let mut status = status();
        status.events = events.open().map(PublicEvent::of).collect();
        let text = serde_json::to_string(&status).unwrap();
        assert!(
            text.contains(r#""kind":"failure""#) && !text.contains('/'),
            "{text}"
        );
        for text in ["/etc", "not metered", "", "Metered", "a.b"] {
            assert_eq!(Word::try_from(text.to_owned()), Err(NotAWord), "{text}");
        }
    }

    #[test]
    fn copy_becomes_overdue_in_a_status_that_is_not_renewed() {
        let mut published = status();
        published.code = 0;
        published.copies[0].overdue = false;
        published.copies[0].last_code = Some(0);
        let later = |published: &PublicStatus, seconds| published.clone().at_time(at(seconds), &[]);
        assert_eq!(later(&published, 259_200).exit(), Exit::Done);
        let overdue = later(&published, 259_201);
        assert_eq!(overdue.exit(), Exit::Overdue);
        let shown = Shown {
            now: at(259_201),
            zone: jiff::tz::TimeZone::UTC,
        };
        insta::assert_snapshot!(overdue.text(&shown), @r"
        as of 2026-11-28 14:00, 0 events open
        home@nas  OVERDUE; last backup 1970-01-01 00:00; 3 failures since the last backup; skipped; due
        nas       1 B free in the volume; all data checked: never; key rehearsed: never
        watch pi  last written never
        ");
        // A copy that never succeeded, and a file that nothing writes into, become overdue, too.
        published.copies[0].last_success = None;
        assert_eq!(later(&published, 259_201).exit(), Exit::Overdue);
        let without = PublicStatus {
            copies: Vec::new(),
            ..published.clone()
        };
        assert_eq!(later(&without, 1_795_960_799).exit(), Exit::Done);
        assert_eq!(later(&without, 1_795_960_800).exit(), Exit::Overdue);
        for (word, copies) in [("home", 1), ("nas", 1), ("home@nas", 1), ("www", 0)] {
            let chosen = published.clone().at_time(at(1), &[word.to_owned()]);
            assert_eq!(chosen.copies.len(), copies, "{word}");
            assert_eq!(chosen.containers.len(), copies, "{word}");
        }
    }

    #[test]
    fn status_that_nothing_renews_is_old() {
        assert!(!status().is_old(at(1_795_874_400 + 3 * 3600)));
        assert!(status().is_old(at(1_795_874_400 + 3 * 3600 + 1)));
    }
}
