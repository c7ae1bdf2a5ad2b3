//! `sprat backup`: runs the jobs of the config, or one given on the command line.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use sprat_run::config::job_name;
use sprat_run::copy_name::CopyName;
use sprat_run::hooks::refuse_inside_hook;
use sprat_run::notify::By;
use sprat_run::runner::{
    ContainerWork, CopyWork, Runner, attempts, check_sources, hooks_of_containers, outcome_json,
    source_path, with_states,
};
use sprat_run::watch::{Ended, Now, Watch};
use sprat_session::text;
use sprat_snapshot::{ScanRules, SnapshotSpec};

use super::backup_preview;
use super::context::{CommandArgs, Context, Resolved};
use super::copies::{Containers, Printer};
use crate::output::result_json;
use crate::{Exit, Failure};

pub(super) const USAGE: &str = "sprat backup [OPTIONS] [JOB]...
       sprat backup [OPTIONS] --name JOB TARGET SOURCE...";

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat backup
  sprat backup home
  sprat backup ssh://u1234@example.org/backup/home.luks --name home /home --exclude .cache/";

pub(super) const NOTES: &str = "\
Success is reported only after the server has all data on its disk. An interrupted run loses
nothing: the next one continues it.

Exit codes: 0 done, 3 some source files unread, others in `sprat --help`.";

#[derive(Debug, Default, Args)]
pub(super) struct BackupArgs {
    /// Jobs of the config, or copies (JOB@CONTAINER) [default: all]; with --name give TARGET SOURCE… instead
    #[arg(value_name = "JOB")]
    words: Vec<OsString>,
    /// Back up without a config, as a job of this name
    #[arg(long, value_name = "JOB")]
    name: Option<String>,
    /// Exclude what matches this rsync pattern (with --name; can be repeated)
    #[arg(long, value_name = "PATTERN", requires = "name")]
    exclude: Vec<String>,
    /// Exclude what matches a pattern in this file (with --name; can be repeated)
    #[arg(long, value_name = "FILE", requires = "name")]
    exclude_from: Vec<PathBuf>,
    /// Exclude the content of folders that a CACHEDIR.TAG marks as caches (with --name)
    #[arg(long, requires = "name")]
    exclude_caches: bool,
    /// Exclude the content of folders that contain a file of this name (with --name; can be repeated)
    #[arg(long, value_name = "FILE", requires = "name")]
    exclude_if_present: Vec<String>,
    /// Exclude files that are larger than this, such as 4GiB (with --name)
    #[arg(long, value_name = "SIZE", value_parser = text::parse_size, requires = "name")]
    exclude_larger_than: Option<u64>,
    /// Stay on the file system of each source (with --name)
    #[arg(long, requires = "name")]
    one_file_system: bool,
    /// Compare the content of every file, not only its size and time; reads all of source and snapshot
    #[arg(long)]
    checksum: bool,
    /// Accept empty sources (with --name)
    #[arg(long, requires = "name")]
    allow_empty: bool,
    /// Only show what would be copied and excluded, with sizes; opens no container
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// List every path (with --dry-run)
    #[arg(long, requires = "dry_run")]
    all: bool,
    /// Stop warning of the disk that was mounted at PATH: it is gone for good (can be repeated)
    #[arg(long, value_name = "PATH")]
    disk_gone: Vec<PathBuf>,
}

impl BackupArgs {
    /// One copy of the config.
    pub(super) fn of_copy(copy: &CopyName) -> Self {
        Self {
            words: vec![copy.to_string().into()],
            ..Self::default()
        }
    }
}

impl CommandArgs for BackupArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        refuse_inside_hook(context.environment.run_variable.as_deref())?;
        let (resolved, mut groups) = plan(context, self)?;
        for copy in groups.iter_mut().flat_map(|group| &mut group.copies) {
            let gone = self.disk_gone.iter();
            copy.spec.disks_gone = gone
                .map(|path| context.environment.absolute(path))
                .collect();
            copy.spec.checksum = self.checksum;
        }
        check_sources(&groups)?;
        if self.name.is_none() {
            // A filter that is not used must not go unseen.
            for warning in context.config.without_effect() {
                context.output.warning(&warning.to_string());
            }
        }
        if self.dry_run {
            return backup_preview::show(context, &resolved, &groups, self.all);
        }
        let mut begins = |_: &CopyName| {};
        let mut containers = Containers::new(context, context.output, resolved, &mut begins);
        containers.fetch_keys()?;
        let runner = Runner::new(
            &context.config,
            context.state_dir(),
            context.environment.absolute(&context.global.runtime_dir),
            &context.interrupt,
            By::Backup,
        );
        make(context, &runner, &groups, &mut containers)
    }
}

/// Makes the copies, and prints the results.
fn make(
    context: &Context,
    runner: &Runner<'_>,
    groups: &[ContainerWork<'_>],
    containers: &mut Containers<'_>,
) -> Result<Exit, Failure> {
    let printer = Printer {
        output: context.output,
        silent: false,
    };
    let of_config = groups.iter().flat_map(ContainerWork::of_config);
    let failed_owed = runner.pay_owed_hooks(&of_config.collect::<Vec<_>>());
    for failure in &failed_owed {
        context.output.failure(&failure.failure);
    }
    let (mut finished, mut sessions) = (Vec::new(), Vec::new());
    let mut exits: Vec<Exit> = failed_owed.iter().map(|_| Exit::Failed).collect();
    // If the results can't be printed, the jobs of the next container still run.
    let mut printed = Ok(());
    for group in groups {
        // After an interrupt, too: the copies that did not begin are named.
        let done = runner.work_on(group, containers);
        for problem in runner.take_problems() {
            context.output.warning(&problem);
        }
        let now = printer.report(&done);
        printed = printed.and(now);
        sessions.push(json!({
            "target": group.target.to_string(),
            "durable": done.closed.is_some_and(|closed| closed.durable),
            "volume": done.closed.map(|closed| closed.volume),
        }));
        exits.push(done.exit());
        finished.push(done);
    }
    let exit = Exit::worst(exits.into_iter());
    let outcomes = || finished.iter().flat_map(|done| &done.outcomes);
    let mut container_hooks = hooks_of_containers(&finished);
    // A person saw those that failed.
    container_hooks.retain(|(_, failed)| failed.is_none());
    // A copy that is not in the config may only have the name of one: its end says nothing of that one.
    let of_config = groups.iter().flat_map(ContainerWork::of_config);
    let of_config: BTreeSet<CopyName> = of_config.map(|copy| copy.name()).collect();
    let watched = outcomes().filter(|outcome| of_config.contains(&outcome.copy));
    let ended = Watch::new(context.watched(), context.environment.network()).ended(
        &Ended {
            run: &runner.run,
            attempts: &attempts(watched, By::Backup),
            container_hooks: &container_hooks,
            // A person saw them, too.
            owed: &[],
        },
        &Now::read(context.environment.trust_clock),
    );
    for problem in &ended.problems {
        context.output.warning(problem);
    }
    if context.output.json {
        let jobs: Vec<Value> = outcomes().map(outcome_json).collect();
        let fields = json!({ "jobs": jobs, "sessions": sessions });
        let json = result_json("backup", exit, fields);
        let now = context.output.result("", &json);
        printed = printed.and(now);
    }
    match printed {
        Ok(()) => Ok(exit),
        Err(failure) => Err(with_states(failure, exit, outcomes())),
    }
}

/// What a backup works on: one session for each container.
type Work<'c> = (Vec<Resolved>, Vec<ContainerWork<'c>>);

/// Checks the whole request before anything starts.
fn plan<'c>(context: &'c Context, args: &BackupArgs) -> Result<Work<'c>, Failure> {
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
        spec.scan = ScanRules {
            caches: args.exclude_caches,
            if_present: args.exclude_if_present.clone(),
            larger_than: args.exclude_larger_than,
        };
        spec.one_file_system = args.one_file_system;
        spec.allow_empty = args.allow_empty;
        return Ok(one(context, resolved, spec));
    }
    let words: Vec<_> = args
        .words
        .iter()
        .map(|word| word.to_string_lossy())
        .collect();
    let copies = context.config.copies_of_all(&words)?;
    if copies.is_empty() {
        let failure = context.config.placed(Failure::usage("no job to run"));
        return Err(failure.with_hint(
            "write a [job.NAME] into the config, or: sprat backup TARGET --name JOB SOURCE…",
        ));
    }
    let (mut resolved, mut groups) = (Vec::new(), Vec::new());
    // In the order of the config.
    for container in &context.config.containers {
        let here = copies
            .iter()
            .filter(|copy| copy.container.name == container.name);
        let copies: Vec<CopyWork<'c>> = here.map(|copy| CopyWork::of(*copy)).collect();
        if !copies.is_empty() {
            resolved.push(context.resolve_container(container)?);
            groups.push(ContainerWork {
                name: container.name.clone(),
                target: container.target.clone(),
                container: Some(container),
                copies,
            });
        }
    }
    Ok((resolved, groups))
}

/// The job of the command line alone.
fn one<'c>(context: &'c Context, resolved: Resolved, spec: SnapshotSpec) -> Work<'c> {
    let mut known = context.config.containers.iter();
    let copy = CopyWork {
        name: CopyName::new(spec.job.as_str(), &*resolved.name),
        shown: spec.job.to_string(),
        spec,
        job: None,
    };
    let group = ContainerWork {
        name: resolved.name.clone(),
        target: resolved.target.clone(),
        container: known.find(|container| container.target == resolved.target),
        copies: vec![copy],
    };
    (vec![resolved], vec![group])
}
