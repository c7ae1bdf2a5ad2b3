//! Takes a snapshot of a job with what comes from no folder of this machine: the output of its command, and
//! the state of the system.

mod preview_text;
mod system_state;

use std::io::{self, PipeWriter};
use std::path::Path;

use sprat_session::interrupt::Interrupt;
use sprat_session::{Failure, Observer, Session, text};
use sprat_snapshot::{JobName, SnapshotReport, SnapshotSpec, StagedFile};

use crate::config::{Dump, Job};
use crate::hooks::Context;
use crate::hooks::pipeline::{self, Pipeline, PipelineReport};

pub use preview_text::{census_text, preview_text};

/// How much of what a command wrote to stderr is shown with its failure.
const LOG_LINES_SHOWN: usize = 5;

/// Takes a snapshot of `spec`, which [`Job::spec`] made of `job`. First runs the job's command and asks for
/// the system's state, and writes both to the volume. `job` is `None` for a job of the command line, which
/// has neither.
///
/// # Errors
/// A command failed, wrote nothing, took too long or was interrupted: then no snapshot is made, and nothing
/// of its output is kept. Otherwise as [`Session::take_snapshot`].
pub fn take_snapshot(
    session: &mut Session,
    job: Option<&Job>,
    mut spec: SnapshotSpec,
    context: &Context,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<SnapshotReport, Failure> {
    if let Some(job) = job.filter(|job| job.dump.is_some() || job.system_state) {
        let mut staging = Staging {
            session,
            job: &job.name,
            context,
            observer,
            interrupt,
            first: true,
        };
        match staging.stage_all(job) {
            Ok(files) => spec.staged = files,
            Err(failure) => {
                // The next run removes it at the latest.
                let _ = session.unstage(&job.name, observer, interrupt);
                return Err(failure);
            }
        }
    }
    session.take_snapshot(spec, observer, interrupt)
}

/// Writes files to the volume for the next snapshot of a job.
struct Staging<'a> {
    session: &'a mut Session,
    job: &'a JobName,
    context: &'a Context,
    observer: &'a mut dyn Observer,
    interrupt: &'a Interrupt,
    /// Nothing was staged yet.
    first: bool,
}

impl Staging<'_> {
    fn stage_all(&mut self, job: &Job) -> Result<Vec<StagedFile>, Failure> {
        let mut files = Vec::new();
        if let Some(dump) = &job.dump {
            files.push(self.stage_dump(dump, job.allow_empty)?);
        }
        if job.system_state {
            files.extend(self.stage_system_state()?);
        }
        Ok(files)
    }

    fn stage_dump(&mut self, dump: &Dump, allow_empty: bool) -> Result<StagedFile, Failure> {
        let pipeline = Pipeline {
            stages: dump.stages.clone(),
            timeout: dump.timeout,
            user: dump.user.clone(),
        };
        let (staged, report) = self.stage_output(&dump.path(), &pipeline)?;
        let log = text::harmless(&String::from_utf8_lossy(&report.log));
        let lines: Vec<&str> = log.lines().collect();
        tracing::info!(job = %self.job, log = ?lines, "the command ended");
        let bytes = report.end.map_err(|failure| {
            let last = lines.iter().rev().take(LOG_LINES_SHOWN).rev();
            last.fold(failure, |failure, line| failure.because((*line).to_owned()))
        })?;
        if bytes != staged.bytes {
            let what = "the output of the command is incomplete on the volume";
            return Err(Failure::failed(what).because(format!(
                "it wrote {bytes} bytes, and {} arrived",
                staged.bytes
            )));
        }
        if bytes == 0 && !allow_empty {
            return Err(Failure::failed("the command wrote nothing").with_hint(
                "the last snapshot stays. If the command may write nothing, set allow_empty = true",
            ));
        }
        Ok(staged)
    }

    /// Runs a pipeline, and writes its output to the volume. Whether that counts, the report says.
    fn stage_output(
        &mut self,
        path: &Path,
        pipeline: &Pipeline,
    ) -> Result<(StagedFile, PipelineReport), Failure> {
        let context = self.context;
        self.stage(path, |mut to, stop| {
            pipeline::run(pipeline, context, &mut to, stop)
        })
    }

    /// Writes to the volume what `produce` writes to a pipe, in a thread of its own: this one follows the
    /// session. When the session can't go on, `produce` is asked to stop.
    fn stage<T: Send>(
        &mut self,
        path: &Path,
        produce: impl FnOnce(PipeWriter, &Interrupt) -> T + Send,
    ) -> Result<(StagedFile, T), Failure> {
        let (content, to) =
            io::pipe().map_err(|error| Failure::failed("can't make a pipe").caused_by(&error))?;
        let stop = Interrupt::never()?;
        let first = std::mem::replace(&mut self.first, false);
        std::thread::scope(|scope| {
            let produced = scope.spawn(|| produce(to, &stop));
            let staged = self.session.stage_file(
                self.job,
                path,
                first,
                content.into(),
                self.observer,
                self.interrupt,
            );
            if staged.is_err() {
                stop.request();
            }
            let produced = produced
                .join()
                .map_err(|_| Failure::failed("internal error: the thread of a command panicked"));
            // The volume's failure is the cause of the command's.
            Ok((staged?, produced?))
        })
    }
}
