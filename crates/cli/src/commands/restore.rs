//! `sprat restore`: restores a snapshot, or a part of it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use sprat_run::{restore_text, snapshots_text};
use sprat_session::{text, trusted_file};
use sprat_snapshot::{EntryKind, Existing, RestoreReport, RestoreSpec};

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::ReadTarget;
use crate::output::{Reporter, path_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat restore home www --to /restore
  sprat restore home www/2026-11-23:/etc/fstab --to /tmp
  sprat restore home www --at yesterday --to /restore
  sprat restore home www --to / --dry-run --delete";

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// What to restore. SNAPSHOT is a name, the beginning of a name (the newest match), or
    /// `latest-complete`; the default is the latest snapshot. PATH is a path in the source; the default
    /// is all files
    #[arg(value_name = "JOB[/SNAPSHOT][:PATH]")]
    what: OsString,
    /// Restore into DIR: PATH /a/b becomes DIR/b; without PATH each file keeps its full path below DIR
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Restore the newest snapshot that began at TIME or before: 2026-11-28 14:00, 14:00, yesterday, 3d
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// Restore only what matches, with its full path below DIR: a name, or a path if P has a slash. May be
    /// given several times. Put it in quotes: *.odt, '/home/ann/**/thesis*'
    #[arg(long, value_name = "P", conflicts_with = "delete")]
    pattern: Vec<String>,
    /// What to do with files in DIR that differ: overwrite them, keep them, or keep those that are newer
    #[arg(long, value_name = "HOW", default_value = "overwrite", value_parser = existing)]
    existing: Existing,
    /// Give files to the users and groups with the same names on this machine, not with the same numbers.
    /// The snapshot must have /etc
    #[arg(long)]
    owner_by_name: bool,
    /// Show only what would be done
    #[arg(long)]
    dry_run: bool,
    /// Also delete from DIR what the snapshot does not have
    #[arg(long)]
    delete: bool,
    /// With --delete: also delete files that the job excludes, and files of a disk that was not mounted
    /// during the backup
    #[arg(long, requires = "delete")]
    delete_excluded: bool,
    /// Skip files of equal size and time without reading them, to continue after an interruption
    #[arg(long)]
    trust_times: bool,
    /// After the restore, read the restored files and the snapshot again, and compare every byte
    #[arg(long, conflicts_with = "dry_run")]
    verify: bool,
}

fn existing(text: &str) -> Result<Existing, String> {
    match text {
        "overwrite" => Ok(Existing::Overwrite),
        "keep" => Ok(Existing::Keep),
        "keep-newer" => Ok(Existing::KeepNewer),
        _ => Err("it must be overwrite, keep or keep-newer".to_owned()),
    }
}

impl CommandArgs for RestoreArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let wanted = context.wanted(&self.what, self.at.as_deref())?;
        let mut prepared = context.prepare_reading(&self.target)?;
        let target = prepared.resolved.target.clone();
        let mut spec = RestoreSpec::new(wanted.job, context.environment.absolute(&self.to));
        spec.snapshot = wanted.snapshot.unwrap_or_default();
        spec.path = wanted.path;
        // A login takes as long as opening the container.
        prepared.options.expects_much =
            spec.path.is_none() && self.pattern.is_empty() && !self.dry_run;
        spec.dry_run = self.dry_run;
        spec.delete = self.delete;
        spec.delete_excluded = self.delete_excluded;
        spec.trust_times = self.trust_times;
        spec.verify = self.verify;
        spec.existing = self.existing;
        spec.owner_by_name = self.owner_by_name;
        if spec.verify && spec.existing != Existing::Overwrite {
            let what =
                "--verify needs --existing overwrite: files that are kept differ from the snapshot";
            return Err(Failure::usage(what).with_hint("nothing was started"));
        }
        for pattern in &self.pattern {
            lookup::check_pattern(pattern, false)?;
        }

        if !spec.dry_run
            && let Some(why) = trusted_file::folder_writable_by_others(&spec.to)
        {
            context.output.warning(&format!(
                "other users can change where the files go during the restore to {}: {why}. Restore to \
                 a folder that only root can write to, then move the files",
                spec.to.display()
            ));
        }
        let mut reporter = Reporter::new(context.output, "");
        let mut took = Duration::ZERO;
        let (report, closed) =
            context.in_session(prepared, &mut reporter, |session, reporter| {
                let began = Instant::now();
                let restored = session.restore_matching(
                    spec.clone(),
                    self.pattern.clone(),
                    reporter,
                    &context.interrupt,
                );
                took = began.elapsed();
                restored
            })?;
        warn_of_state(context, &report);
        if !report.left_out.is_empty() {
            context.output.warning(&format!(
                "not restored, because they have no place of their own on this machine: {}. Restore them \
                 to another folder",
                text::harmless(&report.left_out.join(", "))
            ));
        }
        if !report.kept_in_place.is_empty() {
            context.output.warning(&format!(
                "these folders were not restored, because something else is in their place, and stays: {}",
                text::harmless(&report.kept_in_place.join(", "))
            ));
        }
        let fields = json!({
            "to": path_json(&spec.to),
            "dry_run": spec.dry_run,
            "seconds": took.as_secs_f64(),
            "report": report,
            "volume": closed.volume,
        });
        let text = restore_text::summary(&spec, &report, Some(took));
        // A dry run has restored nothing.
        let is_right = report.damaged.is_empty() && report.damaged_kept.is_empty();
        let exit = match is_right || spec.dry_run {
            true => context.exit(Exit::Done),
            false => Exit::Damaged,
        };
        context.finish("restore", exit, &target, &text, fields)
    }
}

fn warn_of_state(context: &Context, report: &RestoreReport) {
    let snapshot = &report.snapshot;
    match report.kind {
        EntryKind::Complete => {}
        EntryKind::Incomplete => {
            let lost = report.without_attributes;
            let lacking = snapshots_text::lacking(report.unread_count, lost);
            let mut words = match lost {
                0 => format!("{snapshot} lacks {lacking} that could not be read during the backup"),
                _ => format!("{snapshot} lacks {lacking} that could not be stored during the backup"),
            };
            if let Some(good) = &report.last_good {
                words.push_str(&format!("; the newest complete snapshot is {good}"));
            }
            context.output.warning(&words);
        }
        EntryKind::Partial | EntryKind::Inflight => context.output.warning(&format!(
            "{snapshot} is of an interrupted run: files can be missing or cut short"
        )),
        EntryKind::Adopted => context.output.note(&format!(
            "{snapshot} is a copy that sprat did not make: it is restored as it is, and sprat has no \
             record of it"
        )),
        _ => context.output.warning(&format!(
            "{snapshot} has no record: sprat does not know whether it is complete"
        )),
    }
}
