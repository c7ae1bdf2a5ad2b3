//! Files whose attributes the volume can't store, because they are too large or refused, or whose times it can't store.
//!
//! rsync compares such a file with the one in the previous snapshot, finds a difference that it can't
//! fix, and stores the content again in each run. If the source is unchanged since that snapshot, the
//! file is linked from there instead, and reported as before.

use std::fs::Metadata;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, linkat, utimensat};

use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::file_times;
use crate::job::{Folder, JobFolder};
use crate::long_path::lstat;
use crate::progress::Progress;
use crate::recent;
use crate::record::{RunRecord, Warning};
use crate::rsync::{Ended, Invocation, Outcome};
use crate::sources::Sources;
use crate::spec::SnapshotSpec;
use crate::text::{escape_path, unescape_path};
use crate::unresponsive;

/// A file with more names gets no further one. The limit of ext4 is 65,000.
const LINKS_MAX: u64 = 60_000;

/// Files that rsync need not copy again.
#[derive(Debug, Default)]
pub(crate) struct Unfit {
    /// The snapshot that has them, relative to the job's folder.
    from: PathBuf,
    /// Relative to the root.
    paths: Vec<PathBuf>,
    /// Whether their attributes are too large. Otherwise they were refused.
    too_large: bool,
    /// rsync's messages about them.
    messages: Vec<String>,
}

impl Unfit {
    /// Finds them in the record of the newest snapshot that is linked from.
    pub(crate) fn find(
        job: &JobFolder,
        newest: Option<Folder>,
        sources: &Sources,
        spec: &SnapshotSpec,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Self, SnapshotError> {
        let Some(Folder::Named(name)) = newest else {
            return Ok(Self::default());
        };
        let Ok(record) = job.record(name) else {
            return Ok(Self::default());
        };
        let has = |wanted: fn(&Warning) -> bool| record.warnings.iter().any(wanted);
        let too_large = has(|warning| matches!(warning, Warning::AttributesTooLarge { .. }));
        let refused = has(|warning| matches!(warning, Warning::AttributesRefused { .. }));
        // Other patterns might exclude them.
        if !(too_large || refused) || spec.checksum || !is_same_job(&record, sources, spec) {
            return Ok(Self::default());
        }
        let from = PathBuf::from(Folder::Named(name).to_string());
        let unchanged = |path: &Path, source: &Metadata| {
            let kept = lstat(&job.path.join(&from).join(path));
            kept.is_ok_and(|kept| is_same(source, &kept))
                && source.ctime() < recent::from_s(record.started)
        };
        let names = record.unread.names.iter().map(|name| unescape_path(name));
        let below = names.map(|path| path.strip_prefix("/").map(Path::to_owned).unwrap_or(path));
        let below: Vec<PathBuf> = below.collect();
        let found = unresponsive::ask(progress, cancel, move || {
            let found = below.into_iter().filter_map(|path| {
                let about = lstat(&Path::new("/").join(&path)).ok()?;
                Some((path, about))
            });
            found.collect::<Vec<_>>()
        })?;
        let found = found.into_iter();
        let found = found.filter(|(path, source)| unchanged(path, source));
        let paths: Vec<PathBuf> = found.map(|(path, _)| path).collect();
        let of_them = |message: &&String| {
            let mut names = paths.iter().map(|path| escape_path(path));
            names.any(|name| message.contains(&name))
        };
        let messages = record.messages.names.iter().filter(of_them);
        Ok(Self {
            messages: messages.cloned().collect(),
            from,
            paths,
            too_large,
        })
    }

    /// Excludes them from rsync's run.
    pub(crate) fn leave_out_of(&self, invocation: &mut Invocation) {
        for path in &self.paths {
            invocation.leave_out(&Path::new("/").join(path));
        }
    }

    /// Links them into the new tree, and reports them.
    pub(crate) fn link(&self, job: &JobFolder, tree: &Path, outcome: &mut Outcome) {
        if !matches!(outcome.ended, Ended::Whole | Ended::WithUnread) {
            return;
        }
        for message in &self.messages {
            outcome.messages.push(message.clone());
        }
        for path in &self.paths {
            let parent = path.parent().unwrap_or(Path::new(""));
            // If the folder is gone, so are its files.
            let Ok(folder) = crate::walk::open_folder_at(&tree.join(parent)) else {
                continue;
            };
            let before = rustix::fs::fstat(&folder);
            let name = path.file_name().unwrap_or_default();
            let kept = job.path.join(&self.from).join(path);
            let linked = linkat(CWD, &kept, &folder, name, AtFlags::empty());
            if let Ok(before) = before {
                let times = Timestamps {
                    last_access: Timespec {
                        tv_sec: 0,
                        tv_nsec: UTIME_OMIT,
                    },
                    last_modification: Timespec {
                        tv_sec: before.st_mtime,
                        tv_nsec: before.st_mtime_nsec.try_into().unwrap_or(0),
                    },
                };
                let _ = utimensat(folder.as_fd(), ".", &times, AtFlags::empty());
            }
            let named = escape_path(&tree.join(path));
            match linked {
                // It is a source itself: no pattern excludes it from rsync's run.
                Err(rustix::io::Errno::EXIST) => continue,
                Ok(()) if self.too_large => outcome.attributes_lost.push(named),
                Ok(()) => outcome.attributes_refused.push(named),
                Err(error) => {
                    let source = escape_path(&Path::new("/").join(path));
                    let why =
                        format!("{source}: can't be linked from the previous snapshot: {error}");
                    outcome.messages.push(why);
                    outcome.unread.push(source);
                }
            }
            outcome.stats.files += 1;
            outcome.stats.regular_files += 1;
            if outcome.ended == Ended::Whole {
                outcome.ended = Ended::WithUnread;
            }
        }
    }
}

/// Reports the copied files in `tree` whose times could not be stored.
pub(crate) fn report_times(tree: &Path, outcome: &mut Outcome) {
    let mut found = Vec::new();
    for name in &outcome.copied.odd_times.names {
        let path = unescape_path(name);
        let Some(kept) = lstat(&tree.join(&path)).ok().filter(file_times::is_limit) else {
            continue;
        };
        let source = Path::new("/").join(&path);
        let Ok(about) = lstat(&source) else { continue };
        if (about.mtime(), about.mtime_nsec()) != (kept.mtime(), kept.mtime_nsec()) {
            found.push((escape_path(&source), escape_path(&tree.join(&path))));
        }
    }
    for (source, kept) in found {
        let why = format!("{source}, time: the file system of the volume has no such time");
        outcome.messages.push(why);
        outcome.attributes_refused.push(kept);
        if outcome.ended == Ended::Whole {
            outcome.ended = Ended::WithUnread;
        }
    }
}

fn is_same_job(record: &RunRecord, sources: &Sources, spec: &SnapshotSpec) -> bool {
    let now = sources.list.iter().map(|source| escape_path(&source.path));
    record.excludes == spec.excludes
        && record.scan == spec.scan
        && record.exclude_from.is_empty()
        && spec.exclude_from.is_empty()
        && record.sources.iter().cloned().eq(now)
        && !spec.one_file_system
}

/// Whether everything but the lost attributes is equal. A file with hard links is left to rsync.
fn is_same(source: &Metadata, kept: &Metadata) -> bool {
    let facts = |about: &Metadata| (about.len(), about.mode(), about.uid(), about.gid());
    source.is_file()
        && source.nlink() == 1
        && kept.nlink() < LINKS_MAX
        && facts(source) == facts(kept)
        && file_times::is_same(source, kept)
}
