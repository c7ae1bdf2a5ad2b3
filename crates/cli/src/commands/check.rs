//! `sprat check`: checks a container's integrity, down to every file if asked to.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::check::{Checked, check};
use sprat_session::interrupt::Interrupt;
use sprat_session::state::checks::{self, KeptCheck, Kind};
use sprat_session::state::paths::{CHECKS, SUSPECTS, StatePaths};
use sprat_session::{Access, ContainerFacts, IdentityPolicy, text};
use sprat_snapshot::{CheckReport, CheckSpec, CheckWhat, JobName, NameList};

use super::context::{CommandArgs, Context, Prepared};
use crate::args::TARGET_HELP;
use crate::output::{Reporter, exit_json, failure_json, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat check home
  sprat check home --read-data --max-duration 2h
  sprat check home --against-source www";

pub(super) const NOTES: &str = "\
sprat check writes nothing to the server. Exit code 13 reports damage, and the output names it.
Without an option it checks only the header and the file system. --max-duration limits only the
reading of files.";

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("files").args(["read_data", "against_source"])))]
pub(super) struct CheckArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Also read every file in the volume, and compare it with the checksum that an earlier check saved
    #[arg(long)]
    read_data: bool,
    /// Also compare the latest snapshot of this job with the present files of its sources
    #[arg(long, value_name = "JOB")]
    against_source: Option<String>,
    /// Start no further file after this time, such as 45m or 2h; the next run of the same command
    /// continues
    #[arg(long, value_name = "TIME", value_parser = max_duration, requires = "files")]
    max_duration: Option<Duration>,
}

/// Ten years: a longer time is a typing error.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

/// `90`, `90s`, `45m`, `2h` or `1d`.
fn max_duration(text: &str) -> Result<Duration, String> {
    let time = match text.ends_with(|c: char| c.is_ascii_digit()) {
        true => text::parse_time(&format!("{text}s"), "smhd")?,
        false => text::parse_time(text, "smhd")?,
    };
    let is_possible = time <= DURATION_MAX;
    is_possible
        .then_some(time)
        .ok_or("that is too long".to_owned())
}

/// Largest number of names that are shown; JSON has more.
const NAMES_SHOWN: usize = 20;

/// A lost connection costs at most this much reading time.
const NOTE_INTERVAL: Duration = Duration::from_secs(120);

impl CommandArgs for CheckArgs {
    const NEEDS_ROOT: bool = true;
    const NOTES_DAMAGE: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let begun = Instant::now();
        let what = match (&self.against_source, self.read_data) {
            (Some(job), _) => Some(CheckWhat::AgainstSource(
                JobName::new(job).map_err(|error| Failure::usage(error.to_string()))?,
            )),
            (None, true) => Some(CheckWhat::Everything),
            (None, false) => None,
        };
        let prepared = context.prepare(&self.target, Access::ReadOnly)?;
        let target = prepared.resolved.target.to_string();
        let wanted = Wanted {
            what,
            file_system: true,
            duration_max: self.max_duration,
            bytes_max: None,
        };
        let mut reporter = Reporter::new(context.output, "");
        let done = wanted.check(context, prepared, &mut reporter, &context.interrupt, begun);
        reporter.clear();
        let (checked, json) = done?;
        let text = render(&target, self, &checked);
        context.output.result(&text, &json)?;
        Ok(exit_of(checked.is_damaged()))
    }
}

/// What is checked.
pub(super) struct Wanted {
    /// The files; `None`: no file is read.
    pub what: Option<CheckWhat>,
    /// e2fsck is run.
    pub file_system: bool,
    /// As [`CheckSpec::duration_max`].
    pub duration_max: Option<Duration>,
    /// As [`CheckSpec::bytes_max`].
    pub bytes_max: Option<u64>,
}

impl Wanted {
    /// Checks a container, and keeps the result on this machine. Returns it as JSON, too.
    pub(super) fn check(
        self,
        context: &Context,
        prepared: Prepared,
        reporter: &mut Reporter,
        interrupt: &Interrupt,
        begun: Instant,
    ) -> Result<(Checked, Value), Failure> {
        let Prepared {
            resolved,
            secret,
            mut options,
        } = prepared;
        // What is checked is what the server has.
        options.verify_cache = true;
        let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
        // Called when files are to be read: `duration_over` counts what was done before.
        let spec = |facts: &ContainerFacts| {
            let paths = StatePaths::new(&state_dir, &facts.uuid, &resolved.target);
            self.what.clone().map(|what| {
                let (known, error) = checks::sums(&paths, &what);
                if let Some(error) = error {
                    context.output.warning(&format!(
                        "this check compares no files with earlier checksums; the next check does. The \
                         earlier checksums can't be copied to {}: {error}",
                        known.display()
                    ));
                }
                CheckSpec {
                    known,
                    what,
                    suspects: paths.file(CHECKS, SUSPECTS),
                    duration_max: self.duration_max,
                    bytes_max: self.bytes_max,
                    duration_over: begun.elapsed(),
                    note_interval: NOTE_INTERVAL,
                    never_enter: Vec::new(),
                    containers: Vec::new(),
                }
            })
        };
        let checked = check(
            options,
            &secret,
            self.file_system,
            spec,
            reporter,
            interrupt,
        );
        let checked = checked.inspect_err(|failure| {
            if let (Exit::Damaged, IdentityPolicy::Known(pins)) = (failure.exit, &policy) {
                let paths = StatePaths::new(&state_dir, &pins.uuid, &resolved.target);
                keep_failure(context, &paths, failure);
            }
        })?;
        // A container that this machine does not know is trusted if its file system is clean.
        if checked
            .file_system
            .as_ref()
            .is_some_and(|found| found.clean)
            || matches!(policy, IdentityPolicy::Known(_))
        {
            context.remember(&state_dir, &resolved, &policy, &checked.facts);
        }
        let target = resolved.target.to_string();
        let json = result_json(
            "check",
            exit_of(checked.is_damaged()),
            self.fields(&target, &checked, begun.elapsed()),
        );
        if let Some(Ok(report)) = &checked.files {
            for reason in &report.not_saved {
                context.output.warning(&format!(
                    "the result of this check can't be saved on this machine. Later checks compare with \
                     older checksums, and backups don't know of the damage: {reason}"
                ));
            }
        }
        let paths = StatePaths::new(&state_dir, &checked.facts.uuid, &resolved.target);
        self.keep(context, &paths, &checked, &json);
        Ok((checked, json))
    }

    /// The job that is compared with its source.
    fn job(&self) -> Option<&str> {
        match &self.what {
            Some(CheckWhat::AgainstSource(job)) => Some(job.as_str()),
            _ => None,
        }
    }

    fn fields(&self, target: &str, checked: &Checked, took: Duration) -> Value {
        json!({
            "target": target,
            "at": Timestamp::now(),
            "seconds": took.as_secs_f64(),
            "uuid": checked.facts.uuid,
            "container_bytes": checked.facts.file_bytes,
            "volume_bytes": checked.facts.volume_bytes,
            "header_copies_damaged": checked.header.copies,
            "key_slots_damaged": checked.header.slots,
            "file_system": checked.file_system,
            "file_system_errors": checked.facts.file_system_errors,
            "differing_blocks": checked.differing_blocks,
            "overwritten_blocks": checked.facts.overwritten.len(),
            // Without a mount the files are unknown: null, not "none".
            "overwritten_files": match checked.files {
                Some(Err(_)) => Value::Null,
                _ => json!(checked.overwritten),
            },
            "not_compared": checked.facts.not_compared,
            "against_source": self.job(),
            "files": match &checked.files {
                None => Value::Null,
                Some(Ok(report)) => json!(report),
                Some(Err(failure)) => json!({ "failure": failure_json(failure) }),
            },
        })
    }

    /// Keeps the result on this machine, for `sprat status`.
    fn keep(&self, context: &Context, paths: &StatePaths, checked: &Checked, json: &Value) {
        let quick_exit = exit_of(checked.quick_is_damaged());
        let mut kept = Vec::new();
        // Without e2fsck only damage is news.
        if self.file_system || quick_exit == Exit::Damaged {
            let mut quick = json.clone();
            quick["result"] = exit_json(quick_exit);
            (quick["files"], quick["against_source"]) = (Value::Null, Value::Null);
            kept.push((Kind::Quick, KeptCheck::now(quick_exit, true, quick)));
        }
        if let Some(files) = &checked.files {
            let finished = files.as_ref().is_ok_and(|report| report.finished);
            let kind = self.job().map_or(Kind::ReadData, Kind::AgainstSource);
            let exit = exit_of(checked.is_damaged());
            kept.push((kind, KeptCheck::now(exit, finished, json.clone())));
        }
        store(context, paths, kept);
    }
}

fn exit_of(damaged: bool) -> Exit {
    if damaged { Exit::Damaged } else { Exit::Done }
}

/// Also keeps damage that ended the check: a header or a file that is not what it was.
fn keep_failure(context: &Context, paths: &StatePaths, failure: &Failure) {
    let fields = json!({ "failure": failure_json(failure) });
    let json = result_json("check", failure.exit, fields);
    let check = KeptCheck::now(failure.exit, false, json);
    store(context, paths, vec![(Kind::Quick, check)]);
}

fn store(context: &Context, paths: &StatePaths, results: Vec<(Kind<'_>, KeptCheck)>) {
    if let Err(error) = checks::keep(paths, results) {
        let path = checks::path(paths);
        context.output.warning(&format!(
            "the result can't be saved in {}: {error}",
            path.display()
        ));
    }
}

fn render(target: &str, args: &CheckArgs, checked: &Checked) -> String {
    let mut out = String::new();
    let header = &checked.header;
    let _ = writeln!(
        out,
        "{target}: {} long, file system of {}",
        text::bytes(checked.facts.file_bytes),
        text::bytes(checked.facts.volume_bytes)
    );
    if header.copies.is_empty() {
        out.push_str("header: both copies are good, and are the ones that this machine knows\n");
    }
    for slot in &header.slots {
        let _ = writeln!(
            out,
            "header: DAMAGED, key slot {slot} differs from the header that this machine has saved"
        );
        out.push_str(
            "  The key of that slot may no longer open the container: test the key with `sprat key \
             rehearse`. If it fails, run `sprat key header-restore`\n",
        );
    }
    for copy in &header.copies {
        let _ = writeln!(out, "header: DAMAGED, {}", text::harmless(copy));
        out.push_str(
            "  The other copy opens the container. To repair the header, run `sprat key \
             header-restore`\n",
        );
    }
    match &checked.file_system {
        None => {}
        Some(found) if found.clean => out.push_str("file system: clean\n"),
        Some(found) => {
            out.push_str("file system: DAMAGED; the check reports:\n");
            for line in found.output.lines().take(NAMES_SHOWN) {
                let _ = writeln!(out, "  {}", text::harmless(line));
            }
        }
    }
    if let Some(errors) = checked.facts.file_system_errors {
        let _ = writeln!(
            out,
            "file system: DAMAGED, marked as faulty: the kernel found {}. First restore the files \
             that you need. To repair it, open the container file with `cryptsetup open`, and run \
             `e2fsck -f` on the mapped device",
            text::counted(errors.into(), "error", "errors")
        );
    }
    if let Some(files) = &checked.overwritten {
        let _ = writeln!(
            out,
            "late writes: DAMAGED, {} overwritten by an earlier session after its lock was taken over. \
             {}",
            text::counted(checked.facts.overwritten.len() as u64, "block", "blocks"),
            match files.count {
                0 if matches!(checked.files, Some(Err(_))) => {
                    "The files that use these blocks are not known: the file system can't be mounted"
                        .to_owned()
                }
                0 =>
                    "No file uses these blocks: they are free, or belong to the file system itself"
                        .to_owned(),
                count => format!(
                    "These blocks belong to files: {} in all snapshots. The next backup reads these \
                     files from the source again",
                    text::counted(count, "path", "paths")
                ),
            }
        );
        for name in files.names.iter().take(NAMES_SHOWN) {
            let _ = writeln!(out, "  {name}");
        }
    }
    if checked.differing_blocks > 0 {
        let _ = writeln!(
            out,
            "server: DAMAGED, {} as this machine wrote them. Either the server's disk is damaged, or \
             the server lost data that it had reported as durable, or it shows an older copy of the file",
            text::counted(checked.differing_blocks, "block is not", "blocks are not")
        );
    }
    match &checked.files {
        None => {}
        Some(Ok(report)) => out.push_str(&render_files(args, report)),
        Some(Err(failure)) => {
            let _ = writeln!(out, "files: not read: {}", text::harmless(&failure.what));
        }
    }
    if checked.is_damaged() {
        out.push_str(
            "What to do: don't back up into this container before you know the cause. First restore the \
             files that you need; files that aren't named here are good as far as they were checked. \
             Then check the server's disk. If the disk can't read some blocks, copy the container file \
             with `ddrescue`: `sprat copy` stops at such a block\n",
        );
    }
    if let Some(Ok(report)) = &checked.files
        && (report.is_damaged() || !report.missed.is_empty())
    {
        out.push_str(
            "Back up again after the cause is removed: the backup reads the damaged files from the \
             source again, if they still exist, and names them. It never links to the damaged content \
             again\n",
        );
    }
    out
}

fn render_files(args: &CheckArgs, report: &CheckReport) -> String {
    let mut out = format!(
        "files: {} read, {}",
        text::counted(report.files_read, "file", "files"),
        text::bytes(report.bytes_read)
    );
    if report.files_before > 0 {
        let _ = write!(
            out,
            "; {} by earlier runs",
            text::count(report.files_before)
        );
    }
    if args.read_data {
        let _ = write!(
            out,
            "; {} compared with an earlier check",
            text::count(report.files_known)
        );
    } else {
        let _ = write!(
            out,
            "; {} the same as in the source",
            text::count(report.same)
        );
    }
    out.push('\n');
    list(&mut out, "CAN'T BE READ", &report.unreadable);
    list(&mut out, "DAMAGED", &report.damaged);
    list(&mut out, "paths with this damage", &report.affected);
    if report.affected_left > 0 {
        let _ = writeln!(
            out,
            "not listed, because the time was over: {} of the damaged files (hard links in other \
             snapshots)",
            text::counted(report.affected_left, "more path", "more paths")
        );
    }
    list(
        &mut out,
        "changed in the source since the backup",
        &report.changed,
    );
    list(
        &mut out,
        "differ from the source although size and time are the same: backups did not notice the change \
         (the next backup from this machine copies them)",
        &report.missed,
    );
    if !report.gone.is_empty() {
        let count = text::count(report.gone.count);
        let _ = writeln!(out, "removed from the source since the backup: {count}");
    }
    list(
        &mut out,
        "NOT IN THE SNAPSHOT, although the source had them when the backup began (the next backup \
         copies them)",
        &report.lacking,
    );
    list(
        &mut out,
        "not in the snapshot: created, moved or mounted since the backup (the next backup copies them)",
        &report.new_since,
    );
    if let Some(why) = &report.lacking_unknown {
        let _ = writeln!(
            out,
            "it is not known which files the snapshot lacks: {}",
            text::harmless(why)
        );
    }
    list(
        &mut out,
        "can't be read in the source",
        &report.source_unreadable,
    );
    if !report.finished {
        out.push_str("not all files were read: run the same command again to continue\n");
    }
    out
}

fn list(out: &mut String, title: &str, names: &NameList) {
    if names.is_empty() {
        return;
    }
    let _ = writeln!(out, "{title}: {}", text::count(names.count));
    for name in names.names.iter().take(NAMES_SHOWN) {
        let _ = writeln!(out, "  {}", text::harmless(name));
    }
    if names.count > NAMES_SHOWN as u64 {
        out.push_str("  …; --json shows more\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_a_unit_is_seconds_and_at_most_ten_years() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("45m", 2700),
            ("2h", 7200),
            ("1d", 86_400),
        ] {
            assert_eq!(max_duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in [
            "h",
            "1w",
            "999999999999999999d",
            "200000000000000d",
            "3651d",
        ] {
            assert!(max_duration(text).is_err(), "{text}");
        }
    }
}
