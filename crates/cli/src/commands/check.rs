//! `sprat check`: checks a container's integrity, down to every file if asked to.

use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_run::check_text;
use sprat_session::check::{Checked, check};
use sprat_session::interrupt::Interrupt;
use sprat_session::state::checks::{self, KeptCheck, Kind};
use sprat_session::state::paths::{CHECKS, SUSPECTS, StatePaths};
use sprat_session::{ContainerFacts, IdentityPolicy, text};
use sprat_snapshot::{CheckSpec, CheckWhat, JobName};

use super::context::{CommandArgs, Context, Prepared};
use crate::args::ReadTarget;
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
    #[command(flatten)]
    target: ReadTarget,
    /// Also read every file in the volume, and compare it with the checksum that its backup or an earlier check saved
    #[arg(long)]
    read_data: bool,
    /// Also compare the latest snapshot of this job with the present files of its sources
    #[arg(long, value_name = "JOB")]
    against_source: Option<String>,
    /// Start no further file after this time, such as 45m or 2h; the next run of the same command
    /// continues
    #[arg(long, value_name = "TIME", value_parser = text::parse_limit, requires = "files")]
    max_duration: Option<Duration>,
}

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
        let prepared = context.prepare_reading(&self.target)?;
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
        let text = check_text::table(&target, self.read_data, &checked);
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
                    change_lists: Some(paths.change_lists()),
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
