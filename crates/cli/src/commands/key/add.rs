//! `sprat key add`: adds a key.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use jiff::Timestamp;
use serde_json::json;
use sprat_luks::{RecoveryKey, Secret, SlotKind};
use sprat_run::recovery_sheet::{SheetJob, SheetParts};
use sprat_session::HeaderChange;
use sprat_session::ssh_config::Known;
use sprat_session::state::key_notes::{KeyKind, KeyNote};

use super::super::context::{Context, Resolved};
use super::change::{change_header, header, note_key, open};
use super::sheet::key_file;
use crate::args::TARGET_HELP;
use crate::output::result_json;
use crate::secrets::{NewKeyFile, SecretSource};
use crate::{Exit, Failure};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("new").required(true)))]
pub(super) struct AddArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Add this key file as a key; if the file is missing, sprat creates it
    #[arg(long, value_name = "FILE", group = "new")]
    new_key_file: Option<PathBuf>,
    /// Add a passphrase; prompts for it twice on the terminal
    #[arg(long, group = "new")]
    new_passphrase: bool,
    /// Add the passphrase in this file
    #[arg(long, value_name = "FILE", group = "new")]
    new_passphrase_file: Option<PathBuf>,
    /// Create a new recovery key, add it, and print the recovery sheet
    #[arg(long, group = "new")]
    new_recovery: bool,
    /// Set a label for `sprat key list`; it is stored on this machine only
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// With --new-recovery: write the sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE", requires = "new_recovery")]
    sheet: Option<PathBuf>,
    /// With --new-recovery: also write the sheet as a page to print
    #[arg(long, value_name = "FILE", requires = "new_recovery")]
    html: Option<PathBuf>,
}

impl AddArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let mut resolved = context.resolve(&self.target)?;
        let adds_own = self.adds_own_key_file(context, &resolved)?;
        if adds_own {
            resolved.secret = SecretSource::Terminal;
            resolved.default_key_file = None;
        }
        let secret = context.secret(&resolved);
        let secret = secret.map_err(|failure| match adds_own && failure.exit == Exit::Usage {
            true => failure.because(
                "the default key file is the one to add: another key must open the container",
            ),
            false => failure,
        })?;
        // It may take seconds, so it is done before anything is created.
        let known = match self.new_recovery {
            true => Known::look_up(&resolved.target, &resolved.ssh.command),
            false => Known::default(),
        };
        let on_stdout = context.output.json || self.sheet.is_none();
        let files = context.sheet_files(
            self.sheet.as_ref(),
            self.html.as_ref(),
            self.new_recovery && on_stdout,
        )?;
        let new = new_key(context, self).inspect_err(|_| files.remove())?;
        let change = HeaderChange::Add {
            secret: new.secret,
            kind: new.slot_kind,
            fast_kdf_for_tests: context.global.cheap_kdf_for_tests,
        };
        let changed = match change_header(context, &resolved, &secret, &change) {
            Ok(changed) => changed,
            Err(failure) => {
                files.remove();
                let beside = new.file.as_ref().and_then(NewKeyFile::beside);
                return Err(match (new.kind, beside) {
                    (KeyKind::Recovery, _) => failure.with_more_hint(
                        "The new recovery key was discarded. If `sprat key list` shows a new slot, \
                         remove it",
                    ),
                    // The slot may be there: a connection that was lost does not say.
                    (_, Some(file)) => failure.with_more_hint(&format!(
                        "The new key stays in {}. The same command uses it",
                        file.display()
                    )),
                    _ => failure,
                });
            }
        };
        if let Some(file) = &new.file
            && file.finish()?
        {
            let path = file.path().display();
            context.output.note(&format!("created the key file {path}"));
        }
        note_key(context, &changed, |notes| {
            let known = notes.of(&changed.mark).cloned();
            let known = known.filter(|_| changed.as_before).unwrap_or(KeyNote {
                mark: changed.mark.clone(),
                kind: new.kind,
                label: None,
                added: Some(Timestamp::now()),
                proved: None,
            });
            notes.note(KeyNote {
                label: self.label.clone().or(known.label),
                ..known
            });
        });
        let fields = json!({
            "target": resolved.target.to_string(),
            "slot": changed.slot,
            "was_there": changed.as_before,
            "recovery_key": new.recovery.as_ref().map(RecoveryKey::text),
        });
        let json = result_json("key add", changed.exit(), fields);
        let opens = match changed.as_before {
            true => "already opened with",
            false => "opens with the new key, in",
        };
        let result = format!("{} {opens} key slot {}\n", resolved.target, changed.slot);
        let Some(recovery) = &new.recovery else {
            context.output.result(&result, &json)?;
            return Ok(changed.exit());
        };
        let jobs = SheetJob::of_container(&context.config, &resolved.name);
        let mut parts = SheetParts::new(&resolved.target, known, jobs);
        parts.key_file = key_file_now(context, &resolved, &secret);
        let sheet = parts.sheet(&changed.facts.pins, Some(recovery.text()));
        let shown = files.show_result(context.output, &sheet, Some(recovery.text()), true, &json);
        shown.map_err(|failure| {
            failure.with_hint(format!(
                "the new recovery key is in slot {}, but not all of its sheet was shown. If you have \
                 the recovery key, print the sheet again with `sprat key sheet`. Otherwise remove the \
                 slot with `sprat key remove`, and add another key",
                changed.slot
            ))
        })?;
        context.output.note(result.trim_end());
        Ok(changed.exit())
    }

    /// Whether this machine would open the container with the very key file that is to be added. Only another
    /// key can add it.
    fn adds_own_key_file(&self, context: &Context, resolved: &Resolved) -> Result<bool, Failure> {
        let (SecretSource::KeyFile(own), Some(new)) = (&resolved.secret, &self.new_key_file) else {
            return Ok(false);
        };
        let named = context.named_source()?.is_some();
        Ok(!named && *own == context.environment.absolute(new))
    }
}

/// A new key.
struct New {
    secret: Secret,
    slot_kind: SlotKind,
    kind: KeyKind,
    recovery: Option<RecoveryKey>,
    file: Option<NewKeyFile>,
}

fn new_key(context: &Context, args: &AddArgs) -> Result<New, Failure> {
    if args.new_recovery {
        let recovery = RecoveryKey::generate()
            .map_err(|error| Failure::from(&error).context("can't create a recovery key"))?;
        return Ok(New {
            secret: recovery.secret(),
            slot_kind: SlotKind::Recovery,
            kind: KeyKind::Recovery,
            recovery: Some(recovery),
            file: None,
        });
    }
    let absolute = |path: &PathBuf| context.environment.absolute(path);
    let file = args.new_key_file.as_ref();
    let file = file.map(|path| NewKeyFile::begin(&absolute(path)));
    let file = file.transpose()?;
    let source = match (&file, &args.new_passphrase_file) {
        (Some(file), _) => SecretSource::KeyFile(file.present().to_owned()),
        (None, Some(path)) => SecretSource::PassphraseFile(absolute(path)),
        (None, None) => SecretSource::Terminal,
    };
    let (secret, slot_kind) = source.fetch_for_new(context.output, &context.interrupt)?;
    Ok(New {
        secret,
        slot_kind,
        kind: source.key_kind(),
        recovery: None,
        file,
    })
}

/// The key file for the sheet, right after `secret` has opened the container.
fn key_file_now(
    context: &Context,
    resolved: &Resolved,
    secret: &Secret,
) -> Option<(PathBuf, String)> {
    key_file(context, resolved, |own| {
        if own.expose() == secret.expose() {
            return Ok(());
        }
        let file = open(context, resolved)?;
        header(context, &file)?.unlock(&file.bytes(), own)?;
        Ok(())
    })
}
