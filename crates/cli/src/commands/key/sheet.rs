//! `sprat key sheet` and `sprat key rehearse`: the recovery sheet printed again, and proved.

use std::fs::File;
use std::path::Path;

use jiff::Timestamp;
use serde_json::json;
use sprat_luks::{Pins, RecoveryKey, Secret, SectorCipher};
use sprat_store::{ReadClass, StoreFile};
use zeroize::Zeroizing;

use super::super::context::{Context, Resolved};
use super::{judged, open, state_dir};
use crate::args::{KeySheetArgs, KeyTargetArgs};
use crate::config;
use crate::key_notes::KeyNotes;
use crate::output::exit_json;
use crate::secrets::{self, SecretSource};
use crate::sheet::Sheet;
use crate::{Exit, Failure, reach, sheet_page, terminal};

/// A sheet that is to be shown.
pub(in crate::commands) struct Shown<'s> {
    pub resolved: &'s Resolved,
    pub pins: &'s Pins,
    pub recovery: Option<&'s str>,
    /// The page's file, made already.
    pub page: Option<(&'s File, &'s Path)>,
}

impl Shown<'_> {
    /// Writes the page where one is wanted; prints the text, or where it is JSON that `json`
    /// tells.
    pub(in crate::commands) fn print(
        &self,
        context: &Context,
        json: &serde_json::Value,
    ) -> Result<(), Failure> {
        let made_at = Timestamp::now()
            .strftime("%Y-%m-%d %H:%M:%S UTC")
            .to_string();
        let jobs = jobs(context, self.resolved);
        let key_file = key_file(self.resolved);
        let sheet = Sheet {
            target: &self.resolved.target,
            ssh_command: &self.resolved.ssh_command,
            pins: self.pins,
            recovery_key: self
                .recovery
                .unwrap_or("____-____-____-____-____-____-____-____-____-____"),
            key_file: key_file
                .as_ref()
                .map(|(path, sha256)| (path.as_path(), sha256.as_str())),
            jobs: &jobs,
        };
        if let Some((file, path)) = self.page {
            let page = sheet_page::page(&sheet, &made_at, self.recovery)?;
            sheet_page::write(file, path, &page)?;
            context.output.note(&format!(
                "{} is SECRET: print it, keep the paper off this machine, and delete the file",
                path.display()
            ));
        }
        let text = Zeroizing::new(match self.page {
            // The secret once is enough.
            Some(_) => String::new(),
            None => sheet.text(&made_at),
        });
        context.output.result(&text, json)
    }
}

/// Jobs that the config sends into this container.
pub(in crate::commands) fn jobs(context: &Context, resolved: &Resolved) -> Vec<String> {
    let jobs = context.config.jobs.iter();
    jobs.filter(|job| job.container == resolved.name)
        .map(|job| job.name.to_string())
        .collect()
}

/// The key file that this machine opens the container with, and its hash.
fn key_file(resolved: &Resolved) -> Option<(std::path::PathBuf, String)> {
    let SecretSource::KeyFile(path) = &resolved.secret else {
        return None;
    };
    let bytes = Zeroizing::new(std::fs::read(path).ok()?);
    Some((
        path.clone(),
        secrets::sha256_hex(&Secret::key_file(bytes.to_vec())),
    ))
}

pub(super) fn print_again(context: &Context, args: &KeySheetArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let recovery = if args.without_secret {
        None
    } else {
        Some(recovery_key(context)?)
    };
    let file = open(&resolved)?;
    let header = judged(context, &resolved, &*file)?;
    if let Some(recovery) = &recovery {
        header.unlock(&reach::HeaderBytes(&*file), &recovery.secret())?;
    }
    let html = args
        .html
        .as_ref()
        .map(|path| context.environment.absolute(path));
    let page = match &html {
        Some(path) => Some((sheet_page::create(path)?, path)),
        None => None,
    };
    let pins = header.pins();
    let shown = Shown {
        resolved: &resolved,
        pins: &pins,
        recovery: recovery.as_ref().map(RecoveryKey::text),
        page: page.as_ref().map(|(file, path)| (file, path.as_path())),
    };
    let json = json!({
        "command": "key sheet",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "uuid": header.uuid(),
        "fingerprint": pins.fingerprint(),
        "recovery_key": recovery.as_ref().map(RecoveryKey::text),
        "page": html,
    });
    shown.print(context, &json)?;
    Ok(Exit::Done)
}

/// What a person reads off the sheet: never what the config or a default would take.
fn from_the_sheet(context: &Context) -> Result<SecretSource, Failure> {
    let global = &context.global;
    let absolute = |path: &std::path::PathBuf| context.environment.absolute(path);
    Ok(
        match (
            &global.key_file,
            &global.passphrase_file,
            &global.passphrase_command,
        ) {
            (Some(path), _, _) => SecretSource::KeyFile(absolute(path)),
            (_, Some(path), _) => SecretSource::PassphraseFile(absolute(path)),
            (_, _, Some(text)) => SecretSource::PassphraseCommand(
                config::split_words(text)
                    .map_err(|what| Failure::usage(format!("--passphrase-command: {what}")))?,
            ),
            (None, None, None) => SecretSource::Terminal,
        },
    )
}

fn recovery_key(context: &Context) -> Result<RecoveryKey, Failure> {
    if context.global.key_file.is_some() {
        return Err(
            Failure::usage("the sheet shows a recovery key, not a key file")
                .with_hint("leave --key-file out and type the recovery key; or --without-secret"),
        );
    }
    let secret = from_the_sheet(context)?.fetch(context.output, &context.interrupt)?;
    std::str::from_utf8(secret.expose())
        .ok()
        .and_then(|typed| RecoveryKey::parse(typed).ok())
        .ok_or_else(|| {
            Failure::usage("that is no recovery key").with_hint(
                "it has ten groups of four characters. `sprat key add --new-recovery` makes a new \
                 one where the old one is lost",
            )
        })
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
    let secret = source.fetch(context.output, &context.interrupt)?;
    let file = open(&resolved)?;
    let header = judged(context, &resolved, &*file)?;
    if !typed.is_empty() {
        header.check_fingerprint(&typed)?;
    }
    let (slot, key) = header.unlock_by(&reach::HeaderBytes(&*file), &secret)?;
    let cipher = SectorCipher::new(&key, &header)?;
    drop(key);
    let payload = header.geometry(file.len()?)?;
    let reads = file_system_is_there(&*file, payload.offset_bytes, &cipher)?;
    let slots = header.slots();
    let mark = slots.iter().find(|found| found.number == slot);
    let state_dir = state_dir(context);
    let mut notes = KeyNotes::load(&state_dir, header.uuid());
    if let Some(found) = mark {
        notes.prove(&found.mark, Timestamp::now());
        // Only for the list: the proof itself counts.
        let _ = notes.store(&state_dir, header.uuid());
    }
    let json = json!({
        "command": "key rehearse",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "uuid": header.uuid(),
        "fingerprint": header.pins().fingerprint(),
        "slot": slot,
        "file_system": reads,
    });
    let volume = if reads {
        "and the file system behind it reads"
    } else {
        "but behind it lies no ext4 file system"
    };
    let said = format!(
        "the key opens {} (slot {slot}), {volume}\nits fingerprint is {}\n",
        resolved.target,
        header.pins().fingerprint()
    );
    context.output.result(&said, &json)?;
    Ok(Exit::Done)
}

/// Whether ext4's magic number decrypts (Documentation/filesystems/ext4/super.rst, `s_magic`).
fn file_system_is_there(
    file: &dyn StoreFile,
    offset: u64,
    cipher: &SectorCipher,
) -> Result<bool, Failure> {
    let mut block = [0; 4096];
    file.read_at(offset, &mut block, ReadClass::Demand)?;
    cipher.decrypt(0, &mut block)?;
    Ok(block[1024 + 0x38..1024 + 0x3a] == 0xEF53_u16.to_le_bytes())
}
