//! What a source has and its snapshot lacks. A dry run of rsync compares both trees, by names and kinds.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::known::Key;
use super::walk::Run;
use crate::file_system::FileSystem;
use crate::job::JobFolder;
use crate::long_path::lstat;
use crate::mounts::pattern_with_ending;
use crate::name::{JobName, SnapshotName};
use crate::progress::Progress;
use crate::recent;
use crate::record::{ONE_FILE_SYSTEM, RunRecord};
use crate::rsync::{
    Difference, Ended, ITEM_FORMAT, Invocation, Outcome, Rsync, Side, parse_difference,
};
use crate::source_scan;
use crate::sources::Sources;
use crate::spec::SnapshotSpec;
use crate::text::{escape_path, unescape_path};

impl Run<'_> {
    /// Reports what the compared snapshot lacks.
    pub(super) fn report_lacking(&mut self, job: &JobName) {
        if let Some(snapshot) = self.snapshot {
            self.report.lacking_unknown = self.compare_names(job, snapshot).err();
        }
    }

    fn compare_names(&mut self, job: &JobName, snapshot: SnapshotName) -> Result<(), String> {
        let folder =
            JobFolder::open(self.root, Path::new(job.as_str())).map_err(|e| e.to_string())?;
        let record = folder.record(snapshot)?;
        if asked_for(&record).is_empty() {
            // All of it comes from commands.
            return Ok(());
        }
        let spec = SnapshotSpec {
            excludes: record.excludes.clone(),
            exclude_from: record
                .exclude_from
                .iter()
                .map(|one| unescape_path(one))
                .collect(),
            one_file_system: record
                .rsync_arguments
                .iter()
                .any(|one| one == ONE_FILE_SYSTEM),
            scan: record.scan.clone(),
            never_enter: self.spec.never_enter.clone(),
            containers: self.spec.containers.clone(),
            allow_empty: true,
            ..SnapshotSpec::new(job.clone(), asked_for(&record))
        };
        let mut sources = Sources::check(&spec, self.root).map_err(|e| e.to_string())?;
        let new_disks = new_disks(&record, &sources.file_systems);
        for (place, _) in &new_disks {
            // The entries at its top show whether the job's patterns include it.
            let ending = if *place == Path::new("/") {
                "*/*"
            } else {
                "/*/*"
            };
            sources
                .left_out
                .insert(0, pattern_with_ending(place, ending));
        }
        let at = &folder.path;
        let rsync = Rsync::find(&spec.rsync).map_err(|e| e.to_string())?;
        let so_far = self.so_far();
        let mut report = |now: Progress| {
            (self.progress)(Progress {
                still_s: now.still_s,
                ..so_far
            });
        };
        source_scan::apply(&rsync, &mut sources, &spec, at, &mut report, self.cancel)
            .map_err(|e| e.to_string())?;
        let mut arguments = vec!["-nrlD".into(), "--relative".into()];
        // A folder may stand where the source has a file.
        arguments.extend(["--force", ITEM_FORMAT, "--outbuf=L"].map(Into::into));
        arguments.extend(sources.arguments(&spec));
        arguments.push(format!("./{snapshot}/").into());
        let mut invocation = Invocation::new(arguments, at, at, Side::IntoVolume);
        invocation.lists_changes = true;
        invocation.input = sources.input();
        let outcome = rsync.run(&invocation, &mut report, self.cancel);
        let outcome = outcome.map_err(|e| e.to_string())?;
        match &outcome.ended {
            Ended::Whole | Ended::WithUnread | Ended::Cancelled => {}
            Ended::Failed { ended, message } => return Err(format!("rsync: {ended}: {message}")),
            other => return Err(format!("rsync: {other:?}")),
        }
        self.add_differences(&outcome, &format!("{job}/{snapshot}"), &record, &new_disks);
        Ok(())
    }

    fn add_differences(
        &mut self,
        outcome: &Outcome,
        snapshot: &str,
        record: &RunRecord,
        new_disks: &[(PathBuf, FileSystem)],
    ) {
        let from_s = recent::from_s(record.started);
        let (report, root, bad) = (&mut self.report, self.root, &self.bad);
        let is_damaged = |path: &Path| {
            let below = path.strip_prefix("/").unwrap_or(path);
            let about = lstat(&root.join(snapshot).join(below));
            about.is_ok_and(|about| bad.contains_key(&Key::of(&about)))
        };
        let mut new_folders = HashSet::new();
        let mut disks_met = vec![false; new_disks.len()];
        for line in &outcome.changes.names {
            let path = |name| Path::new("/").join(unescape_path(name));
            match parse_difference(line) {
                Some(Difference::Other(name)) => {
                    let path = path(name);
                    if !is_damaged(&path) {
                        let name = format!("{snapshot}{}", escape_path(&path));
                        report.changed.push(name);
                    }
                }
                Some(Difference::Missing(name)) => {
                    let path = path(name);
                    // The innermost one: a disk may be mounted inside another one.
                    let on = new_disks.iter().enumerate();
                    let on = on.filter(|(_, (place, _))| path.starts_with(place));
                    if let Some((disk, _)) =
                        on.max_by_key(|(_, (place, _))| place.as_os_str().len())
                    {
                        disks_met[disk] = true;
                        continue;
                    }
                    match is_new(&path, from_s, &mut new_folders) {
                        Some(true) => report.new_since.push(escape_path(&path)),
                        Some(false) => report.lacking.push(escape_path(&path)),
                        None => {}
                    }
                }
                None => {}
            }
        }
        let new_disks = new_disks.iter().zip(disks_met);
        for ((_, new), _) in new_disks.filter(|(_, met)| *met) {
            let text = format!("{}: {} was not there", new.place, new.text());
            report.new_since.push(text);
        }
        // There are more than can be examined.
        report.lacking.count += outcome.changes.count - outcome.changes.names.len() as u64;
        for name in &outcome.unread.names {
            let text = format!("{name}: can't be listed");
            report.source_unreadable.push(text);
        }
    }
}

/// The sources that the run was to back up.
fn asked_for(record: &RunRecord) -> Vec<PathBuf> {
    let sources = record.sources.iter().chain(record.left_out_here());
    sources.map(|source| unescape_path(source)).collect()
}

/// File systems at places where the run found another one or none, or that the job excludes.
fn new_disks(record: &RunRecord, now: &[FileSystem]) -> Vec<(PathBuf, FileSystem)> {
    let is_new = |now: &&FileSystem| {
        let met = record.file_systems.iter();
        let mut met = met.filter(|met| met.place == now.place);
        !met.any(|met| met.is_continued_by(now))
    };
    // Records of older versions have none.
    let known = !record.file_systems.is_empty();
    let new = now.iter().filter(|_| known).filter(is_new);
    new.map(|new| (unescape_path(&new.place), new.clone()))
        .collect()
}

/// Whether an object that the snapshot lacks may be younger than its run. Nobody can set a change time
/// (ctime). Creating an object, or moving it to another folder, changes the ctime of the object and of
/// the folder. `None` if it is gone.
fn is_new(path: &Path, from_s: i64, new_folders: &mut HashSet<PathBuf>) -> Option<bool> {
    let about = lstat(path).ok()?;
    let parent = path.parent()?;
    let is_younger = |ctime: i64| ctime >= from_s;
    let is_new = new_folders.contains(parent)
        || (is_younger(about.ctime()) && lstat(parent).is_ok_and(|it| is_younger(it.ctime())));
    if is_new && about.is_dir() {
        new_folders.insert(path.to_owned());
    }
    Some(is_new)
}
