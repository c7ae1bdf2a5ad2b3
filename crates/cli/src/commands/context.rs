//! What every command starts with: environment, config, signals; and how a TARGET is opened.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use sprat_luks::Secret;
use sprat_run::config::{self, Config, Container, Mistake, Stops};
use sprat_run::notify::Words;
use sprat_run::schedule::Places;
use sprat_run::watch::{Now, Shown, Watch, Watched};
use sprat_session as session;
use sprat_session::address::Target;
use sprat_session::generations::{self, Wanted};
use sprat_session::interrupt::Interrupt;
use sprat_session::state::history::History;
use sprat_session::state::identity;
use sprat_session::state::paths::StatePaths;
use sprat_session::upload_rates::UploadRates;
use sprat_session::{
    Access, CONNECTIONS, ClosedReport, ContainerFacts, IdentityPolicy, Session, SessionSettings,
    SshOptions, text,
};
use sprat_snapshot::{SnapshotChoice, SnapshotPath, parse_moment};

use crate::args::{GlobalArgs, ReadTarget};
use crate::environment::Environment;
use crate::output::{Output, Reporter, result_json};
use crate::secrets::{KeyHint, SecretSource};
use crate::sheet_files::SheetFiles;
use crate::{Exit, Failure, terminal};

mod keys;

/// A command's arguments, and what the command does.
pub(crate) trait CommandArgs {
    /// It mounts the volume, and so must be run as root.
    const NEEDS_ROOT: bool = false;

    /// It notes itself what damage it finds.
    const NOTES_DAMAGE: bool = false;

    /// It only reads what is stored, perhaps after a disaster. A mistake in the config is a warning, if it
    /// does not concern the container that the command opens.
    const READS: bool = false;

    /// It does what it can with a config that has mistakes; other commands start nothing then.
    fn accepts_mistakes(&self) -> bool {
        false
    }

    /// The state that an interrupt leaves, if the command may be interrupted at any moment: it
    /// leaves nothing half done, and the first request to stop ends it at once.
    fn state_when_interrupted(&self) -> Option<&'static str> {
        None
    }

    /// Runs the command.
    fn run(&self, context: &Context) -> Result<Exit, Failure>;
}

/// One run of sprat.
#[derive(Debug)]
pub(crate) struct Context {
    pub global: GlobalArgs,
    pub environment: Environment,
    pub config: Config,
    /// The mistakes of the config, for a command that accepts them.
    pub mistakes: Vec<Mistake>,
    pub output: Output,
    pub interrupt: Interrupt,
    /// What may be wrong with the given key.
    key_hint: OnceLock<KeyHint>,
    /// A file system that a session read is marked as faulty.
    faulty: AtomicBool,
    /// The container that the command opens.
    opened: OnceLock<String>,
}

/// A TARGET, and what the config and the command line set for it.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// Its name in the config, else the file's name without `.luks`.
    pub name: String,
    /// Its name in the config; empty, if the config has no container at this location. Another one there may have
    /// [`Self::name`]: rules and events are never found by that, and no state is changed.
    pub config_name: String,
    pub target: Target,
    pub ssh: SshOptions,
    pub secret: SecretSource,
    /// The source without the command line: what this machine's backups use.
    pub own_secret: SecretSource,
    /// The key file that `init` creates if it is missing.
    pub default_key_file: Option<PathBuf>,
    pub allow_no_fsync: bool,
    /// Most connections to the server, the first included.
    pub connections: usize,
    /// How fast data may be sent to the server.
    pub upload_rates: UploadRates,
}

/// All that a session on a TARGET needs.
pub(crate) struct Prepared {
    pub resolved: Resolved,
    pub secret: Secret,
    pub options: SessionSettings,
}

impl Context {
    /// Creates the files that a recovery sheet goes to. `on_stdout`: it is printed, too.
    pub(super) fn sheet_files(
        &self,
        sheet: Option<&PathBuf>,
        page: Option<&PathBuf>,
        on_stdout: bool,
    ) -> Result<SheetFiles, Failure> {
        SheetFiles::create(self.output, &self.environment, sheet, page, on_stdout)
    }

    /// Reads the config, and handles signals from now on.
    pub(crate) fn begin(
        global: GlobalArgs,
        environment: Environment,
        output: Output,
        accepts_mistakes: bool,
    ) -> Result<Self, Failure> {
        // Keys will pass through this process: keep them out of swap, core dumps and debuggers if the
        // system allows it. If it doesn't, a backup without that is better than no backup.
        let _ = sprat_attach::hide_from_debuggers();
        let _ = sprat_attach::lock_memory();
        if let Some(typed) = &global.fingerprint {
            identity::check_form(typed)?;
        }
        let named = global.config.as_ref();
        let named = named.map(|path| environment.absolute(path));
        let places = environment.config_places();
        let (config, mistakes) = match accepts_mistakes {
            true => {
                let loaded = config::load(&config::files_of(named.as_deref(), &places), &places);
                (loaded.config, loaded.mistakes)
            }
            false => (Config::load(named.as_deref(), &places)?, Vec::new()),
        };
        let interrupt = Interrupt::listen(terminal::HOOKS)?;
        Ok(Self {
            global,
            environment,
            config,
            mistakes,
            output,
            interrupt,
            key_hint: OnceLock::new(),
            faulty: AtomicBool::new(false),
            opened: OnceLock::new(),
        })
    }

    /// The same run with other options, and with the config as it is on disk now.
    pub(crate) fn with(&self, global: GlobalArgs) -> Result<Self, Failure> {
        let environment = self.environment.clone();
        Ok(Self {
            config: Config::load(None, &environment.config_places())?,
            mistakes: Vec::new(),
            interrupt: self.interrupt.clone(),
            output: self.output,
            global,
            environment,
            key_hint: OnceLock::new(),
            faulty: AtomicBool::new(false),
            opened: OnceLock::new(),
        })
    }

    /// Resolves the name of a container in the config, or a location.
    pub(crate) fn resolve(&self, text: &str) -> Result<Resolved, Failure> {
        if Target::is_config_name(text) {
            let found = self.config.container(text);
            self.refuse_mistakes(|stops| match stops {
                Stops::Container(name) => name == text,
                Stops::File => found.is_err(),
                _ => false,
            })?;
            return self.resolve_container(found?);
        }
        let target = Target::parse(text, &self.environment.current_dir)?;
        // If the config has a container at this location, its entry applies.
        if let Some(known) = self
            .config
            .containers
            .iter()
            .find(|known| known.target == target)
        {
            return self.resolve_container(known);
        }
        let file = target.name.as_str();
        let name = file.strip_suffix(".luks").unwrap_or(file).to_owned();
        self.resolved(name, target, None)
    }

    /// Refuses those mistakes of the config that a command which reads does not accept.
    pub(crate) fn refuse_mistakes(&self, concerns: impl Fn(&Stops) -> bool) -> Result<(), Failure> {
        let mistakes = self.mistakes.iter().filter(|one| concerns(&one.stops));
        let mistakes: Vec<Mistake> = mistakes.cloned().collect();
        if mistakes.is_empty() {
            return Ok(());
        }
        Err(config::refusal(&mistakes).with_more_hint(
            "Or give the container's location instead of its name, and its key with --key-file",
        ))
    }

    /// Warns a command that reads of the mistakes in the config. A file that the command line names must
    /// be readable.
    pub(crate) fn accept_mistakes(&self) -> Result<(), Failure> {
        let named = self.global.config.is_some();
        self.refuse_mistakes(|stops| named && *stops == Stops::File)?;
        for mistake in &self.mistakes {
            self.output.warning(&mistake.to_string());
        }
        Ok(())
    }

    /// Resolves each of `targets`, or every container of the config if there are none.
    pub(crate) fn resolve_all(&self, targets: &[String]) -> Result<Vec<Resolved>, Failure> {
        if targets.is_empty() {
            let containers = self.config.containers.iter();
            return containers
                .map(|container| self.resolve_container(container))
                .collect();
        }
        targets.iter().map(|target| self.resolve(target)).collect()
    }

    /// As [`Self::resolve`], for a word that may not be UTF-8.
    pub(crate) fn resolve_os(&self, word: &OsStr) -> Result<Resolved, Failure> {
        match word.to_str() {
            Some(text) => self.resolve(text),
            None => Err(Failure::usage(format!(
                "the target {word:?} is not UTF-8 text"
            ))),
        }
    }

    /// As [`Self::resolve`], for a container of the config.
    pub(crate) fn resolve_container(&self, container: &Container) -> Result<Resolved, Failure> {
        self.resolved(
            container.name.clone(),
            container.target.clone(),
            Some(container),
        )
    }

    fn resolved(
        &self,
        name: String,
        target: Target,
        container: Option<&Container>,
    ) -> Result<Resolved, Failure> {
        let command = match &self.global.ssh_command {
            Some(text) => split(text, "--ssh-command")?,
            None => container
                .and_then(|container| container.ssh_command.clone())
                .or_else(|| self.config.ssh_command.clone())
                .unwrap_or_else(|| vec![OsString::from("ssh")]),
        };
        let default_key_file = self
            .environment
            .config_dir
            .as_ref()
            .map(|folder| folder.join("keys").join(format!("{name}.key")));
        let allowed = container.is_some_and(|container| container.allow_no_fsync);
        let own_secret = keys::own_source(container, default_key_file.as_deref());
        Ok(Resolved {
            secret: self.named_source()?.unwrap_or_else(|| own_secret.clone()),
            own_secret,
            allow_no_fsync: self.global.allow_no_fsync || allowed,
            connections: match self.global.connections {
                Some(connections) => connections.into(),
                None => container.map_or(CONNECTIONS, |container| container.connections),
            },
            upload_rates: match container.and_then(|container| container.upload_limit.as_ref()) {
                Some(limit) if target.ssh().is_some() => limit.rates(&self.config.time_zone),
                _ => UploadRates::default(),
            },
            config_name: container.map_or_else(String::new, |container| container.name.clone()),
            name,
            target,
            ssh: SshOptions {
                command,
                answer_timeout: self.environment.answer_timeout,
            },
            default_key_file,
        })
    }

    /// The exit code of a command that succeeded: [`Exit::Damaged`] if the file system is marked as faulty.
    pub(crate) fn exit(&self, exit: Exit) -> Exit {
        let is_damaged = exit == Exit::Done && self.faulty.load(Ordering::Relaxed);
        if is_damaged { Exit::Damaged } else { exit }
    }

    /// If the command found damage in a container of the config, opens its event and reports it.
    pub(crate) fn report_damage(&self, ended: &Result<Exit, Failure>) {
        let found = match ended {
            Err(failure) if failure.exit == Exit::Damaged => failure.clone(),
            Ok(Exit::Damaged) => {
                let what = match self.faulty.load(Ordering::Relaxed) {
                    true => "the file system in the container is marked as faulty",
                    false => "files in the container are damaged",
                };
                Failure::new(Exit::Damaged, what).with_hint("run `sprat check` for details")
            }
            _ => return,
        };
        let known = |name: &&String| self.config.containers.iter().any(|one| one.name == **name);
        let Some(name) = self.opened.get().filter(known) else {
            return;
        };
        let mut watch = Watch::new(self.watched(), self.environment.network());
        let now = Now::read(self.environment.trust_clock);
        let problems = watch.damage(name, &Words::of(&found), &now).problems;
        problems.iter().for_each(|one| self.output.warning(one));
    }

    /// Warns of a failure that stops nothing.
    pub(crate) fn warn(&self, failure: &Failure) {
        let Failure { what, causes, .. } = failure;
        self.output
            .warning(&format!("{what}: {}", causes.join("; ")));
    }

    /// How the session opens it, including what is pinned.
    pub(crate) fn session_options(
        &self,
        resolved: &Resolved,
        access: Access,
    ) -> Result<SessionSettings, Failure> {
        let global = &self.global;
        if global.ignore_lock && access == Access::ReadWrite {
            return Err(
                Failure::usage("--ignore-lock works only with commands that read").with_hint(
                    "nothing was started. If the other machine is gone, run `sprat unlock`",
                ),
            );
        }
        session::check_limits()?;
        let mut options = SessionSettings::new(
            resolved.target.clone(),
            access,
            self.state_dir(),
            self.environment.absolute(&global.runtime_dir),
        );
        let containers = self.config.containers.iter();
        options.containers = containers.map(|known| known.target.clone()).collect();
        options.mode = global.mode;
        options.ssh.clone_from(&resolved.ssh);
        options.allow_no_fsync = resolved.allow_no_fsync;
        options.ignore_lock = global.ignore_lock;
        options.accept_older_state = global.accept_older_state;
        options.accept_changed_keys = global.accept_changed_keys;
        options.reconnect_max = global.reconnect_max;
        options.quiet_time = global.quiet_time;
        if let Some(interval) = global.progress_interval {
            options.stats_interval = interval;
        }
        options.connections = resolved.connections;
        options.upload_rates = resolved.upload_rates.clone();
        options.write_buffer_bytes_max = global.write_buffer_bytes_max;
        options.reserve_bytes = global.reserve_bytes;
        options.space_interval = global.room_interval;
        options.cache_dir = self.environment.absolute(&global.cache_dir);
        options.cache_bytes_max = if global.no_cache {
            0
        } else {
            global.cache_bytes_max
        };
        options.pins = identity::policy(
            &options.state_dir,
            &resolved.target,
            global.fingerprint.as_deref(),
        )?;
        Ok(options)
    }

    /// Opens a container and pins it if it was not pinned.
    pub(crate) fn open(
        &self,
        resolved: &Resolved,
        secret: &Secret,
        options: SessionSettings,
        reporter: &mut Reporter,
    ) -> Result<Session, Failure> {
        let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
        let session = Session::open(options, secret, reporter, &self.interrupt)
            .map_err(|failure| self.explain(resolved, failure))?;
        self.remember(&state_dir, resolved, &policy, session.facts());
        Ok(session)
    }

    /// Explains why a container was not opened: it is mounted on this machine, or which key was tried.
    pub(crate) fn explain(&self, resolved: &Resolved, failure: Failure) -> Failure {
        let runtime_dir = self.environment.absolute(&self.global.runtime_dir);
        let failure = self.explain_key(resolved, failure);
        session::explain_lock(&runtime_dir, &resolved.target, failure)
    }

    /// Pins what was found, and warns of a faulty file system. A failure to pin it is only a warning: it
    /// is no reason to lose a backup.
    pub(crate) fn remember(
        &self,
        state_dir: &Path,
        resolved: &Resolved,
        policy: &IdentityPolicy,
        facts: &ContainerFacts,
    ) {
        if let Some(errors) = facts.file_system_errors {
            self.faulty.store(true, Ordering::Relaxed);
            self.output.warning(&format!(
                "the file system in {} is marked as faulty ({}). Files can be read. Don't write before \
                 it is repaired; run `sprat check` for details",
                resolved.target,
                text::counted(errors.into(), "error", "errors")
            ));
        }
        if let Err(failure) = identity::remember(state_dir, &resolved.target, policy, facts) {
            self.warn(&failure);
        }
    }
}

impl Context {
    /// Resolves a TARGET, fetches its key, and sets how the session opens it.
    pub(crate) fn prepare(&self, target: &str, access: Access) -> Result<Prepared, Failure> {
        self.prepare_resolved(self.resolve(target)?, access)
    }

    /// As [`Self::prepare`], for a command that only reads. It may read a past state.
    pub(crate) fn prepare_reading(&self, from: &ReadTarget) -> Result<Prepared, Failure> {
        let mut resolved = self.resolve(&from.target)?;
        let Some(text) = &from.generation else {
            return self.prepare_resolved(resolved, Access::ReadOnly);
        };
        let now = jiff::Timestamp::now();
        let refused = |what: String| Failure::usage(what).with_hint("nothing was started");
        let wanted = Wanted::parse(text, now, &self.config.zone())
            .map_err(|what| refused(format!("--generation {what}")))?;
        let state = generations::find(&resolved.target, &resolved.ssh, &wanted)?;
        let shown = text::harmless(generations::shown_name(&state));
        match generations::is_suspect(&state) {
            false => self.output.note(&format!("reading the past state {shown}")),
            true => self.output.warning(&format!(
                "the past state {shown} may be damaged: the container was changed without the agent after it"
            )),
        }
        let options = self.session_options(&resolved, Access::ReadOnly)?;
        let options = options.reading_past(&state);
        resolved.target = options.target.clone();
        Ok(Prepared {
            secret: self.secret(&resolved)?,
            resolved,
            options,
        })
    }

    /// As [`Self::prepare`], for a TARGET that is resolved.
    pub(crate) fn prepare_resolved(
        &self,
        resolved: Resolved,
        access: Access,
    ) -> Result<Prepared, Failure> {
        let _ = self.opened.set(resolved.config_name.clone());
        let secret = self.secret(&resolved)?;
        let options = self.session_options(&resolved, access)?;
        Ok(Prepared {
            resolved,
            secret,
            options,
        })
    }

    /// Runs a command that opens and closes its session itself, and pins the container.
    pub(crate) fn in_own_session<T>(
        &self,
        prepared: Prepared,
        facts: impl FnOnce(&T) -> &ContainerFacts,
        work: impl FnOnce(SessionSettings, &Secret, &mut Reporter) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Prepared {
            resolved,
            secret,
            options,
        } = prepared;
        let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
        let mut reporter = Reporter::new(self.output, "");
        let done = work(options, &secret, &mut reporter)
            .map_err(|failure| self.explain(&resolved, failure));
        reporter.clear();
        let done = done?;
        self.remember(&state_dir, &resolved, &policy, facts(&done));
        Ok(done)
    }

    /// Opens a session, works in it, and closes it. A failure to close counts more than one of the
    /// work, because it says which part of the work is durable.
    pub(crate) fn in_session<T>(
        &self,
        prepared: Prepared,
        reporter: &mut Reporter,
        work: impl FnOnce(&mut Session, &mut Reporter) -> Result<T, Failure>,
    ) -> Result<(T, ClosedReport), Failure> {
        let Prepared {
            resolved,
            secret,
            options,
        } = prepared;
        let is_past = options.is_past();
        let mut session = self.open(&resolved, &secret, options, reporter)?;
        drop(secret);
        let done = work(&mut session, reporter);
        let uuid = session.facts().uuid.clone();
        let closed = session.close(reporter, &self.interrupt);
        reporter.clear();
        if let Ok(closed) = &closed
            && !is_past
        {
            self.note_history(&uuid, &resolved.target, |history| {
                history.saw(closed.room);
            });
        }
        match (done, closed) {
            (Ok(done), Ok(closed)) => Ok((done, closed)),
            (Ok(_), Err(failure)) | (Err(failure), Ok(_)) => Err(failure),
            (Err(first), Err(last)) => Err(first.merge(last)),
        }
    }

    /// Prints the result of `command`: `text`, or `fields` with the target as JSON.
    pub(crate) fn finish(
        &self,
        command: &str,
        exit: Exit,
        target: &Target,
        text: &str,
        mut fields: Value,
    ) -> Result<Exit, Failure> {
        fields["target"] = target.to_string().into();
        self.output
            .result(text, &result_json(command, exit, fields))?;
        Ok(exit)
    }

    /// What `JOB[/SNAPSHOT][:PATH]` and `--at TIME` mean together.
    pub(crate) fn wanted(&self, what: &OsStr, at: Option<&str>) -> Result<SnapshotPath, Failure> {
        let mut wanted = SnapshotPath::parse(what).map_err(|what| {
            Failure::usage(what).with_hint(
                "nothing was started. Write JOB, JOB/SNAPSHOT, JOB:PATH or JOB/SNAPSHOT:PATH",
            )
        })?;
        if let Some(time) = at {
            if wanted.snapshot.is_some() {
                let what = "--at and the name of a snapshot can't be used together";
                let hint = "nothing was started. Name the job alone, or omit --at";
                return Err(Failure::usage(what).with_hint(hint));
            }
            wanted.snapshot = Some(self.snapshot_at(time)?);
        }
        Ok(wanted)
    }

    /// The snapshot that `--at TIME` means.
    fn snapshot_at(&self, time: &str) -> Result<SnapshotChoice, Failure> {
        self.moment(time, "--at").map(SnapshotChoice::At)
    }

    /// The time that the word behind `option` means.
    pub(crate) fn moment(&self, time: &str, option: &str) -> Result<jiff::Timestamp, Failure> {
        let now = jiff::Timestamp::now();
        let refused = |what: String| Failure::usage(what).with_hint("nothing was started");
        // The zone of the times that sprat shows.
        parse_moment(time, now, &self.config.zone())
            .map_err(|what| refused(format!("{option} {what}")))
    }

    /// What is watched on this machine.
    pub(crate) fn watched(&self) -> Watched<'_> {
        let host = rustix::system::uname();
        Watched {
            config: &self.config,
            mistakes: &self.mistakes,
            places: self.environment.config_places(),
            state_dir: self.state_dir(),
            host: host.nodename().to_string_lossy().into_owned(),
            machine_id: Places::of_this_machine().machine_id(),
        }
    }

    /// For times that are shown: now, in the zone of the config.
    pub(crate) fn shown(&self) -> Shown {
        Shown {
            now: jiff::Timestamp::now(),
            zone: self.config.zone(),
        }
    }

    /// The state folder.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.environment.absolute(&self.global.state_dir)
    }

    /// Notes for `sprat status` what a session saw. A failure is only a warning.
    pub(crate) fn note_history(
        &self,
        uuid: &str,
        target: &Target,
        change: impl FnOnce(&mut History),
    ) {
        let paths = StatePaths::new(&self.state_dir(), uuid, target);
        if let Err(error) = History::update(&paths, change) {
            self.output.warning(&format!(
                "this run can't be recorded for `sprat status`: {error}"
            ));
        }
    }
}

pub(super) fn split(text: &str, option: &str) -> Result<Vec<OsString>, Failure> {
    config::split_words(text).map_err(|what| Failure::usage(format!("{option}: {what}")))
}
