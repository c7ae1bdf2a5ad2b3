//! The runs of rsync of one restore.

use std::ffi::OsString;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::What;
use crate::cancel::Cancel;
use crate::compare::Unequal;
use crate::error::SnapshotError;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::rsync::{Ended, Invocation, Outcome, Rsync, Side, is_damage};
use crate::sources::argument;
use crate::spec::{Existing, Planned, RestoreSpec};
use crate::text::escape_path;

/// More paths than these are passed to rsync in a list, not as arguments.
const ARGUMENTS_MAX: usize = 100;

/// The runs of rsync of one restore.
pub(super) struct Transfer<'a> {
    pub(super) rsync: &'a Rsync,
    /// The job's folder.
    pub(super) job: &'a Path,
    pub(super) to: &'a Path,
    pub(super) what: &'a What,
    /// The options that map owners.
    pub(super) owners: Vec<OsString>,
    pub(super) spec: &'a RestoreSpec,
}

/// The options that keep paths at the destination as they are.
pub(super) struct Excludes {
    arguments: Vec<OsString>,
    /// Holds the patterns for rsync, if they are many.
    _file: Option<NamedTempFile>,
}

impl Excludes {
    pub(super) fn new(patterns: &[OsString]) -> Result<Self, SnapshotError> {
        if patterns.len() <= ARGUMENTS_MAX {
            let exclude = |pattern: &OsString| argument("--exclude=", pattern);
            return Ok(Self {
                arguments: patterns.iter().map(exclude).collect(),
                _file: None,
            });
        }
        let write = || {
            let mut file = NamedTempFile::new()?;
            let mut out = BufWriter::new(&mut file);
            for pattern in patterns {
                out.write_all(pattern.as_bytes())?;
                out.write_all(&[0])?;
            }
            out.flush()?;
            drop(out);
            Ok(file)
        };
        let file = write().map_err(|source| SnapshotError::System {
            op: "write the list of the files that stay as they are",
            source,
        })?;
        Ok(Self {
            arguments: vec![
                "--from0".into(),
                argument("--exclude-from=", file.path().as_os_str()),
            ],
            _file: Some(file),
        })
    }
}

impl Transfer<'_> {
    /// Creates the folders `parents` like those of the snapshot, with nothing in them. Returns what
    /// changed.
    pub(super) fn create_parents(
        &self,
        parents: &[PathBuf],
        cancel: &Cancel,
    ) -> Result<NameList, SnapshotError> {
        if parents.is_empty() {
            return Ok(NameList::default());
        }
        let arguments = ["-dlptgoDAXX"].map(OsString::from).to_vec();
        let invocation = self.rsync_with(arguments, parents);
        let outcome = self.rsync.run(&invocation, &mut |_| {}, cancel)?;
        judge(&outcome, self.to)?;
        Ok(outcome.changes)
    }

    /// Writes the files that differ although size and time are equal, and removes other objects that
    /// must be written again.
    pub(super) fn rewrite(
        &self,
        unequal: &Unequal,
        excludes: &Excludes,
        changes: &mut NameList,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Option<Outcome>, SnapshotError> {
        let mut written = None;
        if !unequal.files.is_empty() {
            let arguments = ["-aHAXXS", "--ignore-times", "--from0", "--files-from=-"];
            let mut arguments = arguments.map(OsString::from).to_vec();
            if self.spec.delete {
                // A folder may be in the way of a name. Patterns protect what is in it.
                arguments.push("--force".into());
                arguments.extend(excludes.arguments.iter().cloned());
            }
            // The names are relative to the folder itself.
            let mut invocation = self.rsync_with(arguments, &[PathBuf::new()]);
            invocation.names_from(unequal.files.iter().map(PathBuf::as_path));
            let outcome = self.rsync.run(&invocation, progress, cancel)?;
            // A file that can't be written must not prevent the others from being restored.
            if !matches!(outcome.ended, Ended::Failed { .. }) {
                judge(&outcome, self.to)?;
            }
            changes.append(&outcome.changes);
            written = Some(outcome);
        }
        for path in &unequal.others {
            if self.spec.dry_run {
                changes.push(format!("c.+++++++++ {}", escape_path(path)));
            } else {
                // It is written again later. rsync reports what can't be removed.
                let _ = std::fs::remove_file(self.to.join(path));
            }
        }
        Ok(written)
    }

    /// The main run.
    pub(super) fn invocation(&self, excludes: &Excludes, existing: Existing) -> Invocation {
        let mut arguments: Vec<OsString> = ["-aHAXXS", "--modify-window=-1"]
            .map(OsString::from)
            .to_vec();
        match existing {
            Existing::Overwrite => {}
            Existing::Keep => arguments.push("--ignore-existing".into()),
            Existing::KeepNewer => arguments.push("--update".into()),
        }
        if self.spec.delete {
            arguments.push("--delete".into());
        }
        // Without --delete-excluded a pattern protects what exists, and excludes what is in the snapshot.
        arguments.extend(excludes.arguments.iter().cloned());
        self.rsync_with(arguments, &self.what.paths)
    }

    /// Counts what a dry run would do. `written`: by [`Self::rewrite`].
    pub(super) fn planned(
        &self,
        main: &Outcome,
        written: Option<&Outcome>,
        newer_here: Option<u64>,
    ) -> Planned {
        let replaced = |outcome: &Outcome| {
            let stats = &outcome.stats;
            stats.transferred.saturating_sub(stats.created_regular)
        };
        Planned {
            new: main.stats.created,
            replaced: replaced(main) + written.map_or(0, replaced),
            newer_here,
            deleted: main.stats.deleted,
        }
    }

    fn rsync_with(&self, mut arguments: Vec<OsString>, paths: &[PathBuf]) -> Invocation {
        arguments.extend(
            [
                "--numeric-ids",
                "--relative",
                // Without it folders above the paths would get the snapshot's attributes, and a link
                // there would be replaced.
                "--no-implied-dirs",
                "--no-human-readable",
                "--outbuf=L",
            ]
            .map(OsString::from),
        );
        if self.spec.dry_run {
            arguments.extend(
                ["--dry-run", "--info=stats2,flist0", "--out-format=%i %n%L"].map(OsString::from),
            );
        } else {
            arguments.push("--info=progress2,stats2,flist0,name0".into());
        }
        arguments.extend(self.owners.iter().cloned());
        let are_many = paths.len() > ARGUMENTS_MAX;
        if are_many {
            arguments.extend(["--from0", "--files-from=-"].map(OsString::from));
            // With a list of names, `-a` alone does not enter folders.
            let enters = arguments
                .first()
                .is_some_and(|a| a.as_bytes().starts_with(b"-a"));
            arguments.extend(enters.then(|| "-r".into()));
        }
        arguments.push("--".into());
        let folder_itself = [PathBuf::new()];
        for path in if are_many { &folder_itself } else { paths } {
            // With --relative, only the part behind `/./` appears at the destination.
            let mut argument = OsString::from("./");
            argument.push(&self.what.base);
            argument.push("/./");
            argument.push(path);
            arguments.push(argument);
        }
        let mut destination = self.to.as_os_str().to_owned();
        if !destination.as_bytes().ends_with(b"/") {
            destination.push("/");
        }
        arguments.push(destination);
        let written_to = self.to.ancestors().find(|path| path.exists());
        let mut invocation = Invocation::new(
            arguments,
            self.job,
            written_to.unwrap_or(Path::new("/")),
            Side::OutOfVolume,
        );
        if are_many {
            invocation.names_from(paths.iter().map(PathBuf::as_path));
        }
        invocation
    }
}

pub(crate) fn judge(outcome: &Outcome, to: &Path) -> Result<(), SnapshotError> {
    match &outcome.ended {
        Ended::Whole | Ended::WithUnread => Ok(()),
        Ended::Cancelled => Err(SnapshotError::RestoreCancelled),
        Ended::Full(full) => Err(SnapshotError::DestinationFull {
            path: escape_path(to),
            kind: full.kind,
            free_bytes: full.free_bytes,
            free_inodes: full.free_inodes,
        }),
        Ended::Conflict(folder) => Err(SnapshotError::DestinationConflicts {
            path: escape_path(to),
            folders: vec![folder.clone()],
        }),
        // A restore makes no further attempt: such a file is a failure.
        Ended::Because(_) => Err(SnapshotError::RestoreFailed {
            ended: "stopped".to_owned(),
            first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
            damaged: false,
            messages: outcome.messages.clone(),
        }),
        Ended::Failed { ended, message } => Err(SnapshotError::RestoreFailed {
            ended: ended.clone(),
            first_message: message.clone(),
            damaged: outcome.messages.names.iter().any(|one| is_damage(one)),
            messages: outcome.messages.clone(),
        }),
    }
}
