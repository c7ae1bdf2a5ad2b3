//! Reaches the hosts of a job before a run, and finds out which of their sources are there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{Host, hosts};
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::name_list::NameList;
use crate::progress::{Phase, Progress};
use crate::pulled_source::PulledSource;
use crate::rsync::{Ended, ITEM_FORMAT, Outcome, Rsync, parse_entry};
use crate::spec::SnapshotSpec;
use crate::text::unescape_path;

/// ssh's exit code if the host was not reached or did not let us in (ssh(1), EXIT STATUS).
const SSH_FAILED: i32 = 255;
/// The exit code of the host's login shell if the host has no rsync (errcode.h).
const NO_PROGRAM: i32 = 127;
/// If rsync sees the end of the connection before that of ssh, its exit code is another one. It prints
/// this then (io.c, `whine_about_eof`).
const NOTHING_RECEIVED: &str = "(0 bytes received so far)";

/// How an rsync that failed stands to its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contact {
    NotReached,
    NoProgram,
    /// rsync began there.
    Begun,
}

fn contact(outcome: &Outcome) -> Contact {
    let mut messages = outcome.messages.names.iter();
    let has = |text: &str| {
        outcome
            .messages
            .names
            .iter()
            .any(|line| line.contains(text))
    };
    let is_missing = |line: &String| !line.starts_with("rsync") && line.contains("not found");
    let silent = outcome.exit == Some(SSH_FAILED) || has(NOTHING_RECEIVED);
    if outcome.exit == Some(NO_PROGRAM) || (silent && messages.any(is_missing)) {
        Contact::NoProgram
    } else if silent {
        Contact::NotReached
    } else {
        Contact::Begun
    }
}

/// A pulled source that is skipped.
#[derive(Debug, Clone)]
pub(crate) struct MissingPulled {
    pub(crate) source: PulledSource,
    pub(crate) why: String,
    /// Whether its host was reached.
    pub(crate) reached: bool,
}

/// What is there of a job's pulled sources.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reached {
    /// Each with at least one source.
    pub(crate) hosts: Vec<Host>,
    pub(crate) missing: Vec<MissingPulled>,
}

impl Reached {
    /// None of a job's pulled sources, each for this reason.
    pub(crate) fn refused(spec: &SnapshotSpec, why: &str) -> Self {
        let missing = spec.pulled.iter().map(|source| MissingPulled {
            source: source.clone(),
            why: why.to_owned(),
            reached: true,
        });
        Self {
            hosts: Vec::new(),
            missing: missing.collect(),
        }
    }

    /// The error of a job for which nothing is there, if a pulled source is missing.
    pub(crate) fn error(&self) -> Option<SnapshotError> {
        let one = self.missing.first()?;
        Some(SnapshotError::HostsMissing {
            path: one.source.to_string(),
            why: one.why.clone(),
            reached: self.missing.iter().any(|one| one.reached),
        })
    }
}

/// Asks each host for its sources. `folder`: any folder; nothing is written to it.
///
/// # Errors
/// rsync can't be run, or it was cancelled.
pub(crate) fn reach(
    rsync: &Rsync,
    spec: &SnapshotSpec,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<Reached, SnapshotError> {
    let mut all = Reached::default();
    for mut host in hosts(spec) {
        let mut sources = Vec::new();
        let paths = host.sources.iter().map(|source| source.path.clone());
        let found = host.ask_for(
            rsync,
            spec,
            &paths.collect::<Vec<_>>(),
            folder,
            progress,
            cancel,
        )?;
        for (source, why) in host.sources.iter().zip(found.why_missing) {
            match why {
                None => sources.push(source.clone()),
                Some(why) => all.missing.push(MissingPulled {
                    source: source.clone(),
                    why,
                    reached: found.reached,
                }),
            }
        }
        host.sources = sources;
        if !host.sources.is_empty() {
            all.hosts.push(host);
        }
    }
    Ok(all)
}

/// Asks the hosts of a job for its pulled sources; returns those that are not there, and why. `folder`: any
/// folder; nothing is written to it.
///
/// # Errors
/// rsync can't be run, or it was cancelled.
pub fn missing_on_hosts(
    spec: &SnapshotSpec,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<Vec<(PulledSource, String)>, SnapshotError> {
    if spec.pulled.is_empty() {
        return Ok(Vec::new());
    }
    let rsync = Rsync::find(&spec.rsync)?;
    let missing = reach(&rsync, spec, folder, progress, cancel)?.missing;
    Ok(missing
        .into_iter()
        .map(|one| (one.source, one.why))
        .collect())
}

/// What a host answered.
pub(crate) struct Answer {
    pub(crate) reached: bool,
    /// For each path, why it can't be pulled.
    pub(crate) why_missing: Vec<Option<String>>,
}

impl Host {
    /// Asks the host whether these paths are files or folders.
    ///
    /// # Errors
    /// As [`reach`].
    pub(crate) fn ask_for(
        &self,
        rsync: &Rsync,
        spec: &SnapshotSpec,
        paths: &[PathBuf],
        folder: &Path,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Answer, SnapshotError> {
        let options = ["-ndlD", "--no-implied-dirs", ITEM_FORMAT, "--outbuf=L"];
        let names = paths
            .iter()
            .map(|path| path.strip_prefix("/").unwrap_or(path));
        let names = names.map(|name| match name == Path::new("") {
            true => Path::new("."),
            false => name,
        });
        let options = options.map(OsString::from).to_vec();
        let mut invocation = self.invocation_of(spec, options, names, (folder, "./none/"));
        invocation.lists_changes = true;
        let mut checking = |now: Progress| {
            progress(Progress {
                still_s: now.still_s,
                ..Progress::begin(Phase::Checking)
            });
        };
        let outcome = rsync.run(&invocation, &mut checking, cancel)?;
        let failed = match &outcome.ended {
            Ended::Cancelled => return Err(SnapshotError::Cancelled),
            Ended::Whole | Ended::WithUnread => None,
            _ => Some(why_failed(&outcome)),
        };
        let why_missing = |path: &PathBuf| {
            if let Some(why) = &failed {
                return Some(why.clone());
            }
            let lines = outcome.changes.names.iter();
            let mut entries = lines.filter_map(|line| parse_entry(line));
            let found = entries.find(|entry| {
                let name = unescape_path(entry.named.name.trim_end_matches('/'));
                let name = name.strip_prefix(".").map(Path::to_owned).unwrap_or(name);
                Path::new("/").join(name) == *path
            });
            match found {
                Some(entry) if entry.is_file || entry.named.name.ends_with('/') => None,
                Some(_) => Some(
                    "is a symbolic link, pipe, socket or device; give a file or folder".to_owned(),
                ),
                None => Some(why_unread(&outcome.messages, path)),
            }
        };
        Ok(Answer {
            reached: failed.is_none() || contact(&outcome) != Contact::NotReached,
            why_missing: paths.iter().map(why_missing).collect(),
        })
    }
}

/// Why a host sent nothing.
pub(crate) fn why_failed(outcome: &Outcome) -> String {
    let messages = || outcome.messages.names.iter().rev();
    // ssh's last words, and those of the host's login shell, say more than rsync's.
    let theirs = messages().find(|line| !line.starts_with("rsync"));
    let rsyncs = messages().rev().find(|line| line.starts_with("rsync: "));
    let said = theirs.or(rsyncs).cloned();
    let said = said.unwrap_or_else(|| "it gave no reason".to_owned());
    match (contact(outcome), outcome.exit) {
        (Contact::NotReached, _) => format!("the host was not reached: {said}"),
        (Contact::NoProgram, _) => format!("the host has no such rsync: {said}"),
        (Contact::Begun, Some(code)) => format!("rsync ended with exit code {code}: {said}"),
        (Contact::Begun, None) => format!("rsync was ended by a signal: {said}"),
    }
}

fn why_unread(messages: &NameList, path: &Path) -> String {
    let name = format!("\"{}\"", crate::text::escape_path(path));
    let about = |line: &&String| line.contains(&name);
    match messages.names.iter().find(about) {
        Some(line) if line.contains("No such file or directory") => "not found".to_owned(),
        Some(line) => format!("can't be read: {line}"),
        None => "not found".to_owned(),
    }
}
