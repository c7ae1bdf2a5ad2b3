//! `sprat init`: creates the key file, the container and the recovery sheet.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use sprat_luks::{RecoveryKey, Secret, SlotKind};
use sprat_run::config::Job;
use sprat_run::recovery_sheet::{SheetJob, SheetParts};
use sprat_session::closed_container::check_free;
use sprat_session::ssh_config::Known;
use sprat_session::state::{identity, key_notes, missing, reserved_names};
use sprat_session::{
    self as session, Access, ContainerFacts, CreateOptions, FileSystemKind, SessionSettings, text,
};

use super::context::{CommandArgs, Context, Resolved};
use super::key;
use crate::args::TARGET_HELP;
use crate::output::{Reporter, path_json, result_json};
use crate::secrets::{self, SecretSource};
use crate::sheet_files::SheetFiles;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat init ssh://u1234@example.org/backup/home.luks
  sprat init --size 500G --sheet sheet.txt home
  sprat init --if-missing --sheet sheet.txt home";

pub(super) const NOTES: &str = "\
The key file is --key-file, else the config's key_file, else /etc/sprat/keys/NAME.key. If the key
file is missing, sprat creates it with 4096 random bytes. The recovery sheet shows a second key.
sprat init overwrites nothing.";

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Write the recovery sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Also write the sheet as a page to print, with the recovery key as a QR code
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Largest size of the container; on the server it takes only the space of the data in it
    #[arg(long, value_parser = text::parse_size, default_value = "5T")]
    size: u64,
    /// The file system in the container. btrfs: an unchanged backup sends much less. ext4: every Linux can
    /// open it
    #[arg(long, value_name = "KIND", value_parser = FileSystemKind::names(), default_value = "ext4")]
    file_system: String,
    /// Largest number of files and folders in all snapshots together. An unchanged file counts once;
    /// folders count in each snapshot; not with btrfs [default: by --size, about 168 million for 5T]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1000..=4_000_000_000))]
    inodes: Option<u64>,
    /// If the container is there, and the key opens it, do nothing and exit with 5
    #[arg(long)]
    if_missing: bool,
    /// Jobs for the sheet that are not in the config yet.
    #[arg(skip)]
    more_jobs: Vec<SheetJob>,
}

impl CommandArgs for InitArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        match self.if_missing {
            true if self.is_there(context)? => Ok(Exit::Exists),
            _ => self.make(context).map(|_| Exit::Done),
        }
    }
}

impl InitArgs {
    /// As `sprat setup` makes a container.
    pub(super) fn of_setup(
        target: String,
        sheet: Option<PathBuf>,
        size: u64,
        more_jobs: Vec<SheetJob>,
    ) -> Self {
        Self {
            target,
            sheet,
            html: None,
            size,
            file_system: FileSystemKind::DEFAULT.name().to_owned(),
            inodes: None,
            if_missing: false,
            more_jobs,
        }
    }

    /// Whether there is a container that the key opens. If the key does not open it, that is a failure.
    fn is_there(&self, context: &Context) -> Result<bool, Failure> {
        let resolved = context.resolve(&self.target)?;
        let file = match key::open(context, &resolved) {
            Err(failure) if failure.exit == Exit::NoContainer => return Ok(false),
            opened => opened?,
        };
        let header = key::header(context, &file)?;
        let secret = context.secret(&resolved)?;
        let global = &context.global;
        let (changed, older) = (global.accept_changed_keys, global.accept_older_state);
        file.rehearse(&header, &secret, changed, older)
            .map_err(|failure| context.explain_key(&resolved, failure))?;
        let text = format!("{} is there, and the key opens it\n", resolved.target);
        let fields = json!({ "uuid": header.uuid() });
        context.finish("init", Exit::Exists, &resolved.target, &text, fields)?;
        Ok(true)
    }

    /// Makes the container, and returns its recovery key.
    pub(super) fn make(&self, context: &Context) -> Result<RecoveryKey, Failure> {
        let resolved = context.resolve(&self.target)?;
        reserved_names::check(&resolved.target.name)?;
        let file_system = FileSystemKind::chosen(&self.file_system, self.size, self.inodes)?;
        let session_options = context.session_options(&resolved, Access::ReadWrite)?;
        let source = key_source(&resolved)?;
        // Asking ssh may take seconds, or fail: do it before anything is created.
        let known = Known::look_up(&resolved.target, &resolved.ssh.command);
        refuse_existing(&resolved, &source)?;
        refuse_second(&resolved, &session_options.state_dir)?;
        let on_stdout = context.output.json || self.sheet.is_none();
        let files = context.sheet_files(self.sheet.as_ref(), self.html.as_ref(), on_stdout)?;
        let mut jobs = SheetJob::of_container(&context.config, &resolved.name);
        jobs.extend(self.more_jobs.iter().cloned());
        let new = New {
            parts: SheetParts::new(&resolved.target, known, jobs),
            resolved,
            source,
            files,
            file_system,
        };
        self.create(context, session_options, new)
    }
}

/// What a new container is created from.
struct New {
    resolved: Resolved,
    source: SecretSource,
    parts: SheetParts,
    files: SheetFiles,
    file_system: FileSystemKind,
}

impl InitArgs {
    fn create(
        &self,
        context: &Context,
        session_options: SessionSettings,
        new: New,
    ) -> Result<RecoveryKey, Failure> {
        let New {
            resolved,
            source,
            mut parts,
            files,
            file_system,
        } = new;
        let prepared = prepare(context, &source);
        let (key_file_made, secret, kind, recovery) = prepared.inspect_err(|_| files.remove())?;
        if let SecretSource::KeyFile(path) = &source {
            parts.key_file = Some((path.clone(), secrets::sha256_hex(&secret)));
        }
        let mut show = |facts: &ContainerFacts| {
            let sheet = parts.sheet(&facts.pins, Some(recovery.text()));
            files.show(context.output, &sheet, recovery.text())
        };
        let mut reporter = Reporter::new(context.output, "");
        let state_dir = session_options.state_dir.clone();
        let options = CreateOptions {
            file_system,
            settings: session_options,
            size_bytes: self.size,
            secrets: vec![(secret, kind), (recovery.secret(), SlotKind::Recovery)],
            uuid: None,
            label: None,
            inodes: self.inodes,
            fast_kdf_for_tests: context.global.cheap_kdf_for_tests,
        };
        // JSON describes the whole run, so it is printed at its end.
        let json_only = context.output.json && !files.text_in_file() && !files.has_page();
        let shown: Option<session::Show<'_>> = match json_only {
            true => None,
            false => Some(&mut show),
        };
        let created = session::create_and_show(options, shown, &mut reporter, &context.interrupt);
        reporter.clear();
        let created = created.map_err(|not_created| {
            if !not_created.may_be_made {
                files.remove();
            }
            let failure = no_folder(not_created.failure);
            match (&source, key_file_made) {
                (SecretSource::KeyFile(path), true) => failure.with_more_hint(&format!(
                    "The new key file {} stays. The next `sprat init` uses it",
                    path.display()
                )),
                _ => failure,
            }
        })?;
        let facts = &created.facts;
        // The sheet must be shown, even if this machine's own notes can't be written.
        if let Err(failure) = identity::store(&state_dir, &resolved.target, &facts.pins) {
            context.warn(&failure);
        }
        key_notes::note_new_container(&state_dir, &facts.uuid, &resolved.target, source.key_kind());
        if context.output.json {
            let sheet = parts.sheet(&facts.pins, Some(recovery.text()));
            let key_file = parts.key_file.as_ref().map(|(path, _)| path_json(path));
            let fields = json!({
                "target": resolved.target.to_string(),
                "uuid": facts.uuid,
                "fingerprint": facts.pins.fingerprint(),
                "pins": facts.pins,
                "container_bytes": facts.file_bytes,
                "volume_bytes": facts.volume_bytes,
                "file_system": facts.file_system.name(),
                "sent_bytes": created.sent_bytes,
                "key_file": key_file,
                "key_file_made": key_file_made,
                "sheet": files.text_path(),
                "recovery_sheet": sheet.json(key_file.as_deref()),
            });
            let json = result_json("init", Exit::Done, fields);
            context.output.result("", &json).map_err(|failure| {
                failure.with_hint(
                    "the container is complete, and its key opens it, but the recovery key was not \
                     shown. Create another one and its sheet: `sprat key add TARGET --new-recovery`. \
                     Then remove the one that was not shown: `sprat key remove TARGET 1`",
                )
            })?;
        }
        context.output.note(&format!(
            "created {} ({}, {} sent)",
            resolved.target,
            text::bytes(facts.file_bytes),
            text::bytes(created.sent_bytes)
        ));
        let room = file_system.default_inodes(facts.volume_bytes);
        if let Some(room) = self.inodes.or(room) {
            let jobs = context.config.jobs.iter();
            let jobs = jobs.filter(|job| job.is_in(&resolved.name));
            let sources: Vec<PathBuf> = jobs.flat_map(Job::local_sources).collect();
            let (note, warning) = session::file_room_texts(room, &sources);
            context.output.note(&note);
            warning.iter().for_each(|it| context.output.warning(it));
        }
        if !files.text_in_file() {
            context.output.note(
                "the sheet above is SECRET. Print it or put it into a password manager. Keep the sheet, \
                 and a copy of the key file, off this machine",
            );
        }
        Ok(recovery)
    }
}

/// To `init` a missing folder is not a missing container.
fn no_folder(mut failure: Failure) -> Failure {
    if failure.exit == Exit::NoContainer {
        failure.exit = Exit::Failed;
    }
    failure
}

/// Refuses a container that exists, before a key file is created or a passphrase is asked for: a new key
/// file in the place of a lost one would hide that the old one is lost.
fn refuse_existing(resolved: &Resolved, source: &SecretSource) -> Result<(), Failure> {
    let needed = match source {
        SecretSource::KeyFile(path) => path.symlink_metadata().is_err(),
        SecretSource::Terminal => true,
        SecretSource::PassphraseFile(_) | SecretSource::PassphraseCommand(_) => false,
    };
    if !needed {
        return Ok(());
    }
    check_free(&resolved.target, &resolved.ssh).map_err(no_folder)
}

/// Refuses a place where this machine knows a container that is not there now.
fn refuse_second(resolved: &Resolved, state_dir: &Path) -> Result<(), Failure> {
    missing::refuse_second(state_dir, &resolved.target).or_else(|refused| {
        // If it is there, that is the reason.
        check_free(&resolved.target, &resolved.ssh).map_err(no_folder)?;
        Err(refused)
    })
}

/// Whether the key file was created, the first slot's secret and kind, and a recovery key.
fn prepare(
    context: &Context,
    source: &SecretSource,
) -> Result<(bool, Secret, SlotKind, RecoveryKey), Failure> {
    let key_file_made = match source {
        SecretSource::KeyFile(path) => secrets::make_key_file(path)?,
        _ => false,
    };
    let (secret, kind) = source.fetch_for_new(context.output, &context.interrupt)?;
    if let (SecretSource::KeyFile(path), false) = (source, key_file_made) {
        let note = format!("using the existing key file {}", path.display());
        context.output.note(&note);
    }
    let recovery = RecoveryKey::generate()
        .map_err(|error| Failure::from(&error).context("can't create a recovery key"))?;
    context.interrupt.check()?;
    Ok((key_file_made, secret, kind, recovery))
}

/// The source of the first slot's secret.
fn key_source(resolved: &Resolved) -> Result<SecretSource, Failure> {
    match (&resolved.secret, &resolved.default_key_file) {
        (SecretSource::Terminal, Some(path)) => Ok(SecretSource::KeyFile(path.clone())),
        (SecretSource::Terminal, None) => Err(Failure::usage(
            "sprat does not know where to put the key \
            file: neither HOME nor SPRAT_CONFIG_DIR is set",
        )
        .with_hint("nothing was started. Give a path with --key-file")),
        (named, _) => Ok(named.clone()),
    }
}
