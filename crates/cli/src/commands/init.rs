//! `sprat init`: key file, container, recovery key, recovery sheet.

use std::fs::File;
use std::path::Path;

use jiff::Timestamp;
use serde_json::json;
use sprat_luks::{RecoveryKey, SlotKind};
use zeroize::Zeroizing;

use super::context::{Context, Resolved};
use crate::args::InitArgs;
use crate::filed::Filed;
use crate::key_notes::{KeyKind, KeyNote, KeyNotes};
use crate::known_server::KnownServer;
use crate::output::{Reporter, exit_json, text};
use crate::secrets::{self, SecretSource};
use crate::session::{self, Access, CreateOptions, Created, SIZE_BYTES_MIN};
use crate::sheet::Sheet;
use crate::target::Target;
use crate::{Exit, Failure, kept_header, own_names, pinned, sheet_page};

pub(super) fn run(context: &Context, args: &InitArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    own_names::check(&resolved.target.name)?;
    if args.size < SIZE_BYTES_MIN {
        return Err(Failure::usage(format!(
            "--size {} is too small: at least {} are needed",
            text::bytes(args.size),
            text::bytes(SIZE_BYTES_MIN)
        )));
    }
    let session_options = context.session_options(&resolved, Access::ReadWrite)?;
    let html = args
        .html
        .as_ref()
        .map(|path| context.environment.absolute(path));
    let (source, key_file_made) = key(&resolved)?;
    let (secret, kind) = source.fetch_for_new(context.output, &context.interrupt)?;
    if let (SecretSource::KeyFile(path), false) = (&source, key_file_made) {
        let note = format!(
            "the key file {} exists and is used as it is",
            path.display()
        );
        context.output.note(&note);
    }
    let sha256 = secrets::sha256_hex(&secret);
    let recovery = RecoveryKey::generate()
        .map_err(|error| Failure::from(&error).context("can't make a recovery key"))?;
    context.interrupt.check()?;
    let page = match &html {
        Some(path) => Some((sheet_page::create(path)?, path)),
        None => None,
    };

    let mut reporter = Reporter::new(context.output, "");
    let state_dir = session_options.state_dir.clone();
    let options = CreateOptions {
        session: session_options,
        size_bytes: args.size,
        secrets: vec![(secret, kind), (recovery.secret(), SlotKind::Recovery)],
        uuid: None,
        label: None,
        fast_kdf_for_tests: context.global.cheap_kdf_for_tests,
    };
    let created = session::create(options, &mut reporter, &context.interrupt);
    reporter.clear();
    if let (Err(_), Some((_, path))) = (&created, &page) {
        let _ = std::fs::remove_file(path);
    }
    let created = created.map_err(|failure| match (&source, key_file_made) {
        (SecretSource::KeyFile(path), true) => failure.with_more_hint(&format!(
            "The new key file {} is kept; the next init uses it",
            path.display()
        )),
        _ => failure,
    })?;
    // The sheet must be shown, whatever becomes of this machine's own notes.
    if let Err(failure) = pinned::store(&state_dir, &resolved.target, &created.facts.pins) {
        context.warn(&failure);
    }
    note_keys(&state_dir, &created.facts.uuid, &resolved.target, &source);
    let shown = Shown {
        source: &source,
        sha256: &sha256,
        key_file_made,
        recovery: &recovery,
        page: page.as_ref().map(|(file, path)| (file, path.as_path())),
    };
    print(context, &resolved, &created, &shown).map_err(|failure| {
        failure.with_hint(
            "the container is made and its key opens it, but the recovery key was never shown: \
             `sprat key add TARGET --new-recovery` makes another one and shows the sheet, `sprat key \
             remove TARGET 1` removes the one of slot 1",
        )
    })?;
    Ok(Exit::Done)
}

/// The secret of the first slot; a key file is made where none is there.
fn key(resolved: &Resolved) -> Result<(SecretSource, bool), Failure> {
    let source = match (&resolved.secret, &resolved.default_key_file) {
        (SecretSource::Terminal, Some(path)) => SecretSource::KeyFile(path.clone()),
        (SecretSource::Terminal, None) => {
            return Err(Failure::usage("no place for the key file is known")
                .with_hint("name it with --key-file"));
        }
        (named, _) => named.clone(),
    };
    let made = match &source {
        SecretSource::KeyFile(path) => secrets::make_key_file(path)?,
        _ => false,
    };
    Ok((source, made))
}

/// Notes what the slots are, for `sprat key list`; without it nothing is lost.
fn note_keys(state_dir: &Path, uuid: &str, target: &Target, source: &SecretSource) {
    let path = kept_header::newest(&Filed::new(state_dir, uuid, target));
    let Ok(header) = kept_header::open(&path).and_then(|file| kept_header::load(&file, &path))
    else {
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

/// What the sheet tells of the keys.
struct Shown<'s> {
    source: &'s SecretSource,
    sha256: &'s str,
    key_file_made: bool,
    recovery: &'s RecoveryKey,
    page: Option<(&'s File, &'s Path)>,
}

fn print(
    context: &Context,
    resolved: &Resolved,
    created: &Created,
    shown: &Shown<'_>,
) -> Result<(), Failure> {
    let key_file = match shown.source {
        SecretSource::KeyFile(path) => Some((path.as_path(), shown.sha256)),
        _ => None,
    };
    let jobs = super::key::jobs(context, resolved);
    let facts = &created.facts;
    let sheet = Sheet {
        target: &resolved.target,
        ssh_command: &resolved.ssh_command,
        server: KnownServer::look_up(&resolved.target, &resolved.ssh_command),
        pins: &facts.pins,
        recovery_key: shown.recovery.text(),
        key_file,
        jobs: &jobs,
    };
    let made_at = Timestamp::now()
        .strftime("%Y-%m-%d %H:%M:%S UTC")
        .to_string();
    if let Some((file, path)) = shown.page {
        let page = sheet_page::page(&sheet, &made_at, Some(shown.recovery.text()))?;
        sheet_page::write(file, path, &page)?;
    }
    let sheet_text = Zeroizing::new(sheet.text(&made_at));
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
        "key_file_made": shown.key_file_made,
        "recovery_sheet": {
            "secret": true,
            "made": made_at,
            "recovery_key": shown.recovery.text(),
            "key_file": key_file.map(|(path, _)| crate::output::path_json(path)),
            "key_file_sha256": key_file.map(|(_, sha256)| sha256),
            "steps": sheet.steps(),
            "text": sheet_text.as_str(),
        },
    });
    context.output.result(&sheet_text, &json)?;
    context.output.note(&format!(
        "made {} ({}, {} sent)",
        resolved.target,
        text::bytes(facts.file_bytes),
        text::bytes(created.sent_bytes)
    ));
    context.output.note(
        "the sheet above is SECRET: print it or put it into a password manager, and keep it and a \
         copy of the key file off this machine",
    );
    Ok(())
}
