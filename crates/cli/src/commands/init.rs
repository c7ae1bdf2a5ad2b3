//! `sprat init`: key file, container, recovery key, recovery sheet.

use std::path::Path;

use jiff::Timestamp;
use serde_json::json;
use sprat_luks::{Pins, RecoveryKey, Secret, SlotKind};
use sprat_session as session;
use sprat_session::address::Target;
use sprat_session::ssh_config::Known;
use sprat_session::state::key_notes::{KeyKind, KeyNote, KeyNotes};
use sprat_session::state::paths::StatePaths;
use sprat_session::state::{headers, identity, reserved_names};
use sprat_session::{
    Access, ContainerFacts, CreateOptions, SIZE_BYTES_MIN, SessionOptions, connect, text,
};
use sprat_store::StoreErrorKind;
use zeroize::Zeroizing;

use super::context::{Context, Resolved};
use super::sheet_files::SheetFiles;
use crate::args::InitArgs;
use crate::output::{Reporter, exit_json};
use crate::secrets::{self, SecretSource};
use crate::sheet::{Sheet, SheetJob};
use crate::{Exit, Failure};

pub(super) fn run(context: &Context, args: &InitArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    reserved_names::check(&resolved.target.name)?;
    if args.size < SIZE_BYTES_MIN {
        return Err(Failure::usage(format!(
            "--size {} is too small: at least {} are needed",
            text::bytes(args.size),
            text::bytes(SIZE_BYTES_MIN)
        )));
    }
    let session_options = context.session_options(&resolved, Access::ReadWrite)?;
    let source = key_source(&resolved)?;
    // What it asks ssh may take seconds, or fail: before anything is made.
    let known = Known::look_up(&resolved.target, &resolved.ssh_command);
    refuse_existing(&resolved, &source)?;
    let on_stdout = context.output.json || args.sheet.is_none();
    let files = SheetFiles::create(context, args.sheet.as_ref(), args.html.as_ref(), on_stdout)?;
    init(
        context,
        args,
        &resolved,
        session_options,
        &source,
        &known,
        &files,
    )
}

fn init(
    context: &Context,
    args: &InitArgs,
    resolved: &Resolved,
    session_options: SessionOptions,
    source: &SecretSource,
    known: &Known,
    files: &SheetFiles,
) -> Result<Exit, Failure> {
    let prepared = prepare(context, source);
    let (key_file_made, secret, kind, recovery) = prepared.inspect_err(|_| files.remove())?;
    let sha256 = secrets::sha256_hex(&secret);
    let made_at = Timestamp::now()
        .strftime("%Y-%m-%d %H:%M:%S UTC")
        .to_string();
    let jobs = super::key::jobs(context, resolved);
    let key_file = match source {
        SecretSource::KeyFile(path) => Some((path.as_path(), sha256.as_str())),
        _ => None,
    };
    let parts = Parts {
        target: &resolved.target,
        known,
        recovery_key: recovery.text(),
        key_file,
        jobs: &jobs,
    };
    let mut show = |facts: &ContainerFacts| {
        let sheet = parts.sheet(&facts.pins);
        files.write(context, &sheet, &made_at, Some(recovery.text()))?;
        if context.output.json || files.text_in_file() {
            return Ok(());
        }
        let text = Zeroizing::new(sheet.text(&made_at));
        context.output.result(&text, &())
    };

    let mut reporter = Reporter::new(context.output, "");
    let state_dir = session_options.state_dir.clone();
    let options = CreateOptions {
        session: session_options,
        size_bytes: args.size,
        secrets: vec![(secret, kind), (recovery.secret(), SlotKind::Recovery)],
        uuid: None,
        label: None,
        inodes: args.inodes,
        fast_kdf_for_tests: context.global.cheap_kdf_for_tests,
    };
    // JSON tells of the whole run, so it is printed at its end.
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
        let mut failure = not_created.failure;
        // A folder that is missing is no missing container here.
        if failure.exit == Exit::NoContainer {
            failure.exit = Exit::Failed;
        }
        match (source, key_file_made) {
            (SecretSource::KeyFile(path), true) => failure.with_more_hint(&format!(
                "The new key file {} is kept; the next init uses it",
                path.display()
            )),
            _ => failure,
        }
    })?;
    // The sheet must be shown, whatever becomes of this machine's own notes.
    if let Err(failure) = identity::store(&state_dir, &resolved.target, &created.facts.pins) {
        context.warn(&failure);
    }
    note_keys(&state_dir, &created.facts.uuid, &resolved.target, source);
    let facts = &created.facts;
    if context.output.json {
        let sheet = parts.sheet(&facts.pins);
        let text = Zeroizing::new(sheet.text(&made_at));
        let json = json!({
            "command": "init",
            "result": exit_json(Exit::Done),
            "target": resolved.target.to_string(),
            "uuid": facts.uuid,
            "fingerprint": facts.pins.fingerprint(),
            "pins": facts.pins,
            "container_bytes": facts.file_bytes,
            "volume_bytes": facts.volume_bytes,
            "sent_bytes": created.sent_bytes,
            "key_file": key_file.map(|(path, _)| crate::output::path_json(path)),
            "key_file_made": key_file_made,
            "sheet": files.text_path(),
            "recovery_sheet": {
                "secret": true,
                "made": made_at,
                "recovery_key": recovery.text(),
                "key_file": key_file.map(|(path, _)| crate::output::path_json(path)),
                "key_file_sha256": key_file.map(|(_, sha256)| sha256),
                "steps": sheet.steps(),
                "steps_with_sprat": sheet.steps_with_sprat(),
                "unknown": sheet.unknown(),
                "text": text.as_str(),
            },
        });
        context.output.result("", &json).map_err(|failure| {
            failure.with_hint(
                "the container is made and its key opens it, but the recovery key was never shown: \
                 `sprat key add TARGET --new-recovery` makes another one and shows the sheet, `sprat \
                 key remove TARGET 1` removes the one of slot 1",
            )
        })?;
    }
    context.output.note(&format!(
        "made {} ({}, {} sent)",
        resolved.target,
        text::bytes(facts.file_bytes),
        text::bytes(created.sent_bytes)
    ));
    tell_of_inodes(context, resolved, args.inodes, facts.volume_bytes);
    if !files.text_in_file() {
        context.output.note(
            "the sheet above is SECRET: print it or put it into a password manager, and keep it and \
             a copy of the key file off this machine",
        );
    }
    Ok(Exit::Done)
}

/// How many files fit; a number that can't be changed later. Warns where the jobs of this container may
/// have more.
fn tell_of_inodes(context: &Context, resolved: &Resolved, inodes: Option<u64>, bytes: u64) {
    let room = inodes.unwrap_or(bytes / default_inode_ratio(bytes));
    context.output.note(&format!(
        "there is room for about {}",
        text::counted(room, "file", "files")
    ));
    let mut seen = Vec::new();
    let mut there = 0_u64;
    for job in &context.config.jobs {
        if job.container != resolved.name {
            continue;
        }
        for source in &job.sources {
            let (Ok(about), Ok(meta)) = (rustix::fs::statvfs(source), std::fs::metadata(source))
            else {
                continue;
            };
            let device = std::os::unix::fs::MetadataExt::dev(&meta);
            if !seen.contains(&device) {
                seen.push(device);
                there = there.saturating_add(about.f_files.saturating_sub(about.f_ffree));
            }
        }
    }
    if there > room {
        context.output.warning(&format!(
            "the disks of this container's jobs hold {}, and it has room for about {}. If most of them \
             are to be backed up, remove it and make it again with --inodes {}: the number can't be \
             changed later",
            text::counted(there, "file", "files"),
            text::count(room),
            there.saturating_mul(2)
        ));
    }
}

/// Bytes for each file by size of the volume (mke2fs.conf of e2fsprogs: `small`, default, `big`, `huge`).
fn default_inode_ratio(bytes: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    const TIB: u64 = 1 << 40;
    match bytes {
        0..536_870_912 => 4096,
        _ if bytes / MIB < 4 * TIB / MIB => 16_384,
        _ if bytes / TIB < 16 => 32_768,
        _ => 65_536,
    }
}

/// What the sheet shows beside what the new container is known by.
struct Parts<'s> {
    target: &'s Target,
    known: &'s Known,
    recovery_key: &'s str,
    key_file: Option<(&'s Path, &'s str)>,
    jobs: &'s [SheetJob],
}

impl<'s> Parts<'s> {
    fn sheet<'p>(&self, pins: &'p Pins) -> Sheet<'p>
    where
        's: 'p,
    {
        Sheet {
            target: self.target,
            known: self.known,
            pins,
            recovery_key: self.recovery_key,
            key_file: self.key_file,
            jobs: self.jobs,
        }
    }
}

/// Before a key file is made or a passphrase is asked for: a new key file in the place of a lost one
/// would hide that the old one is lost.
fn refuse_existing(resolved: &Resolved, source: &SecretSource) -> Result<(), Failure> {
    let needed = match source {
        SecretSource::KeyFile(path) => path.symlink_metadata().is_err(),
        SecretSource::Terminal => true,
        SecretSource::PassphraseFile(_) | SecretSource::PassphraseCommand(_) => false,
    };
    if !needed {
        return Ok(());
    }
    let store = connect::connect(&resolved.target, &resolved.ssh_command).map_err(|error| {
        let mut failure = Failure::from(&error);
        // A folder that is missing is no missing container here.
        if failure.exit == Exit::NoContainer {
            failure.exit = Exit::Failed;
        }
        failure
    })?;
    match store.stat(&resolved.target.name) {
        Ok(_) => Err(session::exists_already(&resolved.target)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::from(&error)),
    }
}

/// The key of the first slot, and whether its file was made; and a recovery key.
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
        let note = format!(
            "the key file {} exists and is used as it is",
            path.display()
        );
        context.output.note(&note);
    }
    let recovery = RecoveryKey::generate()
        .map_err(|error| Failure::from(&error).context("can't make a recovery key"))?;
    context.interrupt.check()?;
    Ok((key_file_made, secret, kind, recovery))
}

/// Where the secret of the first slot comes from.
fn key_source(resolved: &Resolved) -> Result<SecretSource, Failure> {
    match (&resolved.secret, &resolved.default_key_file) {
        (SecretSource::Terminal, Some(path)) => Ok(SecretSource::KeyFile(path.clone())),
        (SecretSource::Terminal, None) => Err(Failure::usage("no place for the key file is known")
            .with_hint("name it with --key-file")),
        (named, _) => Ok(named.clone()),
    }
}

/// Notes what the slots are, for `sprat key list`; without it nothing is lost.
pub(super) fn note_keys(state_dir: &Path, uuid: &str, target: &Target, source: &SecretSource) {
    let path = headers::newest(&StatePaths::new(state_dir, uuid, target));
    let Ok(header) = headers::open(&path).and_then(|file| headers::load(&file, &path)) else {
        return;
    };
    let first = match source {
        SecretSource::KeyFile(_) => KeyKind::KeyFile,
        _ => KeyKind::Passphrase,
    };
    let mut notes = KeyNotes::default();
    for (slot, kind) in header.slots().iter().zip([first, KeyKind::Recovery]) {
        notes.note(KeyNote {
            mark: slot.mark.clone(),
            kind,
            label: None,
            added: Some(Timestamp::now()),
            proved: None,
        });
    }
    let _ = notes.store(state_dir, uuid);
}
