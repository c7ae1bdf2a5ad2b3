//! Answers the browser's questions through a session, which is closed while nobody asks.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sprat_inside::{AnalyzeSpec, CatSpec, ListSpec, SizeSpec, VersionsSpec};
use sprat_run::notice_text::notice_text;
use sprat_run::progress_text::{phase_text, progress_text};
use sprat_session::interrupt::Interrupt;
use sprat_session::{Exit, Failure, Notice, Observer, Phase, Session, SessionProgress, Stopper};
use sprat_store::IgnorePoison;

use crate::question::{Answer, At, Event, Question};

/// So much of a file is shown.
pub(crate) const PREVIEW_BYTES: u64 = 64 << 10;

/// How the questions ended.
pub(crate) enum Ended {
    /// Nobody asks any more.
    Done,
    Failed(Failure),
}

/// Stops what the session does at the moment; `None`: no session is open.
pub(crate) type Stop = Arc<Mutex<Option<Stopper>>>;

/// Answers questions on the thread that opened the session.
pub(crate) struct Answers<'a> {
    session: Option<Session>,
    open: &'a mut dyn FnMut(&mut dyn Observer) -> Result<Session, Failure>,
    reports: Reports,
    stop: Stop,
    interrupt: Interrupt,
    close_after: Duration,
    found_damage: bool,
}

impl<'a> Answers<'a> {
    pub(crate) fn new(
        session: Session,
        open: &'a mut dyn FnMut(&mut dyn Observer) -> Result<Session, Failure>,
        tell: Sender<Event>,
        stop: Stop,
        interrupt: Interrupt,
        close_after: Duration,
    ) -> Self {
        let mut answers = Self {
            session: None,
            open,
            reports: Reports {
                tell,
                phase: Phase::Working,
                kept: Vec::new(),
            },
            stop,
            interrupt,
            close_after,
            found_damage: false,
        };
        answers.set(Some(session));
        answers
    }

    /// Answers until nobody asks any more, or until the server is lost.
    pub(crate) fn serve(&mut self, questions: &Receiver<(u64, Question)>) -> Ended {
        let _over = Over(self.reports.tell.clone());
        loop {
            let (number, question) = match questions.recv_timeout(self.close_after) {
                Ok(asked) => asked,
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(failure) = self.end_session() {
                        self.reports.say(failure.in_one_line());
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Ended::Done,
            };
            let answered = self.answer_again(&question);
            if let Err(failure) = &answered {
                self.found_damage |= failure.exit == Exit::Damaged;
                if self.interrupt.requested() {
                    // The end of the browser is the reason.
                    return self.ended_by_user(failure);
                }
                if is_the_end(failure.exit) {
                    return Ended::Failed(failure.clone());
                }
            }
            // If the browser has just ended, the next question never comes.
            let _ = self.reports.tell.send(Event::Answer(number, answered));
        }
    }

    /// The user ended the browser while a question was open.
    fn ended_by_user(&mut self, failure: &Failure) -> Ended {
        let is_broken = self.session.as_ref().is_some_and(Session::has_ended);
        if !is_broken {
            return Ended::Done;
        }
        // Nothing is left to close.
        self.set(None);
        Ended::Failed(failure.clone())
    }

    /// Answers. A session through which this one reads may end: then the container is opened again.
    fn answer_again(&mut self, question: &Question) -> Result<Answer, Failure> {
        let first = self.answer(question);
        let is_gone = |failure: &Failure| failure.exit == Exit::Locked;
        let is_restore = matches!(question, Question::Restore(_));
        match first {
            Err(failure) if is_gone(&failure) && !is_restore && self.session.is_some() => {
                let _ = self.end_session();
                self.answer(question)
            }
            Err(failure) if self.session.as_ref().is_some_and(Session::has_ended) => {
                self.set(None);
                Err(failure)
            }
            answered => answered,
        }
    }

    fn answer(&mut self, question: &Question) -> Result<Answer, Failure> {
        if self.session.is_none() {
            let opened = (self.open)(&mut self.reports)?;
            self.set(Some(opened));
        }
        let Some(session) = &mut self.session else {
            return Err(Failure::failed("the container is closed"));
        };
        let (see, interrupt) = (&mut self.reports, &self.interrupt);
        Ok(match question {
            Question::Snapshots => Answer::Snapshots(session.snapshots(see, interrupt)?),
            Question::Folder(at) => {
                let spec = ListSpec {
                    place: at.place()?,
                    recursive: false,
                };
                Answer::Folder(Box::new(session.list_folder(spec, see, interrupt)?))
            }
            Question::Size(at) => {
                let spec = SizeSpec { place: at.place()? };
                Answer::Size(session.size(spec, see, interrupt)?)
            }
            Question::Versions(at) => {
                let spec = VersionsSpec { place: at.place()? };
                Answer::Versions(Box::new(session.versions(spec, see, interrupt)?))
            }
            Question::Preview(at) => Answer::Preview(beginning(session, at, see, interrupt)?),
            Question::Frees(removed) => {
                let named = removed.iter().map(|at| Ok((at.job_name()?, at.choice())));
                let removed: Vec<_> = named.collect::<Result<_, Failure>>()?;
                let spec = AnalyzeSpec {
                    kept: None,
                    job: removed.first().map(|(job, _)| job.clone()),
                    removed,
                    paths_max: 0,
                };
                Answer::Frees(Box::new(session.analyze(spec, see, interrupt)?))
            }
            Question::Restore(spec) => {
                let spec = (**spec).clone();
                Answer::Restored(Box::new(session.restore(spec, see, interrupt)?))
            }
        })
    }

    fn set(&mut self, session: Option<Session>) {
        let stopper = session.as_ref().and_then(|session| session.stopper().ok());
        *self.stop.lock().ignore_poison() = stopper;
        self.session = session;
    }

    /// Closes the session while the browser is shown.
    fn end_session(&mut self) -> Result<(), Failure> {
        let session = self.session.take();
        self.set(None);
        match session {
            Some(session) => session.close(&mut self.reports, &self.interrupt).map(drop),
            None => Ok(()),
        }
    }

    /// Closes the session, and passes the notices on.
    pub(crate) fn close(
        &mut self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        for notice in self.reports.kept.drain(..) {
            observer.notice(notice);
        }
        let session = self.session.take();
        self.set(None);
        match session {
            Some(session) => session.close(observer, interrupt).map(drop),
            None => Ok(()),
        }
    }

    /// [`Exit::Damaged`] if damage was found.
    pub(crate) fn exit(&self) -> Exit {
        match self.found_damage {
            true => Exit::Damaged,
            false => Exit::Done,
        }
    }
}

/// Ends the browser, also when this thread panics.
struct Over(Sender<Event>);

impl Drop for Over {
    fn drop(&mut self) {
        let _ = self.0.send(Event::Over);
    }
}

/// Whether nothing more can be read after such a failure.
fn is_the_end(exit: Exit) -> bool {
    matches!(exit, Exit::Unreachable | Exit::WrongKey | Exit::NoContainer)
}

/// Reads the beginning of a file.
fn beginning(
    session: &mut Session,
    at: &At,
    see: &mut Reports,
    interrupt: &Interrupt,
) -> Result<Vec<u8>, Failure> {
    let failed =
        |error: std::io::Error| Failure::failed("the file can't be read").caused_by(&error);
    let (from, to) = std::io::pipe().map_err(failed)?;
    let spec = CatSpec {
        place: at.place()?,
        bytes_max: Some(PREVIEW_BYTES),
    };
    let reader = std::thread::Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        let from = File::from(OwnedFd::from(from));
        from.take(PREVIEW_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let reader = reader.map_err(failed)?;
    session.cat(spec, OwnedFd::from(to), see, interrupt)?;
    let read = reader.join();
    read.unwrap_or_else(|_| Ok(Vec::new())).map_err(failed)
}

/// Reports to the browser what the session does.
struct Reports {
    tell: Sender<Event>,
    phase: Phase,
    /// What the user reads when the browser has ended.
    kept: Vec<Notice>,
}

impl Reports {
    fn say(&self, text: String) {
        // Without a browser nobody reads it.
        let _ = self.tell.send(Event::Notice(text));
    }
}

impl Observer for Reports {
    fn phase(&mut self, phase: Phase) {
        self.phase = phase;
        let text = match phase {
            Phase::Working => String::new(),
            phase => phase_text(phase).to_owned(),
        };
        let _ = self.tell.send(Event::Progress(text));
    }

    fn progress(&mut self, progress: &SessionProgress) {
        let is_worth = progress.rsync.is_some() || progress.volume.reconnecting_ms.is_some();
        let text = match is_worth {
            true => progress_text(phase_text(self.phase), progress),
            false => String::new(),
        };
        let _ = self.tell.send(Event::Progress(text));
    }

    fn notice(&mut self, notice: Notice) {
        self.say(notice_text(&notice).0);
        if !self.kept.contains(&notice) {
            self.kept.push(notice);
        }
    }
}
