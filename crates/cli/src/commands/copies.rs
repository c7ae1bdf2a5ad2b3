//! What `sprat backup` and `sprat run` share: how the runner opens containers, and how results are printed.

use std::time::Instant;

use serde_json::json;
use sprat_luks::Secret;
use sprat_run::copy_name::CopyName;
use sprat_run::runner::{
    ContainerDone, End, Front, Outcome, Slice, closed_text, content_names, outcome_text,
    upkeep_text, warning_lines,
};
use sprat_session::check::Checked;
use sprat_session::drill::Drilled;
use sprat_session::interrupt::Interrupt;
use sprat_session::{Access, Observer, Session, TrimHow, TrimReport, Worthwhile, text};
use sprat_snapshot::CheckWhat;

use super::check::Wanted;
use super::context::{Context, Prepared, Resolved};
use super::drill::drill;
use super::trim::trim;
use crate::output::{Output, Reporter};
use crate::{Exit, Failure};

/// Opens containers for the runner.
pub(super) struct Containers<'c> {
    context: &'c Context,
    /// With its key, if that was fetched before.
    all: Vec<(Resolved, Option<Result<Secret, Failure>>)>,
    reporter: Reporter,
    begins: &'c mut dyn FnMut(&CopyName),
}

impl<'c> Containers<'c> {
    /// These containers. Their keys are fetched when each is opened.
    /// `begins` is called when an attempt begins.
    pub(super) fn new(
        context: &'c Context,
        output: Output,
        all: Vec<Resolved>,
        begins: &'c mut dyn FnMut(&CopyName),
    ) -> Self {
        Self {
            context,
            all: all.into_iter().map(|resolved| (resolved, None)).collect(),
            reporter: Reporter::new(output, ""),
            begins,
        }
    }

    /// Fetches every key: no user should wait at a terminal for hours.
    pub(super) fn fetch_keys(&mut self) -> Result<(), Failure> {
        for (resolved, secret) in &mut self.all {
            *secret = Some(self.context.secret(resolved));
            self.context.interrupt.check()?;
        }
        Ok(())
    }
}

impl Front for Containers<'_> {
    fn open(&mut self, container: &str) -> Result<Session, Failure> {
        let context = self.context;
        let found = self.all.iter_mut().find(|(one, _)| one.name == container);
        let (resolved, fetched) = found.ok_or_else(|| unknown(container))?;
        let secret = fetched.get_or_insert_with(|| context.secret(resolved));
        let secret = secret.as_ref().map_err(Clone::clone)?;
        self.reporter.about(format!("{container}: "));
        let options = context.session_options(resolved, Access::ReadWrite)?;
        let opened = context.open(resolved, secret, options, &mut self.reporter);
        // Only a lease that another session has is tried again.
        if !matches!(&opened, Err(failure) if failure.exit == Exit::Locked) {
            *fetched = None;
        }
        opened
    }

    fn begins(&mut self, copy: &CopyName) {
        (self.begins)(copy);
    }

    fn check_slice(
        &mut self,
        container: &str,
        slice: &Slice,
        interrupt: &Interrupt,
    ) -> Result<Checked, Failure> {
        let begun = Instant::now();
        let prepared = self.prepare(container, Access::ReadOnly)?;
        let wanted = Wanted {
            what: Some(CheckWhat::Everything),
            file_system: slice.file_system,
            duration_max: Some(slice.duration_max),
            bytes_max: Some(slice.bytes_max),
        };
        let checked = wanted.check(self.context, prepared, &mut self.reporter, interrupt, begun);
        self.reporter.clear();
        checked.map(|(checked, _)| checked)
    }

    fn drill(&mut self, container: &str, interrupt: &Interrupt) -> Result<Drilled, Failure> {
        let prepared = self.prepare(container, Access::ReadOnly)?;
        drill(self.context, prepared, None, interrupt)
    }

    fn trim(
        &mut self,
        container: &str,
        worthwhile: Worthwhile,
        interrupt: &Interrupt,
    ) -> Result<TrimReport, Failure> {
        let prepared = self.prepare(container, Access::ReadWrite)?;
        trim(
            self.context,
            prepared,
            TrimHow::PunchIf(worthwhile),
            interrupt,
        )
    }

    fn observer(&mut self, subject: &str) -> &mut dyn Observer {
        self.reporter.about(subject);
        &mut self.reporter
    }
}

impl Containers<'_> {
    /// For a session without a copy.
    fn prepare(&mut self, container: &str, access: Access) -> Result<Prepared, Failure> {
        self.reporter.about(format!("{container}: "));
        let mut known = self.all.iter();
        let found = known.find(|(one, _)| one.name == container);
        let (resolved, _) = found.ok_or_else(|| unknown(container))?;
        self.context.prepare_resolved(resolved.clone(), access)
    }
}

fn unknown(container: &str) -> Failure {
    Failure::failed(format!("internal error: no container {container}"))
}

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Printer {
    pub output: Output,
    /// Nothing is printed where all is well, nor each time that a server is away: for timers.
    pub silent: bool,
}

impl Printer {
    /// Prints the results of one container. All are tried; the first failure to print is returned.
    pub(super) fn report(self, done: &ContainerDone) -> Result<(), Failure> {
        let mut printed = Ok(());
        for outcome in &done.outcomes {
            printed = printed.and(self.outcome(outcome));
        }
        for failure in &done.upkeep.failures {
            self.output.failure(failure);
        }
        for failure in &done.failed_hooks {
            self.output.failure(failure);
        }
        let made = done.outcomes.iter().any(|outcome| outcome.end.is_made());
        if let (Some(closed), true) = (&done.closed, made) {
            printed = printed.and(self.result(&closed_text(closed)));
        }
        printed.and(self.result(&upkeep_text(&done.name, &done.upkeep)))
    }

    fn result(self, text: &str) -> Result<(), Failure> {
        match self.silent || self.output.json {
            true => Ok(()),
            false => self.output.result(text, &json!(null)),
        }
    }

    fn outcome(self, outcome: &Outcome) -> Result<(), Failure> {
        let shown = &outcome.shown;
        match &outcome.end {
            End::Failed(failure) => self.failure(outcome, failure),
            End::Skipped { why, .. } => {
                self.output.note(&format!("job {shown} was skipped: {why}"));
            }
            End::Made(report) => {
                for (text, matters) in warning_lines(shown, &report.record.warnings) {
                    match matters {
                        true => self.output.warning(&text),
                        false => self.output.note(&text),
                    }
                }
                for name in content_names(&report.record) {
                    self.output.note(&name);
                }
            }
        }
        for failure in outcome.failed_later() {
            let what = format!("job {shown}: a step after the copy failed");
            self.output.failure(&failure.clone().context(what));
        }
        for note in &outcome.notes {
            self.output.warning(note);
        }
        let End::Made(report) = &outcome.end else {
            return Ok(());
        };
        let mut line = outcome_text(shown, report, outcome.took);
        if let Some(removed) = outcome.pruned.filter(|removed| *removed > 0) {
            let snapshots = text::counted(removed as u64, "snapshot", "snapshots");
            line.push_str(&format!("{shown}: {snapshots} removed by the rules\n"));
        }
        self.result(&line)
    }

    fn failure(self, outcome: &Outcome, failure: &Failure) {
        let shown = &outcome.shown;
        if self.silent && matches!(failure.exit, Exit::Unreachable | Exit::Locked) {
            return;
        }
        let what = match failure.exit {
            Exit::Interrupted if outcome.started.is_none() => {
                format!("job {shown} was interrupted before it began")
            }
            Exit::Interrupted => format!("job {shown} was interrupted"),
            _ => format!("job {shown} failed"),
        };
        self.output.failure(&failure.clone().context(what));
    }
}
