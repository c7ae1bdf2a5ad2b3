//! `sprat restore`: restores a snapshot, or a part of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use sprat_session::{Access, text, trusted_file};
use sprat_snapshot::{EntryKind, RestoreReport, RestoreSpec, SnapshotPath};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::{Reporter, path_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat restore home www --to /restore
  sprat restore home www/2026-11-23:/etc/fstab --to /tmp
  sprat restore home www --at yesterday --to /restore
  sprat restore home www --to / --dry-run --delete";

/// Changes that a dry run lists as text; JSON has more.
const CHANGES_SHOWN_MAX: usize = 200;

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
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

impl CommandArgs for RestoreArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let wanted = SnapshotPath::parse(&self.what).map_err(|what| {
            Failure::usage(what).with_hint(
                "nothing was started. Write JOB, JOB/SNAPSHOT, JOB:PATH or JOB/SNAPSHOT:PATH",
            )
        })?;
        let snapshot = match (wanted.snapshot, &self.at) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage(
                    "--at and the name of a snapshot can't be used together",
                )
                .with_hint("nothing was started. Name the job alone, or omit --at"));
            }
            (named, None) => named.unwrap_or_default(),
            (None, Some(time)) => context.snapshot_at(time)?,
        };
        let prepared = context.prepare(&self.target, Access::ReadOnly)?;
        let target = prepared.resolved.target.clone();
        let mut spec = RestoreSpec::new(wanted.job, context.environment.absolute(&self.to));
        spec.snapshot = snapshot;
        spec.path = wanted.path;
        spec.dry_run = self.dry_run;
        spec.delete = self.delete;
        spec.delete_excluded = self.delete_excluded;
        spec.trust_times = self.trust_times;
        spec.verify = self.verify;

        if !spec.dry_run
            && let Some(why) = others_at(&spec.to)
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
                let restored = session.restore(spec.clone(), reporter, &context.interrupt);
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
        let fields = json!({
            "to": path_json(&spec.to),
            "dry_run": spec.dry_run,
            "seconds": took.as_secs_f64(),
            "report": report,
            "volume": closed.volume,
        });
        let text = summary(&spec, &report, took);
        let exit = context.exit(Exit::Done);
        context.finish("restore", exit, &target, &text, fields)
    }
}

/// Why others can write to the folder, or to the nearest existing one above it.
fn others_at(to: &Path) -> Option<String> {
    let there = to.ancestors().find(|folder| folder.is_dir())?;
    trusted_file::writable_by_others(there).ok().flatten()
}

fn warn_of_state(context: &Context, report: &RestoreReport) {
    let snapshot = &report.snapshot;
    match report.kind {
        EntryKind::Complete => {}
        EntryKind::Incomplete => {
            let mut words = format!(
                "{snapshot} lacks {} that could not be read during the backup",
                text::counted(report.unread_count, "file", "files")
            );
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

fn summary(spec: &RestoreSpec, report: &RestoreReport, took: Duration) -> String {
    let stats = &report.stats;
    let mut summary = String::new();
    if spec.dry_run {
        for change in report.changes.names.iter().take(CHANGES_SHOWN_MAX) {
            summary.push_str(&format!("{}\n", text::harmless(change)));
        }
        let shown = report.changes.names.len().min(CHANGES_SHOWN_MAX);
        let more = report.changes.count.saturating_sub(shown as u64);
        if more > 0 {
            summary.push_str(&format!("… and {} more\n", text::count(more)));
        }
    }
    let would = if spec.dry_run {
        "would restore"
    } else {
        "restored"
    };
    summary.push_str(&format!(
        "{would} {}/{} to {}: {}, {}; {} ({}) copied",
        spec.job,
        text::harmless(&report.snapshot),
        text::harmless(&spec.to.to_string_lossy()),
        text::counted(stats.files_of_people().unwrap_or(0), "file", "files"),
        text::bytes(stats.bytes_total),
        text::counted(stats.transferred, "file", "files"),
        text::bytes(stats.bytes_transferred),
    ));
    if report.same > 0 {
        summary.push_str(&format!(
            ", {} compared and the same",
            text::count(report.same)
        ));
    }
    let left = stats.regular_files.saturating_sub(stats.transferred);
    if spec.trust_times && left > 0 {
        summary.push_str(&format!(
            ", {} skipped: their size and time are equal, their content was not compared",
            text::count(left)
        ));
    }
    if stats.deleted > 0 {
        summary.push_str(&format!(", {} deleted", text::count(stats.deleted)));
    }
    summary.push_str(&format!(" in {}\n", text::duration(took)));
    if let Some(verified) = report.verified {
        summary.push_str(&format!(
            "verified: {} read again and equal to the snapshot\n",
            text::counted(verified, "file", "files")
        ));
    }
    if report.unequal.count > 0 {
        summary.push_str(&format!(
            "{} {} written although size and time were equal: the content differed, or the file was a hard \
             link to another one:\n",
            text::counted(report.unequal.count, "file", "files"),
            match (spec.dry_run, report.unequal.count) {
                (true, _) => "would be",
                (false, 1) => "was",
                (false, _) => "were",
            }
        ));
        for path in report.unequal.names.iter().take(CHANGES_SHOWN_MAX) {
            summary.push_str(&format!("  {}\n", text::harmless(path)));
        }
    }
    for message in report.messages.names.iter().take(CHANGES_SHOWN_MAX) {
        summary.push_str(&format!("  {}\n", text::harmless(message)));
    }
    summary
}
