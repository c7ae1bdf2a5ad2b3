//! `sprat setup`: from an SSH login to the first scheduled backup.
//!
//! Each step is checked first, and done only where it is missing. So the same command goes on after an
//! interruption, and a second run has nothing to do. What is there and differs is shown and left. The caller
//! asks, prints, makes the container and backs up: [`Host`].

mod answers;
mod host_key;
mod login;
mod notice;
mod place;
mod programs;
mod progress;
mod server;
mod sheet;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sprat_luks::RecoveryKey;
use sprat_session::address::Target;
use sprat_session::{Exit, Failure, SshOptions};
use sprat_snapshot::local_file;
use zeroize::Zeroizing;

use crate::config::{Config, ConfigPlaces, Words, default_files, load};
use crate::copy_name::CopyName;
use crate::notify::Network;
use crate::notify::channels::desktop_is_used;
use crate::recovery_sheet::SheetJob;
use crate::schedule::{self, Schedule};
use answers::{NewContainer, Plan, Report};
use place::Place;
use progress::Progress;

/// How often a question is asked again after an answer that can't be used.
const TRIES: usize = 3;

/// What the command line says. What it does not say is found out, or asked.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Where the backups go.
    pub target: Option<String>,
    /// `--name`.
    pub name: Option<String>,
    /// `--what`.
    pub what: Vec<String>,
    /// `--when`.
    pub when: Option<String>,
    /// `--notify`.
    pub notify: Option<String>,
    /// `--host-key`.
    pub host_key: Option<String>,
    /// `--ssh-key`, absolute.
    pub ssh_key: Option<PathBuf>,
    /// `--sheet`, absolute.
    pub sheet: Option<PathBuf>,
    /// Without `--no-schedule`.
    pub schedule: bool,
    /// Without `--no-first-run`.
    pub first_run: bool,
    /// `--yes`: ask nothing.
    pub yes: bool,
    /// `--ssh-command`.
    pub ssh_command: Option<Words>,
    /// `--allow-no-fsync`.
    pub allow_no_fsync: bool,
}

/// This machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The name of the host.
    pub host: String,
    /// Where the config is.
    pub places: ConfigPlaces,
    /// What relative paths start from.
    pub current_dir: PathBuf,
    /// The state folder.
    pub state_dir: PathBuf,
    /// How long a server may leave a request unanswered.
    pub answer_timeout: Option<Duration>,
    /// How the test notice leaves this machine.
    pub network: Network,
    /// sprat itself, for the schedule.
    pub program: PathBuf,
    /// What the schedule is installed in, or why there can be none.
    pub schedule: Result<schedule::Places, &'static str>,
}

/// A container that is to be made.
#[derive(Debug)]
pub struct ContainerWish<'w> {
    /// Where.
    pub target: &'w Target,
    /// How ssh is run.
    pub ssh_command: &'w [OsString],
    /// The file of the recovery sheet; `None`: the terminal.
    pub sheet: Option<&'w Path>,
    /// The jobs on the sheet.
    pub jobs: Vec<SheetJob>,
}

/// Asks, prints, and does what needs the rest of sprat.
pub trait Host {
    /// Shows what the next question is about.
    fn show(&mut self, text: &str);
    /// Asks a person, and returns the line without its end.
    fn ask(&mut self, prompt: &str) -> Result<String, Failure>;
    /// Asks for a secret.
    fn ask_secret(&mut self, prompt: &str) -> Result<Zeroizing<String>, Failure>;
    /// Reports a step that was done or found.
    fn note(&mut self, text: &str);
    /// Warns.
    fn warn(&mut self, text: &str);
    /// Fails after a request to stop.
    fn check_interrupt(&self) -> Result<(), Failure>;
    /// Makes the key file if it is missing, the container and the sheet, and returns the recovery key.
    fn make_container(&mut self, wish: ContainerWish<'_>) -> Result<RecoveryKey, Failure>;
    /// Makes a copy now, with the config as it is on disk. The result is the worst exit.
    fn back_up(&mut self, copy: &CopyName) -> Result<Exit, Failure>;
}

/// How setup ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// 0, or that of the first backup, or 1 if something is left to do.
    pub exit: Exit,
    /// The result, one line.
    pub text: String,
}

/// Does what is missing. The config must be without mistakes.
///
/// # Errors
/// The first step that fails; those before it are done. A test notice that is not delivered and a schedule that
/// can't be installed stop nothing: they are warned of, and the exit is 1.
pub fn run(request: &Request, machine: &Machine, host: &mut dyn Host) -> Result<Outcome, Failure> {
    let config = load_config(machine, None)?;
    let setup = Setup {
        request,
        machine,
        host,
        config,
        did_something: false,
        is_unfinished: false,
    };
    setup.run()
}

/// The config on disk, together with a file that is not in its place yet.
fn load_config(machine: &Machine, more: Option<&Path>) -> Result<Config, Failure> {
    let mut files = default_files(&machine.places);
    files.extend(more.map(Path::to_owned));
    load(&files, &machine.places).without_mistakes()
}

struct Setup<'s> {
    request: &'s Request,
    machine: &'s Machine,
    host: &'s mut dyn Host,
    config: Config,
    did_something: bool,
    is_unfinished: bool,
}

impl Setup<'_> {
    fn run(mut self) -> Result<Outcome, Failure> {
        // What the command line can't mean, before anything is asked or started.
        let when = answers::when(self.request.when.as_deref())?;
        let report = self
            .request
            .notify
            .as_deref()
            .map(answers::report)
            .transpose()?;
        let what = match self.request.what.as_slice() {
            [] => None,
            words => Some(answers::what(words, &self.machine.current_dir)?),
        };
        let place = self.place()?;
        self.refuse_unanswered(&place, report.as_ref())?;
        programs::check(place.target.ssh().is_some())?;
        let reached = self.reach(&place)?;
        self.host.check_interrupt()?;
        let plan = self.plan(&place, &reached, (what, when, report))?;
        let mut progress = Progress::of(&self.machine.state_dir, &place.name).map_err(|error| {
            let folder = self.machine.state_dir.display();
            Failure::failed(format!("can't write to the state folder {folder}")).caused_by(&error)
        })?;
        progress.note(|notes| notes.target = Some(place.target.to_string()));
        self.container(&place, &plan, reached, &mut progress)?;
        self.write_config(&plan, &mut progress)?;
        self.test_notice(&mut progress)?;
        self.install_schedule();
        let copies: Vec<CopyName> = self.config.copies().map(|copy| copy.name()).collect();
        let mut own = copies
            .into_iter()
            .filter(|copy| copy.container == place.name);
        let first = match own.next() {
            Some(copy) => self.first_run(&place, &copy, &mut progress)?,
            None => Exit::Done,
        };
        Ok(self.outcome(&place, first))
    }

    fn outcome(&self, place: &Place, first: Exit) -> Outcome {
        let exit = match (first, self.is_unfinished) {
            (Exit::Done, true) => Exit::Failed,
            (first, _) => first,
        };
        let name = &place.name;
        let text = match (self.is_unfinished, self.did_something) {
            (true, _) => format!(
                "{name} is set up, except for the warnings above. Correct what they name, and run \
                 the same command again\n"
            ),
            (false, false) => format!("nothing to do: {name} is set up\n"),
            (false, true) => format!("{name} is set up. `sprat status {name}` shows its state\n"),
        };
        Outcome { exit, text }
    }

    fn done(&mut self, text: &str) {
        self.did_something = true;
        self.host.note(text);
    }

    /// Asks until `read` accepts the answer. An empty one means the default.
    fn ask<T>(
        &mut self,
        prompt: &str,
        default: Option<&str>,
        read: impl Fn(&str) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut tries = 1;
        loop {
            let typed = self.host.ask(prompt)?;
            let answer = match (typed.trim(), default) {
                ("", Some(default)) => default,
                (typed, _) => typed,
            };
            match read(answer) {
                Ok(answer) => return Ok(answer),
                Err(failure) if tries == TRIES => return Err(failure),
                Err(failure) => {
                    let hint = failure.hint.clone().unwrap_or_default();
                    self.host
                        .show(&format!("{}. {hint}", failure.in_one_line()));
                }
            }
            tries += 1;
        }
    }

    fn place(&mut self) -> Result<Place, Failure> {
        let (request, machine) = (self.request, self.machine);
        let read = |config: &Config, text: &str| {
            let name = request.name.as_deref();
            place::find(text, name, &machine.host, config, &machine.current_dir)
        };
        // The same command goes on: it asks for nothing that it knows.
        let wanted = place::wanted_name(request.name.as_deref(), &machine.host);
        let is_known = self.config.containers.iter().any(|one| one.name == wanted);
        let noted = || Progress::peek(&machine.state_dir, &wanted).target;
        let known = is_known.then(|| wanted.clone());
        let given = request.target.clone();
        if let Some(text) = given.or(known).or_else(noted) {
            return read(&self.config, &text);
        }
        if request.yes {
            return Err(Failure::usage("--yes needs a TARGET")
                .with_hint("nothing was changed. Give user@host, user@host:folder, or a folder"));
        }
        let mut tries = 1;
        loop {
            let typed = self
                .host
                .ask("Where shall the backups go? (user@host, user@host:folder, or a folder) ")?;
            match read(&self.config, typed.trim()) {
                Err(failure) if tries < TRIES => {
                    let hint = failure.hint.clone().unwrap_or_default();
                    self.host
                        .show(&format!("{}. {hint}", failure.in_one_line()));
                    tries += 1;
                }
                answer => return answer,
            }
        }
    }

    /// With `--yes`, what has no default must be given.
    fn refuse_unanswered(&self, place: &Place, report: Option<&Report>) -> Result<(), Failure> {
        if !self.request.yes {
            return Ok(());
        }
        let lacks = if !place.configured && self.request.sheet.is_none() {
            "--sheet FILE: the recovery sheet must go to a file"
        } else if report.is_none() && !self.has_notify() && !desktop_is_used() {
            "--notify mail:ADDRESS, ntfy:URL or none: there is no desktop to report problems on"
        } else {
            return Ok(());
        };
        let (option, why) = lacks.split_once(": ").unwrap_or((lacks, ""));
        Err(Failure::usage(format!("--yes needs {option}"))
            .because(why.to_owned())
            .with_hint("nothing was changed"))
    }

    /// The config says where problems are reported, be it nowhere.
    fn has_notify(&self) -> bool {
        let mut settings = self.config.notify.settings.iter();
        settings.any(|setting| setting.origin.is_some())
    }

    /// Asks for what the config does not say.
    fn plan(
        &mut self,
        place: &Place,
        reached: &server::Reached,
        given: (Option<answers::What>, String, Option<Report>),
    ) -> Result<Plan, Failure> {
        let (what, when, report) = given;
        let container = (!place.configured).then(|| NewContainer {
            target: place.target.clone(),
            ssh_command: reached.ssh_command.clone(),
            allow_no_fsync: self.request.allow_no_fsync && !reached.survey.durable,
            one_connection: reached.one_connection,
        });
        let job = match self.config.jobs.iter().find(|job| job.is_in(&place.name)) {
            Some(job) => {
                if let Some(what) = what
                    && what.sources != job.local_sources()
                {
                    let (name, shown) = (job.name.clone(), what.shown());
                    self.host.warn(&format!(
                        "job {name} is in the config with other sources than {shown}; it was left as it is"
                    ));
                }
                None
            }
            None => {
                let current_dir = self.machine.current_dir.clone();
                let what = match (what, self.request.yes) {
                    (Some(what), _) => what,
                    (None, true) => answers::what(&["home".to_owned()], &current_dir)?,
                    (None, false) => {
                        let prompt = "What shall be backed up? (1: the home folders and /etc, 2: the whole \
                                      system, or folders) [1] ";
                        self.ask(prompt, Some("1"), |typed| {
                            let words = shlex::split(typed).unwrap_or_default();
                            answers::what(&words, &current_dir)
                        })?
                    }
                };
                let name = answers::free_job_name(&self.config, what.job, &place.name);
                Some((name, what, when))
            }
        };
        let report = match (self.has_notify(), report, self.request.yes) {
            (true, given, _) => {
                if given.is_some_and(|given| !answers::is_in(&given, &self.config.notify)) {
                    self.host
                        .warn("[notify] is in the config already; it was left as it is");
                }
                None
            }
            (false, Some(report), _) => Some(report),
            (false, None, true) => Some(Report::Desktop),
            (false, None, false) => Some(self.ask_for_report()?),
        };
        Ok(Plan {
            name: place.name.clone(),
            container,
            job,
            report,
        })
    }

    fn ask_for_report(&mut self) -> Result<Report, Failure> {
        let (default, shown) = match desktop_is_used() {
            true => (Some("desktop"), " [desktop]"),
            false => (None, ""),
        };
        let prompt = format!(
            "Where shall problems be reported? (a mail address, the URL of an ntfy topic, desktop, none){shown} "
        );
        self.ask(&prompt, default, answers::report)
    }

    /// Checks what would be written before anything is made that counts.
    fn check_plan(&self, plan: &Plan) -> Result<(), Failure> {
        if plan.is_nothing() {
            return Ok(());
        }
        let file = self.config_file(&plan.name);
        if file.symlink_metadata().is_ok() {
            return Err(is_in_the_way(&file, plan));
        }
        // Only root may write there, as the config demands.
        let folder = self.machine.state_dir.join("setup");
        let planned = tempfile::Builder::new().suffix(".toml").tempfile_in(folder);
        let planned = planned.and_then(|mut out| {
            out.write_all(plan.text().as_bytes())?;
            Ok(out)
        });
        let planned = planned
            .map_err(|error| Failure::failed("can't write a temporary file").caused_by(&error))?;
        load_config(self.machine, Some(planned.path())).map(drop)
    }

    fn write_config(&mut self, plan: &Plan, progress: &mut Progress) -> Result<(), Failure> {
        if plan.is_nothing() {
            return Ok(());
        }
        // A file with a mistake would stop this command and all others from now on.
        self.check_plan(plan)?;
        let file = self.config_file(&plan.name);
        let tests = !matches!(plan.report, None | Some(Report::Nobody));
        progress.note(|notes| notes.untested |= tests);
        let cannot = |error: &std::io::Error| {
            Failure::failed(format!("can't write {}", file.display())).caused_by(error)
        };
        if let Some(folder) = file.parent() {
            local_file::make_private_folder(folder).map_err(|error| cannot(&error))?;
        }
        match local_file::create(&file, |out| out.write_all(plan.text().as_bytes())) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(is_in_the_way(&file, plan));
            }
            Err(error) => return Err(cannot(&error)),
        }
        self.config = load_config(self.machine, None)?;
        self.done(&format!("config: wrote {}", file.display()));
        Ok(())
    }

    fn config_file(&self, name: &str) -> PathBuf {
        let folder = self.machine.places.folder.clone().unwrap_or_default();
        folder.join("conf.d").join(format!("setup-{name}.toml"))
    }

    fn install_schedule(&mut self) {
        if !self.request.schedule {
            return;
        }
        let places = match &self.machine.schedule {
            Ok(places) => places,
            Err(why) => {
                self.host.warn(&format!("no schedule was installed: {why}"));
                return;
            }
        };
        match Schedule::new(places.clone()).install(&self.machine.program) {
            Ok(changes) if changes.is_nothing() => {}
            Ok(_) => self.done("schedule: `sprat run` is started every 15 minutes"),
            Err(failure) => self.fails(&failure.context("no schedule was installed")),
        }
    }

    fn fails(&mut self, failure: &Failure) {
        self.is_unfinished = true;
        let hint = failure.hint.iter().map(|hint| format!(". {hint}"));
        let hint: String = hint.collect();
        self.host.warn(&format!("{}{hint}", failure.in_one_line()));
    }

    fn first_run(
        &mut self,
        place: &Place,
        copy: &CopyName,
        progress: &mut Progress,
    ) -> Result<Exit, Failure> {
        if sheet::has_snapshot(&self.machine.state_dir, &place.target, &copy.job) {
            return Ok(Exit::Done);
        }
        let wanted = match progress.read().first_run {
            _ if !self.request.first_run => false,
            Some(wanted) => wanted,
            None if self.request.yes => true,
            None => self.ask(
                "Make the first backup now? (yes or no) [yes] ",
                Some("yes"),
                yes_or_no,
            )?,
        };
        progress.note(|notes| notes.first_run = Some(wanted));
        if !wanted {
            return Ok(Exit::Done);
        }
        self.done(&format!("first backup: {copy}"));
        self.host.back_up(copy)
    }

    fn ssh_options(&self, command: Words) -> SshOptions {
        SshOptions {
            command,
            answer_timeout: self.machine.answer_timeout,
        }
    }
}

fn is_in_the_way(file: &Path, plan: &Plan) -> Failure {
    let lacks = plan.text().lines().skip(2).collect::<Vec<_>>().join("\n");
    Failure::failed(format!(
        "{} is there, and setup never changes it",
        file.display()
    ))
    .because(format!("it lacks: {lacks}"))
    .with_hint(
        "nothing in it was changed. Add that to it, or move it away and run the same command again",
    )
}

fn yes_or_no(text: &str) -> Result<bool, Failure> {
    match text {
        "yes" | "y" => Ok(true),
        "no" | "n" => Ok(false),
        other => Err(Failure::usage(format!("{other:?} is neither yes nor no"))),
    }
}

#[cfg(test)]
mod tests;
