//! `sprat backup`: the jobs of the config, or one given on the command line.

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_luks::Secret;
use sprat_session::state::history::{MadeSnapshot, MissingPlace, Run};
use sprat_session::state::identity;
use sprat_session::{Access, ClosedReport, IdentityPolicy, text};
use sprat_snapshot::{RunRecord, SnapshotReport, SnapshotSpec, Warning};

use super::context::{Context, Resolved, both};
use crate::args::BackupArgs;
use crate::config::{Job, job_name};
use crate::output::{Reporter, exit_json, failure_json};
use crate::{Exit, Failure};

/// Unread files that are listed as text; JSON has them all.
const UNREAD_SHOWN_MAX: usize = 20;

/// Places of the kernel's own file systems that are named one by one; JSON has them all.
const KERNEL_PLACES_SHOWN_MAX: usize = 3;

/// Jobs that share one session.
struct Group {
    resolved: Resolved,
    specs: Vec<SnapshotSpec>,
}

/// What became of one job.
struct Outcome {
    job: String,
    target: String,
    took: Duration,
    result: Result<SnapshotReport, Failure>,
}

impl Outcome {
    fn exit(&self) -> Exit {
        match &self.result {
            Ok(report) if report.record.complete => Exit::Done,
            Ok(_) => Exit::Unread,
            Err(failure) => failure.exit,
        }
    }
}

pub(super) fn run(context: &Context, args: &BackupArgs) -> Result<Exit, Failure> {
    let mut groups = plan(context, args)?;
    for spec in groups.iter_mut().flat_map(|group| &mut group.specs) {
        let gone = args.disk_gone.iter();
        spec.disks_gone = gone
            .map(|path| context.environment.absolute(path))
            .collect();
        spec.checksum = args.checksum;
    }
    check_sources(&groups)?;
    // Every key is fetched before the first session: nobody waits at a terminal for hours.
    let mut secrets = Vec::new();
    for group in &groups {
        secrets.push(context.secret(&group.resolved));
        context.interrupt.check()?;
    }
    let mut outcomes = Vec::new();
    let mut sessions = Vec::new();
    let mut skipped = false;
    // Where nobody reads what is told, the jobs of the next container run all the same.
    let mut unheard: Option<Failure> = None;
    for (group, secret) in groups.iter().zip(secrets) {
        if context.interrupt.requested() {
            skipped = true;
            break;
        }
        let (made, closed) = run_group(context, group, secret);
        note(context, group, &made, closed.as_ref());
        for outcome in &made {
            let told = report(context, outcome);
            unheard = unheard.or(told.err());
        }
        if let Some(closed) = &closed
            && made.iter().any(|outcome| outcome.result.is_ok())
        {
            let told = report_closed(context, closed);
            unheard = unheard.or(told.err());
        }
        sessions.push(json!({
            "target": group.resolved.target.to_string(),
            "durable": closed.is_some_and(|closed| closed.durable),
            "volume": closed.map(|closed| closed.volume),
        }));
        outcomes.extend(made);
    }
    let exit = worst(outcomes.iter().map(Outcome::exit), skipped);
    if context.output.json {
        let jobs: Vec<Value> = outcomes.iter().map(outcome_json).collect();
        let json = json!({
            "command": "backup",
            "result": exit_json(exit),
            "jobs": jobs,
            "sessions": sessions,
        });
        let told = context.output.result("", &json);
        unheard = unheard.or(told.err());
    }
    match unheard {
        Some(failure) => Err(with_states(failure, exit, &outcomes)),
        None => Ok(exit),
    }
}

/// That results can't be written is a failure of its own; it says what became of each job.
fn with_states(mut failure: Failure, exit: Exit, outcomes: &[Outcome]) -> Failure {
    if !matches!(exit, Exit::Done | Exit::Unread) {
        failure.exit = exit;
    }
    for outcome in outcomes {
        let job = &outcome.job;
        failure = failure.because(match &outcome.result {
            Ok(report) if report.record.complete => {
                format!("job {job}: snapshot {} is made", report.name)
            }
            Ok(report) => format!(
                "job {job}: snapshot {} is made and lacks {}",
                report.name,
                text::counted(report.record.unread.count, "file", "files")
            ),
            Err(failed) => format!("job {job} failed: {}", failed.what),
        });
    }
    failure.with_hint(
        "every job ran to its end, and each snapshot named here is on the server's disk. See where \
         the output was to go",
    )
}

/// Tells at once all that is wrong with the form of sources and patterns. What isn't there or can't
/// be read is its job's own failure, and stops no other.
fn check_sources(groups: &[Group]) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for spec in groups.iter().flat_map(|group| &group.specs) {
        let mistakes = sprat_snapshot::mistakes(spec).into_iter();
        wrong.extend(mistakes.map(|mistake| format!("job {}: {mistake}", spec.job)));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let failure = Failure::usage("what is to be backed up is named in a way that can't be meant");
    let failure = wrong.into_iter().fold(failure, Failure::because);
    Err(failure.with_hint("nothing was started. Correct all of these, in the config or here"))
}

/// Checks all that was asked for, before anything starts.
fn plan(context: &Context, args: &BackupArgs) -> Result<Vec<Group>, Failure> {
    if let Some(name) = &args.name {
        let Some((target, sources)) = args.words.split_first().filter(|(_, s)| !s.is_empty())
        else {
            return Err(
                Failure::usage("`sprat backup --name` needs a TARGET and a SOURCE")
                    .with_hint("sprat backup TARGET --name JOB SOURCE…"),
            );
        };
        let job = job_name(name).map_err(Failure::usage)?;
        let resolved = context.resolve_os(target)?;
        let environment = &context.environment;
        if sources.iter().any(|source| source.is_empty()) {
            return Err(Failure::usage("a SOURCE is empty").with_hint(
                "nothing was started. Is a variable of the shell not set? `.` is the current folder",
            ));
        }
        let sources = sources
            .iter()
            .map(|source| source_path(&environment.absolute(source.as_ref())))
            .collect::<Result<_, _>>()?;
        let mut spec = SnapshotSpec::new(job, sources);
        spec.excludes.clone_from(&args.exclude);
        spec.exclude_from = args
            .exclude_from
            .iter()
            .map(|path| environment.absolute(path))
            .collect();
        spec.one_file_system = args.one_file_system;
        spec.allow_empty = args.allow_empty;
        return Ok(vec![Group {
            resolved,
            specs: vec![spec],
        }]);
    }
    let jobs: Vec<&Job> = if args.words.is_empty() {
        context.config.jobs.iter().collect()
    } else {
        args.words
            .iter()
            .map(|word| context.config.job(&word.to_string_lossy()))
            .collect::<Result<_, _>>()?
    };
    if jobs.is_empty() {
        let failure = context.config.placed(Failure::usage("no job to run"));
        return Err(failure.with_hint(
            "write a [job.NAME] into the config, or: sprat backup TARGET --name JOB SOURCE…",
        ));
    }
    let mut groups: Vec<Group> = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        if jobs[..index].iter().any(|earlier| earlier.name == job.name) {
            return Err(Failure::usage(format!("job {} is named twice", job.name)));
        }
        let resolved = context.resolve_container(context.config.container(&job.container)?)?;
        let spec = job_spec(job);
        match groups
            .last_mut()
            .filter(|last| last.resolved.target == resolved.target)
        {
            Some(last) => last.specs.push(spec),
            None => groups.push(Group {
                resolved,
                specs: vec![spec],
            }),
        }
    }
    Ok(groups)
}

/// What a job of the config asks for.
pub(super) fn job_spec(job: &Job) -> SnapshotSpec {
    let mut spec = SnapshotSpec::new(job.name.clone(), job.sources.clone());
    spec.excludes.clone_from(&job.exclude);
    spec.exclude_from.clone_from(&job.exclude_from);
    spec.one_file_system = job.one_file_system;
    spec.allow_empty = job.allow_empty;
    spec
}

/// Resolves `..` as the kernel does; a symbolic link at the end stays one. A source must keep one
/// path, or the next run would not find its files in this one's snapshot.
fn source_path(path: &Path) -> Result<PathBuf, Failure> {
    let is_up = |component: Component<'_>| component == Component::ParentDir;
    if !path.components().any(is_up) {
        return Ok(path.to_owned());
    }
    let resolve = |path: &Path| {
        std::fs::canonicalize(path).map_err(|error| {
            Failure::failed(format!("source {}: can't be found", path.display()))
                .caused_by(&error)
                .with_hint("nothing was started. Check the path")
        })
    };
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(resolve(parent)?.join(name)),
        _ => resolve(path),
    }
}

/// Runs one session. Its jobs have succeeded only once it is closed.
fn run_group(
    context: &Context,
    group: &Group,
    secret: Result<Secret, Failure>,
) -> (Vec<Outcome>, Option<ClosedReport>) {
    let target = group.resolved.target.to_string();
    let outcome = |spec: &SnapshotSpec, took, result| Outcome {
        job: spec.job.to_string(),
        target: target.clone(),
        took,
        result,
    };
    let all_failed = |failure: Failure| {
        let failed = |spec| outcome(spec, Duration::ZERO, Err(failure.clone()));
        (group.specs.iter().map(failed).collect(), None)
    };
    let secret = match secret {
        Ok(secret) => secret,
        Err(failure) => return all_failed(failure),
    };
    let mut reporter = Reporter::new(context.output, format!("{}: ", group.resolved.name));
    let opened = context.open(&group.resolved, &secret, Access::ReadWrite, &mut reporter);
    drop(secret);
    let mut session = match opened {
        Ok(session) => session,
        Err(failure) => return all_failed(failure),
    };
    let mut outcomes = Vec::new();
    for spec in &group.specs {
        reporter.about(format!("{}: ", spec.job));
        let began = Instant::now();
        let result = context
            .interrupt
            .check()
            .and_then(|()| session.take_snapshot(spec.clone(), &mut reporter, &context.interrupt));
        outcomes.push(outcome(spec, began.elapsed(), result));
    }
    reporter.about(format!("{}: ", group.resolved.name));
    match session.close(&mut reporter, &context.interrupt) {
        Ok(closed) => (outcomes, Some(closed)),
        Err(failure) => {
            for outcome in &mut outcomes {
                outcome.result = Err(match &outcome.result {
                    Ok(_) => failure.clone(),
                    Err(first) => both(first.clone(), failure.clone()),
                });
            }
            (outcomes, None)
        }
    }
}

/// Notes for `sprat status` how the jobs went, where the container is known here.
fn note(context: &Context, group: &Group, made: &[Outcome], closed: Option<&ClosedReport>) {
    let state_dir = context.environment.absolute(&context.global.state_dir);
    let Ok(IdentityPolicy::Known(pins)) =
        identity::policy(&state_dir, &group.resolved.target, None)
    else {
        return;
    };
    let at = Timestamp::now();
    context.note_standing(&pins.uuid, &group.resolved.target, |history| {
        history.saw(closed.and_then(|closed| closed.room));
        for outcome in made {
            // The run that has the container reports for itself.
            if closed.is_none() && outcome.exit() == Exit::Locked {
                continue;
            }
            // A name that never had a snapshot may be a typing error.
            let in_config = context.config.has_job(&group.resolved.name, &outcome.job);
            if outcome.result.is_err() && !in_config && !history.jobs.contains_key(&outcome.job) {
                continue;
            }
            let failure = outcome.result.as_ref().err();
            let failure = failure.filter(|failure| failure.exit != Exit::Interrupted);
            let run = Run {
                at,
                exit: outcome.exit(),
                failure: failure.map(|failure| failure.what.clone()),
            };
            let snapshot = outcome.result.as_ref().ok().map(|report| MadeSnapshot {
                at,
                name: report.name.to_string(),
                complete: report.record.complete,
                missing: missing(report),
            });
            history.ran(&outcome.job, run, snapshot);
        }
    });
}

fn report(context: &Context, outcome: &Outcome) -> Result<(), Failure> {
    let report = match &outcome.result {
        Ok(report) => report,
        Err(failure) => {
            let what = match failure.exit {
                Exit::Interrupted => format!("job {} was interrupted", outcome.job),
                _ => format!("job {} failed", outcome.job),
            };
            context.output.failure(&failure.clone().context(what));
            return Ok(());
        }
    };
    for (text, matters) in said_of(&outcome.job, &report.record.warnings) {
        if matters {
            context.output.warning(&text);
        } else {
            context.output.note(&text);
        }
    }
    for name in names_of_content(&report.record) {
        context.output.note(&name);
    }
    if context.output.json {
        return Ok(());
    }
    context
        .output
        .result(&summary(&outcome.job, report, outcome.took), &json!(null))
}

/// What is said of a run's warnings, and whether it is a warning to the user, too.
fn said_of(job: &str, warnings: &[Warning]) -> Vec<(String, bool)> {
    let is_kernels =
        |warning: &&Warning| matches!(warning, Warning::KernelFileSystemLeftOut { .. });
    // A backup of `/` leaves out more than ten; one line says as much.
    let kernels = warnings.iter().filter(is_kernels).count();
    let mut said = Vec::new();
    if kernels > KERNEL_PLACES_SHOWN_MAX {
        let text = format!("{job}: left out the kernel's own file systems ({kernels} places)");
        said.push((text, false));
    }
    for warning in warnings {
        if is_kernels(&warning) && kernels > KERNEL_PLACES_SHOWN_MAX {
            continue;
        }
        let text = format!("{job}: {}", super::warning_text(warning));
        said.push((text, lacks_something(warning) || is_of_content(warning)));
    }
    said
}

fn missing(report: &SnapshotReport) -> Vec<MissingPlace> {
    let place = |warning: &Warning| match warning {
        Warning::NotMounted { path, before } | Warning::OtherFileSystem { path, before, .. } => {
            Some(MissingPlace {
                path: path.clone(),
                kept_in: before.to_string(),
            })
        }
        _ => None,
    };
    report.record.warnings.iter().filter_map(place).collect()
}

/// Whether the snapshot has less than its owner may think.
fn lacks_something(warning: &Warning) -> bool {
    use Warning as W;
    matches!(
        warning,
        W::UnmountedMeanwhile { .. }
            | W::MountedMeanwhile { .. }
            | W::NotMounted { .. }
            | W::OtherFileSystem { .. }
            | W::AutomountEmpty { .. }
            | W::FoldersVanished { .. }
            | W::ManyVanished { .. }
            | W::AttributesTooLarge { .. }
            | W::AttributesRefused { .. }
            | W::SourceLeftOut { .. }
            | W::ForeignObject { .. }
            | W::SubvolumesLeftOut { .. }
    )
}

/// What such warnings are about; the record has more of them.
fn names_of_content(record: &RunRecord) -> Vec<String> {
    let line = |what: &'static str| {
        move |name: &String| format!("{}: {what}: {}", record.job, text::harmless(name))
    };
    let healed = record.healed.names.iter().map(line("was damaged"));
    let caught_up = record.caught_up.names.iter().map(line("was missed"));
    healed.chain(caught_up).take(UNREAD_SHOWN_MAX).collect()
}

/// Whether an older snapshot has, or had, another content than its owner may think, or the run cost more
/// than it should.
fn is_of_content(warning: &Warning) -> bool {
    use Warning as W;
    matches!(
        warning,
        W::DamageHealed { .. }
            | W::MissedChangeCopied { .. }
            | W::LatestNotMoved { .. }
            | W::UnchangedCopied { .. }
            | W::LinksSplit { .. }
            | W::HolesRead { .. }
    )
}

/// Why a file is missing: what rsync said of it, or of its place on the volume.
fn reason_of(name: &str, record: &RunRecord) -> Option<String> {
    let left_out = record.warnings.iter().find_map(|warning| match warning {
        Warning::SourceLeftOut { path, why } if path == name => Some(why.clone()),
        _ => None,
    });
    // The name ends where the quote does; in a few messages there is a comma instead.
    let ends = [format!("{name}\""), format!("{name},")];
    let mut messages = record.messages.names.iter();
    left_out.or_else(|| {
        let message = messages.find(|message| ends.iter().any(|end| message.contains(end)))?;
        let (_, reason) = message.rsplit_once(": ")?;
        let attribute = message
            .contains("xattr(")
            .then(|| message.split('"').nth(3))
            .flatten()
            .map(|attribute| format!("attribute {attribute}: "));
        Some(format!("{}{reason}", attribute.unwrap_or_default()))
    })
}

/// The result as text: one line, and the files that could not be read.
fn summary(job: &str, report: &SnapshotReport, took: Duration) -> String {
    let stats = &report.record.stats;
    let seconds = took.as_millis().max(1);
    let rate = u128::from(stats.bytes_transferred) * 1000 / seconds;
    let rate = text::bytes(u64::try_from(rate).unwrap_or(u64::MAX));
    let mut summary = format!(
        "{job}: snapshot {} of {}, {}; {} ({}) copied in {} ({rate}/s)",
        report.name,
        text::counted(stats.files_of_people().unwrap_or(0), "file", "files"),
        text::bytes(stats.bytes_total),
        text::counted(stats.transferred, "file", "files"),
        text::bytes(stats.bytes_transferred),
        text::duration(took),
    );
    let vanished = report.record.vanished.count;
    if vanished > 0 {
        summary.push_str(&format!(
            "; {} vanished while it ran",
            text::counted(vanished, "file", "files")
        ));
    }
    let unread = &report.record.unread;
    if unread.is_empty() {
        summary.push_str(if report.record.complete {
            "\n"
        } else {
            "; NOT whole\n"
        });
        return summary;
    }
    // Of a place whose disk went, or a file without its attributes, there is a part.
    let part = report.record.warnings.iter().any(lacks_something);
    summary.push_str(&format!(
        "\n{job}: {} could not be read and NOT in this snapshot{}:\n",
        text::counted(unread.count, "source file", "source files"),
        if part { ", or not whole" } else { "" }
    ));
    for name in unread.names.iter().take(UNREAD_SHOWN_MAX) {
        let reason = reason_of(name, &report.record).map(|reason| format!(": {reason}"));
        summary.push_str(&format!(
            "  {}{}\n",
            text::harmless(name),
            text::harmless(&reason.unwrap_or_default())
        ));
    }
    let shown = u64::try_from(unread.names.len().min(UNREAD_SHOWN_MAX)).unwrap_or(u64::MAX);
    if unread.count > shown {
        summary.push_str(&format!(
            "  … and {} more\n",
            text::count(unread.count - shown)
        ));
    }
    summary.push_str(
        "To leave one out for good, exclude its path: --exclude PATH, or `exclude` of the job.\n",
    );
    summary
}

fn report_closed(context: &Context, closed: &ClosedReport) -> Result<(), Failure> {
    if context.output.json {
        return Ok(());
    }
    let durable = if closed.durable {
        "everything is on the server's disk"
    } else {
        "the server can't tell whether it is on its disk"
    };
    let line = format!(
        "{} sent, {} read; {durable}\n",
        text::bytes(closed.volume.written_bytes),
        text::bytes(closed.volume.read_bytes)
    );
    context.output.result(&line, &json!(null))
}

fn outcome_json(outcome: &Outcome) -> Value {
    let (snapshot, failure) = match &outcome.result {
        Ok(report) => (Some(report), None),
        Err(failure) => (None, Some(failure_json(failure))),
    };
    json!({
        "job": outcome.job,
        "target": outcome.target,
        "result": exit_json(outcome.exit()),
        "seconds": outcome.took.as_secs_f64(),
        "snapshot": snapshot.map(|report| report.name.to_string()),
        "complete": snapshot.map(|report| report.record.complete),
        "record": snapshot.map(|report| &report.record),
        "failure": failure,
    })
}

/// The exit code of several jobs: that of the failed ones if they agree, else 1; 3 only if no job
/// failed; 130 before all.
fn worst(exits: impl Iterator<Item = Exit>, skipped: bool) -> Exit {
    if skipped {
        return Exit::Interrupted;
    }
    Exit::of_several(exits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_code_of_several_jobs_is_that_of_the_worst() {
        use Exit::{Done, Failed, Interrupted, Locked, Unreachable, Unread};
        let cases = [
            (vec![Done, Done], Done),
            (vec![Done, Unread], Unread),
            (vec![Unread, Locked, Done], Locked),
            (vec![Locked, Unread], Locked),
            (vec![Unreachable, Unreachable], Unreachable),
            (vec![Unreachable, Locked], Failed),
            (vec![Failed, Interrupted], Interrupted),
        ];
        for (exits, expected) in cases {
            assert_eq!(
                worst(exits.clone().into_iter(), false),
                expected,
                "{exits:?}"
            );
        }
        assert_eq!(worst([Done].into_iter(), true), Interrupted);
    }

    #[test]
    fn many_places_of_the_kernels_are_one_line_and_a_few_are_named() {
        let kernels = |count: usize| -> Vec<Warning> {
            let path = |n| format!("/sys/{n}");
            (0..count)
                .map(|n| Warning::KernelFileSystemLeftOut { path: path(n) })
                .collect()
        };
        let few = said_of("root", &kernels(KERNEL_PLACES_SHOWN_MAX));
        assert_eq!(few.len(), KERNEL_PLACES_SHOWN_MAX);
        assert!(few[0].0.contains("left out /sys/0"), "{few:?}");
        let mut many = kernels(15);
        many.push(Warning::FoldersVanished { folders: 1 });
        let many = said_of("root", &many);
        assert_eq!(many.len(), 2, "{many:?}");
        assert!(many[0].0.contains("(15 places)") && !many[0].1);
        assert!(many[1].1);
    }
}
