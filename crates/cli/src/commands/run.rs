//! `sprat run`: makes the copies of the config that are due.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde_json::json;
use sprat_run::config::{Copy, Mistake, Named};
use sprat_run::copy_name::CopyName;
use sprat_run::hooks::refuse_inside_hook;
use sprat_run::notify::By;
use sprat_run::run_lock::RunLock;
use sprat_run::run_loop::Calls;
use sprat_run::runner::{
    Plan, RunReport, Runner, attempts, drills_json, hooks_of_containers, plan_table, slices_json,
    sources_json, with_states,
};
use sprat_run::schedule::Places;
use sprat_run::timer::Minute;
use sprat_run::watch::{Ended, Now, Watch, event_json};
use sprat_session::text;

use super::context::{CommandArgs, Context};
use super::copies::{Containers, Printer};
use crate::output::{Output, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat run
  sprat run home@nas --now
  sprat run --dry-run";

pub(super) const NOTES: &str = "\
A copy is one job in one container. sprat run makes each copy that is due, if its conditions are
met. It runs the hooks of the copy, and prunes it by the rules of its job. `sprat schedule install`
installs a timer that calls it.

Exit codes: 0 done, or nothing was due; 3 some source files unread; others in `sprat --help`.";

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Only these: a container, a job (JOB) or a copy (JOB@CONTAINER) [default: all]
    #[arg(value_name = "COPY")]
    copies: Vec<String>,
    /// For timers: print nothing if all is well, and end at once if another run is active
    #[arg(long, conflicts_with_all = ["dry_run", "lock_wait"])]
    scheduled: bool,
    /// Make the copies now, even if they are not due or a condition is not met
    #[arg(long)]
    now: bool,
    /// Only show which copies are due, why, and when the next one is due
    #[arg(long)]
    dry_run: bool,
    /// Make what is due every 15 minutes, and check each hour for overdue copies, until a signal ends it: for
    /// containers without systemd and cron
    #[arg(long = "loop", conflicts_with_all = ["scheduled", "now", "dry_run", "lock_wait"])]
    repeat: bool,
    /// Wait up to TIME for another run, such as 90s, 10m, 2h
    #[arg(long, value_name = "TIME", value_parser = wait, conflicts_with = "dry_run")]
    lock_wait: Option<Duration>,
}

fn wait(text: &str) -> Result<Duration, String> {
    text::parse_time(text, "smhd")
}

impl CommandArgs for RunArgs {
    const NEEDS_ROOT: bool = true;
    // The events of copies, checks and drills say what was found.
    const NOTES_DAMAGE: bool = true;

    fn accepts_mistakes(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        refuse_inside_hook(context.environment.run_variable.as_deref())?;
        if self.repeat {
            return self.calls(context)?.repeat(&context.interrupt);
        }
        let copies = self.wanted(context)?;
        let runtime_dir = context.environment.absolute(&context.global.runtime_dir);
        let mut runner = Runner::new(
            &context.config,
            context.state_dir(),
            runtime_dir.clone(),
            &context.interrupt,
            By::Run,
        );
        runner.anyway = self.now;
        if self.dry_run {
            let plan = runner.plan(&copies, Timestamp::now());
            return self.show(context, &runner, &plan);
        }
        let wait = self.lock_wait.unwrap_or_default();
        let lock = RunLock::acquire(&runtime_dir, wait, &context.interrupt)?;
        let Some(_lock) = lock else {
            return match self.scheduled {
                true => Ok(Exit::Done),
                false => Err(RunLock::already_running(&runtime_dir)),
            };
        };
        let now = Now::read(context.environment.trust_clock);
        runner.begin(&now.moment, now.synchronised, now.trusted);
        self.make(context, &runner, &copies)
    }
}

impl RunArgs {
    /// What `--loop` calls.
    fn calls(&self, context: &Context) -> Result<Calls, Failure> {
        let (global, environment) = (&context.global, &context.environment);
        let program = std::env::current_exe().map_err(|error| {
            Failure::failed("the path of the running sprat can't be found").caused_by(&error)
        })?;
        let run = std::env::args_os()
            .skip(1)
            .map(|word| match word == "--loop" {
                true => "--scheduled".into(),
                false => word,
            });
        // As the units of systemd call it.
        let quiet = (!global.quiet && !global.verbose).then(|| "--quiet".into());
        let run = run.chain(quiet);
        let mut alert: Vec<OsString> = ["status", "--alert", "--offline"].map(Into::into).into();
        let folders = [
            ("--state-dir", Some(&global.state_dir)),
            ("--runtime-dir", Some(&global.runtime_dir)),
            ("--config", global.config.as_ref()),
        ];
        for (option, path) in folders {
            if let Some(path) = path {
                alert.extend([option.into(), environment.absolute(path).into()]);
            }
        }
        Ok(Calls {
            program,
            run: run.collect(),
            alert,
            minute: Minute::of(&Places::of_this_machine().machine_id()),
        })
    }

    /// The copies that the run is about. A mistake in the config stops only what it concerns.
    fn wanted<'c>(&self, context: &'c Context) -> Result<Vec<Copy<'c>>, Failure> {
        let (config, mistakes) = (&context.config, &context.mistakes);
        let mut copies: Vec<Copy<'c>> = Vec::new();
        for word in &self.copies {
            let named = match config.named(word)? {
                Some(Named::Copies(copies)) => copies,
                Some(Named::Container(container)) => {
                    let all = config.copies();
                    all.filter(|copy| copy.container.name == container.name)
                        .collect()
                }
                None => return Err(Failure::usage(format!("the config has no copy {word:?}"))),
            };
            for copy in named {
                if !copies.iter().any(|known| known.name() == copy.name()) {
                    copies.push(copy);
                }
            }
        }
        if self.copies.is_empty() {
            copies = config.copies().collect();
        }
        if copies.is_empty() && mistakes.is_empty() {
            let failure = config.placed(Failure::usage("no job to run"));
            return Err(failure.with_hint(
                "write a [job.NAME] with `container` and `sources` into \
                                          the config",
            ));
        }
        Ok(copies)
    }

    fn show(
        &self,
        context: &Context,
        runner: &Runner<'_>,
        plan: &Plan<'_>,
    ) -> Result<Exit, Failure> {
        warn_of(&context.mistakes, context.output);
        let report = RunReport { plan, done: None };
        let exit = exit_of(&context.mistakes);
        let fields = json!({
            "dry_run": true,
            "copies": runner.copies_json(&report, Timestamp::now()),
            "checks": plan.checks_json(),
            "drills": plan.drills_json(),
            "sources": [],
            "events": [],
        });
        let text = plan_table(plan, &runner.config.zone());
        context
            .output
            .listing(&text, &result_json("run", exit, fields))?;
        Ok(exit)
    }

    /// Makes the copies that are due.
    fn make<'c>(
        &self,
        context: &'c Context,
        runner: &Runner<'c>,
        copies: &[Copy<'c>],
    ) -> Result<Exit, Failure> {
        let mut output = context.output;
        output.quiet |= self.scheduled;
        let printer = Printer {
            output,
            silent: output.quiet,
        };
        let mut failed_owed = runner.pay_all_owed_hooks();
        if context.mistakes.is_empty() {
            failed_owed.extend(runner.report_unknown_hooks());
        }
        for failure in &failed_owed {
            output.failure(&failure.failure);
        }
        let plan = runner.plan(copies, Timestamp::now());
        let resolved = context.config.containers.iter();
        let resolved = resolved.map(|container| context.resolve_container(container));
        let resolved = resolved.collect::<Result<Vec<_>, _>>()?;
        let mut watch = Watch::new(context.watched(), context.environment.network());
        // A timer reports a mistake once.
        if !self.scheduled || watch.are_new_mistakes() {
            warn_of(&context.mistakes, output);
        }
        let mut begins = |copy: &CopyName| watch.begins(copy, &runner.run, Timestamp::now());
        let mut containers = Containers::new(context, output, resolved, &mut begins);
        // If the results can't be printed, the copies of the next container are still made.
        let mut printed = Ok(());
        let done = runner.carry_out(&plan, &context.mistakes, &mut containers, &mut |done| {
            let now = printer.report(done);
            printed = std::mem::replace(&mut printed, Ok(())).and(now);
        });
        let ended = watch.ended(
            &Ended {
                run: &runner.run,
                attempts: &attempts(done.outcomes(), By::Run),
                container_hooks: &hooks_of_containers(&done.containers),
                owed: &failed_owed,
            },
            &Now::read(context.environment.trust_clock),
        );
        for problem in &ended.problems {
            output.warning(problem);
        }
        if let Some(warning) = runner.take_clock_warning() {
            output.warning(&warning);
        }
        let problems = runner.take_problems();
        for problem in &problems {
            output.warning(problem);
        }
        let failed = problems.len() + failed_owed.len();
        let failed = (failed > 0).then_some(Exit::Failed);
        let exit = Exit::worst([done.exit, ended.exit].into_iter().chain(failed));
        let report = RunReport {
            plan: &plan,
            done: Some(&done),
        };
        if output.json {
            let fields = json!({
                "dry_run": false,
                "copies": runner.copies_json(&report, Timestamp::now()),
                "checks": slices_json(&done.containers),
                "drills": drills_json(&done.containers),
                "sources": sources_json(&done.containers),
                "events": ended.open.iter().map(event_json).collect::<Vec<_>>(),
            });
            printed = printed.and(output.result("", &result_json("run", exit, fields)));
        } else if plan.is_empty() && !printer.silent {
            let text = format!(
                "nothing to do now\n{}",
                plan_table(&plan, &runner.config.zone())
            );
            printed = printed.and(output.result(&text, &json!(null)));
        }
        match printed {
            Ok(()) => Ok(exit),
            Err(failure) => Err(with_states(failure, exit, done.outcomes())),
        }
    }
}

fn warn_of(mistakes: &[Mistake], output: Output) {
    for mistake in mistakes {
        output.warning(&mistake.to_string());
    }
}

fn exit_of(mistakes: &[Mistake]) -> Exit {
    match mistakes.is_empty() {
        true => Exit::Done,
        false => Exit::Usage,
    }
}
