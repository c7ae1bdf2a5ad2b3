//! Finds in the sources what rsync's patterns can't express, and excludes it: tagged caches, folders with a
//! marker file, and large files. Counts on the same walk what is new.
//!
//! A dry run of rsync walks the sources. So the scan sees exactly what the run will see: it enters no folder
//! that the job's patterns exclude, and a source that does not answer stops it as it stops the run.

use std::ffi::OsString;
use std::path::Path;

use crate::cancel::Cancel;
use crate::census::{FileList, Walk};
use crate::error::SnapshotError;
use crate::found::{Found, is_cache_tag};
use crate::progress::{Phase, Progress};
use crate::rsync::{Ended, ITEM_FORMAT, Invocation, Rsync, Side};
use crate::sources::Sources;
use crate::spec::SnapshotSpec;
use crate::text::escape_path;

/// The destination of the dry run. Nothing has this name, so every file counts as new.
pub(crate) const NOWHERE: &str = "./.sprat/none/";

const MARKED: &str = "is marked itself, by CACHEDIR.TAG or by a name in `exclude_if_present`, so nothing \
                      of it would be saved. Remove that file or the rule";

/// Scans the sources, and makes `sources` exclude what the rules of `spec` find. `folder` is the job's
/// folder on the volume; nothing is written to it.
///
/// # Errors
/// rsync can't be run or fails, the scan is cancelled, or a source's own folder is marked, so that the
/// snapshot would have nothing of it.
pub(crate) fn apply(
    rsync: &Rsync,
    sources: &mut Sources,
    spec: &SnapshotSpec,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<(), SnapshotError> {
    scan_hosts(rsync, sources, spec, folder, progress, cancel)?;
    if sources.list.is_empty() || (spec.scan.is_empty() && spec.census.is_none()) {
        return Ok(());
    }
    let mut arguments: Vec<OsString> = ["-nrlD", "--relative", ITEM_FORMAT, "--outbuf=L"]
        .map(OsString::from)
        .to_vec();
    arguments.extend(sources.arguments(spec));
    arguments.push(NOWHERE.into());
    let mut invocation = Invocation::new(arguments, folder, folder, Side::IntoVolume);
    invocation.scan = Some(spec.scan.clone());
    invocation.census = spec
        .census
        .as_ref()
        .map(|census| Walk::new(FileList::read(&census.list), spec.scan.larger_than));
    let mut checking = |now: Progress| {
        progress(Progress {
            still_s: now.still_s,
            ..Progress::begin(Phase::Checking)
        });
    };
    let mut outcome = rsync.run(&invocation, &mut checking, cancel)?;
    sources.walk = outcome.met.walk.take();
    sources.walked_partly = !outcome.unread.is_empty();
    match outcome.ended {
        // The run reports what can't be read.
        Ended::Whole | Ended::WithUnread => {}
        Ended::Cancelled => return Err(SnapshotError::Cancelled),
        // It excludes nothing, and the run itself reports what is wrong.
        other if spec.scan.is_empty() => {
            tracing::warn!(ended = ?other, "what is new can't be counted");
            sources.walk = None;
            return Ok(());
        }
        Ended::Failed { ended, message } => {
            sources.check_again()?;
            return Err(SnapshotError::RsyncFailed {
                ended,
                first_message: message,
                messages: outcome.messages,
            });
        }
        other => {
            return Err(SnapshotError::RsyncFailed {
                ended: format!("{other:?}"),
                first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
                messages: outcome.messages,
            });
        }
    }
    let found = Found::of(outcome.met, &is_cache_tag);
    for source in sources.list.iter().filter(|source| source.folder) {
        let path = escape_path(&source.path);
        if found.folders.names.contains(&path) {
            return Err(SnapshotError::SourceRefused {
                path,
                why: MARKED.to_owned(),
            });
        }
    }
    sources.found = found;
    Ok(())
}

/// Scans the sources on other hosts. A host that can't be scanned, and a source whose own folder is
/// marked, are skipped.
fn scan_hosts(
    rsync: &Rsync,
    sources: &mut Sources,
    spec: &SnapshotSpec,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<(), SnapshotError> {
    if sources.pulled.hosts.is_empty() {
        return Ok(());
    }
    for mut host in std::mem::take(&mut sources.pulled.hosts) {
        let scanned = host.scan(rsync, spec, folder, progress, cancel)?;
        let mut pulled = Vec::new();
        for source in std::mem::take(&mut host.sources) {
            match &scanned {
                Err(why) => sources.skip_pulled(&source, why),
                Ok(()) if host.is_marked(&source.path) => sources.skip_pulled(&source, MARKED),
                Ok(()) => pulled.push(source),
            }
        }
        host.sources = pulled;
        if !host.sources.is_empty() {
            sources.pulled.hosts.push(host);
        }
    }
    let skipped = sources.missing.last();
    if let Some(path) =
        skipped.filter(|_| sources.list.is_empty() && sources.pulled.hosts.is_empty())
    {
        return Err(SnapshotError::HostsMissing {
            path: path.clone(),
            why: "can't be scanned, or is marked itself; nothing of the job would be saved"
                .to_owned(),
            reached: true,
        });
    }
    Ok(())
}
