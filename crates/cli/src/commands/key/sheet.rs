//! `sprat key sheet` and `sprat key rehearse`: the recovery sheet printed again, and proved.

use std::path::PathBuf;

use jiff::Timestamp;
use serde_json::json;
use sprat_luks::{Header, Pins, RecoveryKey, RecoveryKeyError, Secret, SectorCipher};
use sprat_session as session;
use sprat_session::ssh_config::Known;
use sprat_session::state::key_notes::{KeyKind, KeyNote, KeyNotes};
use sprat_session::{connect, state};
use zeroize::Zeroizing;

use super::super::context::{Context, Resolved};
use super::super::sheet_files::SheetFiles;
use super::{check_typed, judged, open, state_dir, warn_of_changed_slots};
use crate::args::{KeySheetArgs, KeyTargetArgs};
use crate::output::exit_json;
use crate::secrets::{self, SecretSource};
use crate::sheet::{Sheet, SheetJob};
use crate::{Exit, Failure, terminal};

/// A sheet that is to be shown.
pub(in crate::commands) struct Shown<'s> {
    pub resolved: &'s Resolved,
    pub known: &'s Known,
    pub pins: &'s Pins,
    /// A key file that opens it, and its hash.
    pub key_file: Option<(PathBuf, String)>,
    pub recovery: Option<&'s str>,
    pub files: &'s SheetFiles,
    /// The text is printed, unless it goes to a file.
    pub text: bool,
}

impl Shown<'_> {
    /// Prints the text, or where it is JSON what `json` says; then writes the files.
    pub(in crate::commands) fn print(
        &self,
        context: &Context,
        json: &serde_json::Value,
    ) -> Result<(), Failure> {
        let made_at = Timestamp::now()
            .strftime("%Y-%m-%d %H:%M:%S UTC")
            .to_string();
        let jobs = jobs(context, self.resolved);
        let sheet = Sheet {
            target: &self.resolved.target,
            known: self.known,
            pins: self.pins,
            recovery_key: self
                .recovery
                .unwrap_or("____-____-____-____-____-____-____-____-____-____"),
            key_file: self
                .key_file
                .as_ref()
                .map(|(path, sha256)| (path.as_path(), sha256.as_str())),
            jobs: &jobs,
        };
        let text = Zeroizing::new(match self.text && !self.files.text_in_file() {
            true => sheet.text(&made_at),
            false => String::new(),
        });
        // One of the two is enough, so what can be shown is shown.
        let printed = context.output.result(&text, json);
        self.files.write(context, &sheet, &made_at, self.recovery)?;
        printed
    }
}

/// Jobs that the config sends into this container.
pub(in crate::commands) fn jobs(context: &Context, resolved: &Resolved) -> Vec<SheetJob> {
    let jobs = context.config.jobs.iter();
    jobs.filter(|job| job.container == resolved.name)
        .map(|job| SheetJob {
            name: job.name.to_string(),
            sources: job
                .sources
                .iter()
                .map(|source| source.display().to_string())
                .collect(),
        })
        .collect()
}

/// The key file that this machine opens the container with, and its hash; only one that does open
/// it goes onto a sheet.
fn key_file(
    context: &Context,
    resolved: &Resolved,
    opens: impl FnOnce(&Secret) -> Result<(), Failure>,
) -> Option<(PathBuf, String)> {
    let ((SecretSource::KeyFile(path), _) | (_, SecretSource::KeyFile(path))) =
        (&resolved.own_secret, &resolved.secret)
    else {
        return None;
    };
    let source = SecretSource::KeyFile(path.clone());
    let opened = context.fetch(&source).and_then(|secret| {
        opens(&secret)?;
        Ok(secrets::sha256_hex(&secret))
    });
    match opened {
        Ok(sha256) => Some((path.clone(), sha256)),
        Err(failure) => {
            context.output.warning(&format!(
                "the key file {} is not on the sheet, because it opens nothing: {}",
                path.display(),
                failure.what
            ));
            None
        }
    }
}

/// The same right after `secret` has opened the container.
pub(super) fn key_file_now(
    context: &Context,
    resolved: &Resolved,
    secret: &Secret,
) -> Option<(PathBuf, String)> {
    key_file(context, resolved, |own| {
        if own.expose() == secret.expose() {
            return Ok(());
        }
        let file = open(context, resolved)?;
        let header = judged(context, resolved, &*file)?;
        header.unlock(&connect::HeaderBytes(&*file), own)?;
        Ok(())
    })
}

pub(super) fn print_again(context: &Context, args: &KeySheetArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let recovery = if args.without_secret {
        None
    } else {
        Some(recovery_key(context)?)
    };
    let file = open(context, &resolved)?;
    let header = judged(context, &resolved, &*file)?;
    warn_of_changed_slots(context, &resolved, &header);
    if let Some(recovery) = &recovery {
        header.unlock(&connect::HeaderBytes(&*file), &recovery.secret())?;
    }
    let known = Known::look_up(&resolved.target, &resolved.ssh_command);
    let text = args.html.is_none() || args.sheet.is_some();
    let on_stdout = context.output.json || (text && args.sheet.is_none());
    let files = SheetFiles::create(
        context,
        args.sheet.as_ref(),
        args.html.as_ref(),
        on_stdout && recovery.is_some(),
    )?;
    let page = args.html.as_ref();
    let page = page.map(|path| context.environment.absolute(path));
    let pins = header.pins();
    let key_file = key_file(context, &resolved, |own| {
        header.unlock(&connect::HeaderBytes(&*file), own)?;
        Ok(())
    });
    let shown = Shown {
        resolved: &resolved,
        pins: &pins,
        key_file,
        recovery: recovery.as_ref().map(RecoveryKey::text),
        known: &known,
        files: &files,
        text,
    };
    let json = json!({
        "command": "key sheet",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "uuid": header.uuid(),
        "fingerprint": pins.fingerprint(),
        "recovery_key": recovery.as_ref().map(RecoveryKey::text),
        "page": page.as_deref().map(crate::output::path_json),
        "sheet": files.text_path(),
    });
    shown.print(context, &json)?;
    Ok(Exit::Done)
}

/// What a person reads off the sheet: never what the config or a default would take.
fn from_the_sheet(context: &Context) -> Result<SecretSource, Failure> {
    Ok(context.named_source()?.unwrap_or(SecretSource::Terminal))
}

fn recovery_key(context: &Context) -> Result<RecoveryKey, Failure> {
    if context.global.key_file.is_some() {
        return Err(
            Failure::usage("the sheet shows a recovery key, not a key file")
                .with_hint("leave --key-file out and type the recovery key; or --without-secret"),
        );
    }
    let secret = context.fetch(&from_the_sheet(context)?)?;
    let parsed = std::str::from_utf8(secret.expose())
        .ok()
        .map(RecoveryKey::parse);
    match parsed {
        Some(Ok(key)) => Ok(key),
        Some(Err(error @ RecoveryKeyError::Checksum)) => Err(Failure::new(
            Exit::WrongKey,
            "the recovery key has a typing error",
        )
        .because(error.to_string())
        .with_hint("compare each group with the sheet")),
        _ => Err(Failure::usage("that is no recovery key").with_hint(
            "it has ten groups of four characters. `sprat key add --new-recovery` makes a new one \
             where the old one is lost",
        )),
    }
}

pub(super) fn rehearse(context: &Context, args: &KeyTargetArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let source = from_the_sheet(context)?;
    let typed = match (&context.global.fingerprint, &source) {
        (None, SecretSource::Terminal) if terminal::is_there() => {
            terminal::ask_openly("Fingerprint on the sheet: ", &context.interrupt)?
        }
        _ => String::new(),
    };
    let secret = context.fetch(&source)?;
    let file = open(context, &resolved)?;
    let header = judged(context, &resolved, &*file)?;
    if !typed.is_empty() {
        check_typed(context, &resolved, &header, &typed)?;
    }
    let (slot, key) = header.unlock_by(&connect::HeaderBytes(&*file), &secret)?;
    let cipher = SectorCipher::new(&key, &header)?;
    drop(key);
    let first = state::first_block(&*file, &header, &cipher).and_then(|first| {
        check_file_system(&first.0, &header, first.1)?;
        Ok(first)
    });
    let (block, file_bytes) = first.map_err(|failure| {
        failure.context(format!(
            "the key opens {} (slot {slot}), but not all of its volume is there",
            resolved.target
        ))
    })?;
    compare_state(context, &resolved, &header, (&block, file_bytes))?;
    note_proof(context, &header, slot, kind_of(&source, &secret));
    let json = json!({
        "command": "key rehearse",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "uuid": header.uuid(),
        "fingerprint": header.pins().fingerprint(),
        "slot": slot,
        "file_system": true,
    });
    let said = format!(
        "the key opens {} (slot {slot}), and the file system behind it reads\n\
         its fingerprint is {}\n",
        resolved.target,
        header.pins().fingerprint()
    );
    context.output.result(&said, &json)?;
    Ok(Exit::Done)
}

/// A key that opens an old copy, or a container that lost slots, proves nothing for today's.
fn compare_state(
    context: &Context,
    resolved: &Resolved,
    header: &Header,
    (block, file_bytes): (&[u8], u64),
) -> Result<(), Failure> {
    let (state_dir, target) = (state_dir(context), &resolved.target);
    if !context.global.accept_changed_keys {
        state::check_slots(&state_dir, target, header.uuid(), &header.slot_digests())?;
    }
    if context.global.accept_older_state {
        return Ok(());
    }
    state::refuse_older(&state_dir, target, header.uuid(), block, file_bytes)
}

/// What was typed, or read from where it was named.
fn kind_of(source: &SecretSource, secret: &Secret) -> KeyKind {
    let typed = std::str::from_utf8(secret.expose());
    match source {
        SecretSource::KeyFile(_) => KeyKind::KeyFile,
        _ if typed.is_ok_and(|typed| RecoveryKey::parse(typed).is_ok()) => KeyKind::Recovery,
        _ => KeyKind::Passphrase,
    }
}

/// Only for the list: the proof itself counts.
fn note_proof(context: &Context, header: &Header, slot: u32, kind: KeyKind) {
    let slots = header.slots();
    let Some(found) = slots.iter().find(|found| found.number == slot) else {
        return;
    };
    let state_dir = state_dir(context);
    let mut notes = KeyNotes::load(&state_dir, header.uuid());
    if notes.of(&found.mark).is_none() {
        notes.note(KeyNote {
            mark: found.mark.clone(),
            kind,
            label: None,
            added: None,
            proved: None,
        });
    }
    notes.prove(&found.mark, Timestamp::now());
    let _ = notes.store(&state_dir, header.uuid());
}

/// Whether the beginning of the file system decrypts, and the file is as long as that says.
fn check_file_system(block: &[u8], header: &Header, file_bytes: u64) -> Result<(), Failure> {
    let payload = header.geometry(file_bytes)?;
    match session::ext4_bytes(&block[1024..2048]) {
        Some(needed) if needed > payload.len_bytes => {
            let needed = payload.offset_bytes.saturating_add(needed);
            Err(session::truncated(file_bytes, needed))
        }
        Some(_) => Ok(()),
        None => Err(
            Failure::new(Exit::Damaged, "behind it lies no ext4 file system").with_hint(
                "nothing was changed. The key is right; the beginning of the volume was \
                 overwritten or damaged on the server: look for another copy of the container \
                 there, and check the server's disk",
            ),
        ),
    }
}
