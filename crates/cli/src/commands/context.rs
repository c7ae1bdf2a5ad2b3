//! What every command begins with: surroundings, config, signals; and how a TARGET is opened.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_luks::Secret;
use sprat_session as session;
use sprat_session::address::{Target, TargetError};
use sprat_session::interrupt::Interrupt;
use sprat_session::state::history::History;
use sprat_session::state::paths::StatePaths;
use sprat_session::state::{identity, moved};
use sprat_session::{Access, Session, SessionOptions, connect, text};
use sprat_store::StoreErrorKind;

use crate::args::GlobalArgs;
use crate::config::{self, Config, Container};
use crate::environment::Environment;
use crate::output::{Output, Reporter};
use crate::secrets::{Doubt, SecretSource};
use crate::{Exit, Failure, terminal};

/// One run of sprat.
#[derive(Debug)]
pub(crate) struct Context {
    pub global: GlobalArgs,
    pub environment: Environment,
    pub config: Config,
    pub output: Output,
    pub interrupt: Interrupt,
    /// What may be wrong with what was given to open a container.
    doubt: OnceLock<Doubt>,
    /// A file system that a session read is marked as faulty.
    faulty: AtomicBool,
}

/// A TARGET with all that belongs to it.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// Its name in the config, else the file's name without `.luks`.
    pub name: String,
    pub target: Target,
    pub ssh_command: Vec<OsString>,
    pub secret: SecretSource,
    /// The same where the command line names none: what this machine's backups open it with.
    pub own_secret: SecretSource,
    /// The key file that `init` makes where it is missing.
    pub default_key_file: Option<PathBuf>,
    pub insist_without_fsync: bool,
}

impl Context {
    /// Reads surroundings and config, and takes over the signals.
    pub(crate) fn begin(
        global: GlobalArgs,
        environment: Environment,
        output: Output,
    ) -> Result<Self, Failure> {
        // Keys will pass through this process: not into swap, core dumps or a debugger, where the
        // system lets us. Where it doesn't, a backup is still better than none.
        let _ = sprat_attach::hide_from_debuggers();
        let _ = sprat_attach::lock_memory();
        if let Some(typed) = &global.fingerprint {
            identity::check_form(typed)?;
        }
        let config = Config::load(global.config.as_deref(), &environment)?;
        let interrupt = Interrupt::listen(terminal::HOOKS)?;
        Ok(Self {
            global,
            environment,
            config,
            output,
            interrupt,
            doubt: OnceLock::new(),
            faulty: AtomicBool::new(false),
        })
    }

    /// Finds what `text` names: a container of the config, or a place.
    pub(crate) fn resolve(&self, text: &str) -> Result<Resolved, Failure> {
        if Target::is_config_name(text) {
            return self.resolve_container(self.config.container(text)?);
        }
        let target = Target::parse(text, &self.environment.current_dir).map_err(|error| {
            let hint = match &error {
                TargetError::LoginOnly(text) => {
                    let (login, path) = text.split_once('/').unwrap_or((text, "PATH/x.luks"));
                    format!("did you mean {login}:{path}? A local file of that name is ./{text}")
                }
                _ => "a TARGET is a container's name in the config, \
                      ssh://user@host[:port]/path/x.luks, host:path/x.luks or a local path"
                    .to_owned(),
            };
            Failure::usage(error.to_string()).with_hint(hint)
        })?;
        // The same container may be in the config under a name; then that entry counts.
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

    /// As [`Self::resolve`], for a word that may be no text.
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
        let ssh_command = match &self.global.ssh_command {
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
        let insisted = container.is_some_and(|container| container.insist_without_fsync);
        let own_secret = own_source(container, default_key_file.as_deref());
        Ok(Resolved {
            secret: self.named_source()?.unwrap_or_else(|| own_secret.clone()),
            own_secret,
            insist_without_fsync: self.global.insist_without_fsync || insisted,
            name,
            target,
            ssh_command,
            default_key_file,
        })
    }

    /// What the command line names, if it does.
    pub(crate) fn named_source(&self) -> Result<Option<SecretSource>, Failure> {
        let global = &self.global;
        if let Some(path) = &global.key_file {
            return Ok(Some(SecretSource::KeyFile(self.environment.absolute(path))));
        }
        if let Some(path) = &global.passphrase_file {
            let path = self.environment.absolute(path);
            return Ok(Some(SecretSource::PassphraseFile(path)));
        }
        let Some(text) = &global.passphrase_command else {
            return Ok(None);
        };
        let words = split(text, "--passphrase-command")?;
        Ok(Some(SecretSource::PassphraseCommand(words)))
    }

    /// Fetches what opens a container, from wherever. What may be wrong with it is reported should
    /// it open nothing.
    pub(crate) fn fetch(&self, source: &SecretSource) -> Result<Secret, Failure> {
        let (secret, doubt) = source.fetch(self.output, &self.interrupt)?;
        if let Some(doubt) = doubt {
            let _ = self.doubt.set(doubt);
        }
        Ok(secret)
    }

    /// The exit code of a command that did what it was asked for: a container that is marked as
    /// faulty is damage.
    pub(crate) fn exit(&self, exit: Exit) -> Exit {
        match exit {
            Exit::Done if self.faulty.load(Ordering::Relaxed) => Exit::Damaged,
            other => other,
        }
    }

    /// Adds to a wrong key what may be wrong with it.
    pub(crate) fn doubtful(&self, failure: Failure) -> Failure {
        match self.doubt.get() {
            Some(doubt) if failure.exit == Exit::WrongKey => {
                let (cause, hint) = doubt.told();
                failure.because(cause).with_more_hint(hint)
            }
            _ => failure,
        }
    }

    /// Tells a failure that stops nothing.
    pub(crate) fn warn(&self, failure: &Failure) {
        let causes = failure.causes.join("; ");
        self.output.warning(&format!("{}: {causes}", failure.what));
    }

    /// Fetches the key of a container.
    pub(crate) fn secret(&self, resolved: &Resolved) -> Result<Secret, Failure> {
        if resolved.secret == SecretSource::Terminal {
            let state_dir = self.environment.absolute(&self.global.state_dir);
            there_at_all(&state_dir, resolved)?;
        }
        let fetched = self.fetch(&resolved.secret);
        fetched.map_err(|failure| {
            match (&resolved.secret, &resolved.default_key_file, failure.exit) {
                (SecretSource::Terminal, Some(path), Exit::Usage) => {
                    failure.because(format!("there is no key file {}", path.display()))
                }
                _ => failure,
            }
        })
    }

    /// How the session is to open it; what is pinned included.
    pub(crate) fn session_options(
        &self,
        resolved: &Resolved,
        access: Access,
    ) -> Result<SessionOptions, Failure> {
        let global = &self.global;
        if global.ignore_lock && access == Access::ReadWrite {
            return Err(
                Failure::usage("--ignore-lock is for commands that only read").with_hint(
                    "nothing was done. `sprat unlock` takes over from a machine that is gone",
                ),
            );
        }
        if let Some(bytes) = sprat_attach::memory_limit_too_low() {
            return Err(Failure::failed(format!(
                "this process may use only {} of address space (ulimit -v), too little for a session",
                text::bytes(bytes)
            ))
            .with_hint("nothing was done. Lift the limit: `ulimit -v unlimited`"));
        }
        if let Some(files) = sprat_attach::open_files_limit_too_low() {
            return Err(Failure::failed(format!(
                "this process may have only {files} files open (ulimit -n), too few for a session"
            ))
            .with_hint("nothing was done. Raise the limit: `ulimit -n 1024`"));
        }
        let mut options = SessionOptions::new(
            resolved.target.clone(),
            access,
            self.environment.absolute(&global.state_dir),
            self.environment.absolute(&global.runtime_dir),
        );
        options.mode = global.mode.into();
        options.ssh_command.clone_from(&resolved.ssh_command);
        options.allow_no_fsync = resolved.insist_without_fsync;
        options.ignore_lock = global.ignore_lock;
        options.accept_older_state = global.accept_older_state;
        options.accept_changed_keys = global.accept_changed_keys;
        options.reconnect_max = global.reconnect_max;
        options.quiet_time = global.quiet_time;
        if let Some(interval) = global.progress_interval {
            options.stats_interval = interval;
        }
        options.data_channels = global.data_channels;
        options.write_buffer_bytes_max = global.write_buffer_bytes_max;
        options.reserve_bytes = global.reserve_bytes;
        options.room_interval = global.room_interval;
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

    /// Opens a container and pins it where it was not.
    pub(crate) fn open(
        &self,
        resolved: &Resolved,
        secret: &Secret,
        access: Access,
        reporter: &mut Reporter,
    ) -> Result<Session, Failure> {
        let options = self.session_options(resolved, access)?;
        self.open_with(resolved, secret, options, reporter)
    }

    /// As [`Self::open`], in a way of its own.
    pub(crate) fn open_with(
        &self,
        resolved: &Resolved,
        secret: &Secret,
        options: SessionOptions,
        reporter: &mut Reporter,
    ) -> Result<Session, Failure> {
        let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
        let session = Session::open(options, secret, reporter, &self.interrupt)
            .map_err(|failure| self.where_mounted(resolved, failure))?;
        self.remember(&state_dir, resolved, &policy, session.facts());
        Ok(session)
    }

    /// Where the container is mounted here, that is why it can't be opened.
    pub(crate) fn where_mounted(&self, resolved: &Resolved, failure: Failure) -> Failure {
        if failure.exit != Exit::Locked {
            return failure;
        }
        let runtime_dir = self.environment.absolute(&self.global.runtime_dir);
        match session::mounted_at(&runtime_dir, &resolved.target.to_string()) {
            Some(dir) => {
                let dir = dir.display();
                failure.with_hint(format!(
                    "nothing was changed. It is mounted at {dir}: look round there, or \
                     `sprat umount {dir}` first"
                ))
            }
            None => failure,
        }
    }

    /// Pins what was found. That it can't be remembered is no reason to lose a backup.
    pub(crate) fn remember(
        &self,
        state_dir: &Path,
        resolved: &Resolved,
        policy: &session::IdentityPolicy,
        facts: &session::ContainerFacts,
    ) {
        if let Some(errors) = facts.file_system_errors {
            self.faulty.store(true, Ordering::Relaxed);
            self.output.warning(&format!(
                "the file system in {} is marked as faulty ({}). Files can be read; don't write to \
                 it before it is repaired: `sprat check` says more",
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
    /// Notes for `sprat status` what a session saw; that it can't is no reason to fail.
    pub(crate) fn note_standing(
        &self,
        uuid: &str,
        target: &Target,
        change: impl FnOnce(&mut History),
    ) {
        let state_dir = self.environment.absolute(&self.global.state_dir);
        let paths = StatePaths::new(&state_dir, uuid, target);
        if let Err(error) = History::update(&paths, change) {
            self.output.warning(&format!(
                "what `sprat status` shows can't be noted: {error}"
            ));
        }
    }
}

/// The config first, then the default key file, then the terminal.
fn own_source(container: Option<&Container>, default_key_file: Option<&Path>) -> SecretSource {
    if let Some(container) = container {
        if let Some(path) = &container.key_file {
            return SecretSource::KeyFile(path.clone());
        }
        if let Some(path) = &container.passphrase_file {
            return SecretSource::PassphraseFile(path.clone());
        }
        if let Some(words) = &container.passphrase_command {
            return SecretSource::PassphraseCommand(words.clone());
        }
    }
    match default_key_file {
        Some(path) if path.exists() => SecretSource::KeyFile(path.to_owned()),
        _ => SecretSource::Terminal,
    }
}

/// Ends a session after `done`; what went wrong while closing counts more than what came before,
/// because it tells what of it all is durable.
pub(crate) fn close<T>(
    session: Session,
    done: Result<T, Failure>,
    context: &Context,
    resolved: &Resolved,
    reporter: &mut Reporter,
) -> Result<(T, session::ClosedReport), Failure> {
    let uuid = session.facts().uuid.clone();
    let closed = session.close(reporter, &context.interrupt);
    reporter.clear();
    if let Ok(closed) = &closed {
        context.note_standing(&uuid, &resolved.target, |history| {
            history.saw(closed.room);
        });
    }
    match (done, closed) {
        (Ok(done), Ok(closed)) => Ok((done, closed)),
        (Ok(_), Err(failure)) => Err(failure),
        (Err(failure), Ok(_)) => Err(failure),
        (Err(first), Err(last)) => Err(both(first, last)),
    }
}

/// One failure out of that of the work and that of closing after it.
pub(crate) fn both(first: Failure, last: Failure) -> Failure {
    if first == last {
        return first;
    }
    // The more special of the two says what happened.
    let special = |failure: &Failure| !matches!(failure.exit, Exit::Failed | Exit::Done);
    let (mut main, other) = if special(&first) || !special(&last) {
        (first, last)
    } else {
        (last, first)
    };
    main.causes.push(format!("also: {}", other.what));
    main.causes.extend(other.causes);
    main.hint = main.hint.or(other.hint);
    main
}

/// Looks whether there is a container before anybody is asked for its key. What can't be told now the
/// session tells.
fn there_at_all(state_dir: &Path, resolved: &Resolved) -> Result<(), Failure> {
    let Ok(store) = connect::connect(&resolved.target, &resolved.ssh_command) else {
        return Ok(());
    };
    match store.stat(&resolved.target.name) {
        Err(error) if error.kind() == StoreErrorKind::NotFound => {
            Err(moved::no_container(state_dir, &resolved.target))
        }
        _ => Ok(()),
    }
}

fn split(text: &str, option: &str) -> Result<Vec<OsString>, Failure> {
    config::split_words(text).map_err(|what| Failure::usage(format!("{option}: {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_failures_the_more_special_one_decides_the_exit_code() {
        let plain = || Failure::failed("rsync failed");
        let lost = || Failure::new(Exit::Unreachable, "line lost").with_hint("run again");
        for failure in [both(plain(), lost()), both(lost(), plain())] {
            assert_eq!(failure.exit, Exit::Unreachable);
            assert_eq!(failure.causes, ["also: rsync failed"]);
            assert_eq!(failure.hint.as_deref(), Some("run again"));
        }
        assert_eq!(both(plain(), plain()), plain());
    }
}
