//! Finds on a host what rsync's patterns can't express, as [`crate::source_scan`] does on this machine.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::Host;
use super::reach::why_failed;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::found::{Found, is_cache_tag};
use crate::progress::{Phase, Progress};
use crate::rsync::{Ended, ITEM_FORMAT, Invocation, Rsync};
use crate::spec::SnapshotSpec;
use crate::text::escape_path;

/// A longer file is no tag of a cache.
const TAG_BYTES_MAX: &str = "--max-size=64k";

impl Host {
    /// The options and the input that exclude what the job excludes on this host.
    ///
    /// # Errors
    /// As [`Host::rules`].
    pub(crate) fn filters(
        &self,
        spec: &SnapshotSpec,
    ) -> Result<(Vec<OsString>, Vec<u8>), SnapshotError> {
        let mut options = self.found.options.clone();
        options.push("--exclude-from=-".into());
        Ok((options, self.rules(spec)?))
    }

    /// A dry run that lists all that would be pulled. `folder`: any folder; nothing is written to it.
    ///
    /// # Errors
    /// As [`Host::rules`].
    pub(crate) fn listing(
        &self,
        rsync: &Rsync,
        spec: &SnapshotSpec,
        folder: &Path,
    ) -> Result<Invocation, SnapshotError> {
        let options = ["-nrlD", "--relative", ITEM_FORMAT, "--outbuf=L"];
        let mut options = options.map(OsString::from).to_vec();
        let (filters, input) = self.filters(spec)?;
        options.extend(filters);
        let mut invocation = self.invocation(rsync, spec, options, (folder, "./none/"));
        invocation.input = Some(input);
        Ok(invocation)
    }

    /// Scans the sources, and makes this host exclude what the rules find. The inner error says why the
    /// host can't be scanned. `folder`: any folder; nothing is written to it.
    ///
    /// # Errors
    /// rsync can't be run, or it was cancelled.
    pub(crate) fn scan(
        &mut self,
        rsync: &Rsync,
        spec: &SnapshotSpec,
        folder: &Path,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Result<(), String>, SnapshotError> {
        if spec.scan.is_empty() {
            return Ok(Ok(()));
        }
        let mut invocation = self.listing(rsync, spec, folder)?;
        invocation.scan = Some(spec.scan.clone());
        let mut checking = |now: Progress| {
            progress(Progress {
                still_s: now.still_s,
                ..Progress::begin(Phase::Checking)
            });
        };
        let outcome = rsync.run(&invocation, &mut checking, cancel)?;
        match outcome.ended {
            // The run reports what can't be read.
            Ended::Whole | Ended::WithUnread => {}
            Ended::Cancelled => return Err(SnapshotError::Cancelled),
            _ => return Ok(Err(why_failed(&outcome))),
        }
        let tags = &outcome.met.tags;
        let valid = match tags.is_empty() {
            true => BTreeSet::new(),
            false => match self.valid_tags(rsync, spec, tags, &mut checking, cancel)? {
                Ok(valid) => valid,
                Err(why) => return Ok(Err(why)),
            },
        };
        self.found = Found::of(outcome.met, &|tag| valid.contains(tag));
        Ok(Ok(()))
    }

    /// Those of `tags` that have the signature of a cache tag. They are pulled to see it.
    fn valid_tags(
        &self,
        rsync: &Rsync,
        spec: &SnapshotSpec,
        tags: &BTreeSet<PathBuf>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Result<BTreeSet<PathBuf>, String>, SnapshotError> {
        let system = |op| move |source| SnapshotError::System { op, source };
        let folder = tempfile::tempdir().map_err(system("make a folder"))?;
        let options = [TAG_BYTES_MAX, "--no-implied-dirs", "--outbuf=L"];
        let options = options.map(OsString::from).to_vec();
        let names = tags.iter().map(|tag| tag.strip_prefix("/").unwrap_or(tag));
        let invocation = self.invocation_of(spec, options, names, (folder.path(), "./"));
        let outcome = rsync.run(&invocation, progress, cancel)?;
        match outcome.ended {
            Ended::Whole | Ended::WithUnread => {}
            Ended::Cancelled => return Err(SnapshotError::Cancelled),
            _ => return Ok(Err(why_failed(&outcome))),
        }
        let is_valid = |tag: &&PathBuf| {
            let below = tag.strip_prefix("/").unwrap_or(tag);
            is_cache_tag(&folder.path().join(below))
        };
        Ok(Ok(tags.iter().filter(is_valid).cloned().collect()))
    }

    /// Why nothing of a source would be pulled: its own folder is marked.
    pub(crate) fn is_marked(&self, source: &Path) -> bool {
        self.found.folders.names.contains(&escape_path(source))
    }
}
