//! What a run would copy, and what it would exclude by which rule. Reads the sources and nothing else.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

use crate::cancel::Cancel;
use crate::census::Census;
use crate::error::SnapshotError;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::pulled;
use crate::record::Warning;
use crate::rsync::{Ended, Excluded, ITEM_FORMAT, Invocation, Listed, Lists, Outcome, Rsync, Side};
use crate::source_scan;
use crate::sources::Sources;
use crate::spec::SnapshotSpec;
use crate::text::{escape_name, escape_path};

/// The rule of what every job excludes.
const ALWAYS: &str = "always";
/// Makes rsync print what each pattern excludes.
const DEBUG_FILTER: &str = "--debug=FILTER1";

/// What a run would copy if no snapshot had any of it, and what it would exclude.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Preview {
    /// Regular files.
    pub files: u64,
    /// Folders, links and other objects.
    pub others: u64,
    /// Size of the files. A file with several names counts for each.
    pub bytes: u64,
    /// The largest files, largest first: escaped path and size.
    pub largest: Vec<(String, u64)>,
    /// What each rule excludes, the one with the most objects first.
    pub excluded: Vec<Excluded>,
    /// Every path, escaped, if that was asked for.
    pub paths: Option<Vec<String>>,
    /// What could not be read. Sources that are missing are among them.
    pub unread: NameList,
    /// What the user should know.
    pub warnings: Vec<Warning>,
    /// What is new since the last snapshot, if [`SnapshotSpec::census`] asked for it.
    pub census: Option<Census>,
}

/// Patterns as rsync prints them.
fn patterns<'p>(patterns: impl Iterator<Item = &'p OsString>) -> BTreeSet<String> {
    patterns
        .map(|pattern| escape_name(pattern.as_bytes()))
        .collect()
}

fn from_listed(listed: Listed) -> Preview {
    let mut preview = Preview {
        files: listed.files,
        others: listed.others,
        bytes: listed.bytes,
        paths: listed.paths,
        ..Preview::default()
    };
    let largest = listed.largest.into_sorted_vec().into_iter();
    preview.largest = largest
        .map(|Reverse((bytes, path))| (path, bytes))
        .collect();
    preview.excluded = listed.excluded.into_values().collect();
    preview
        .excluded
        .sort_by_key(|excluded| Reverse(excluded.objects));
    preview
}

/// A dry run that lists.
fn list(
    rsync: &Rsync,
    invocation: &Invocation,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<Outcome, SnapshotError> {
    let outcome = rsync.run(invocation, progress, cancel)?;
    match outcome.ended {
        Ended::Whole | Ended::WithUnread => Ok(outcome),
        Ended::Cancelled => Err(SnapshotError::Cancelled),
        other => Err(SnapshotError::RsyncFailed {
            ended: format!("{other:?}"),
            first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
            messages: outcome.messages,
        }),
    }
}

/// Lists what a run of `spec` would copy and exclude. `nowhere` is an empty folder; nothing is written to
/// it. With `all`, every path is listed. Commands are not run.
///
/// # Errors
/// A pattern is invalid, no source is there, rsync failed, or it was cancelled.
pub fn preview(
    nowhere: &Path,
    spec: &SnapshotSpec,
    all: bool,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<Preview, SnapshotError> {
    if spec.sources.is_empty() && spec.pulled.is_empty() {
        return Ok(Preview::default());
    }
    let rsync = Rsync::find(&spec.rsync)?;
    let pulled = pulled::reach(&rsync, spec, nowhere, progress, cancel)?;
    let mut sources = Sources::check_beside(spec, nowhere, pulled)?;
    source_scan::apply(&rsync, &mut sources, spec, nowhere, progress, cancel)?;
    let mut listed = Listed::default();
    let mut unread = NameList::default();
    let scanned = "exclude_caches, exclude_if_present";
    if !sources.list.is_empty() {
        let options = [
            "-nrlD",
            "--relative",
            DEBUG_FILTER,
            ITEM_FORMAT,
            "--outbuf=L",
        ];
        let mut arguments: Vec<OsString> = options.map(OsString::from).to_vec();
        arguments.extend(sources.arguments(spec));
        arguments.push("./none/".into());
        let mut invocation = Invocation::new(arguments, nowhere, nowhere, Side::IntoVolume);
        invocation.input = sources.input();
        invocation.lists = Some(Lists {
            all,
            known: sources.found.paths.clone(),
            within: String::new(),
        });
        let outcome = list(&rsync, &invocation, progress, cancel)?;
        unread.append(&outcome.unread);
        listed.add(outcome.listed);
        listed.exclude_all(scanned, &sources.found.folders);
        listed.exclude_all("exclude_larger_than", &sources.found.large);
    }
    for host in &sources.pulled.hosts {
        let mut invocation = host.listing(&rsync, spec, nowhere)?;
        // The sender prints it, and that is the host.
        invocation
            .arguments
            .insert(0, format!("-M{DEBUG_FILTER}").into());
        invocation.lists = Some(Lists {
            all,
            known: host.found.paths.clone(),
            within: escape_path(&host.in_snapshot(Path::new("/"))),
        });
        let outcome = list(&rsync, &invocation, progress, cancel)?;
        unread.append(&host.names_in_snapshot(&outcome.unread, false));
        listed.add(outcome.listed);
        let folders = host.names_in_snapshot(&host.found.folders, false);
        listed.exclude_all(scanned, &folders);
        let large = host.names_in_snapshot(&host.found.large, false);
        listed.exclude_all("exclude_larger_than", &large);
    }
    let mut always: BTreeSet<String> = patterns(sources.left_out.iter());
    always.extend(pulled::KERNEL.iter().map(|pattern| (*pattern).to_owned()));
    for (rule, excluded) in std::mem::take(&mut listed.excluded) {
        let rule = if always.contains(&rule) {
            ALWAYS.to_owned()
        } else {
            rule
        };
        let excluded = Excluded {
            rule: rule.clone(),
            ..excluded
        };
        listed
            .excluded
            .entry(rule)
            .and_modify(|one| one.add(&excluded))
            .or_insert(excluded);
    }
    let mut preview = from_listed(listed);
    let partly = sources.walked_partly || !sources.missing.is_empty();
    let walk = sources.walk.take();
    preview.census = walk.map(|walk| walk.finish(&sources.found.paths, partly).0);
    preview.unread = unread;
    for missing in &sources.missing {
        preview.unread.push(missing.clone());
    }
    preview.warnings = sources.warnings;
    // `nowhere` is no volume.
    let is_volume = |warning: &Warning| matches!(warning, Warning::OwnVolumeLeftOut { .. });
    preview.warnings.retain(|warning| !is_volume(warning));
    Ok(preview)
}
