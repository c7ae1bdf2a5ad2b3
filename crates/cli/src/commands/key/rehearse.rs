//! `sprat key rehearse`: verifies that what is on the recovery sheet opens the container.

use clap::Args;
use serde_json::json;
use sprat_luks::{RecoveryKey, Secret};
use sprat_session::state::key_notes::KeyKind;

use super::super::context::Context;
use super::change::{header, open};
use super::sheet::from_the_sheet;
use crate::args::TARGET_HELP;
use crate::secrets::SecretSource;
use crate::{Exit, Failure, terminal};

#[derive(Debug, Args)]
pub(super) struct RehearseArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
}

impl RehearseArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let source = from_the_sheet(context)?;
        let typed = match (&context.global.fingerprint, &source) {
            (None, SecretSource::Terminal) if terminal::is_there() => {
                terminal::ask_openly("Fingerprint on the sheet: ", &context.interrupt)?
            }
            _ => String::new(),
        };
        let secret = context.fetch(&source)?;
        let file = open(context, &resolved)?;
        let header = header(context, &file)?;
        if !typed.is_empty() {
            file.check_fingerprint(&header, &typed)?;
        }
        let rehearsed = file.rehearse(
            &header,
            &secret,
            context.global.accept_changed_keys,
            context.global.accept_older_state,
        );
        let slot = rehearsed.map_err(|failure| match (failure.exit, &source) {
            (Exit::WrongKey, SecretSource::Terminal) => failure.with_hint(
                "nothing was changed. Compare what you typed with the sheet, group by group, and run the \
                 command again",
            ),
            _ => failure,
        })?;
        file.note_proof(&header, slot, kind_of(&source, &secret));
        let fingerprint = header.pins().fingerprint();
        let text = format!(
            "the key opens {} (slot {slot}), and the file system in it can be read\n\
             its fingerprint is {fingerprint}\n",
            resolved.target
        );
        let fields = json!({
            "uuid": header.uuid(),
            "fingerprint": fingerprint,
            "slot": slot,
            "file_system": true,
        });
        context.finish("key rehearse", Exit::Done, &resolved.target, &text, fields)
    }
}

/// The kind of a key that was typed, or read from where it was named.
fn kind_of(source: &SecretSource, secret: &Secret) -> KeyKind {
    let typed = std::str::from_utf8(secret.expose());
    match source {
        SecretSource::KeyFile(_) => KeyKind::KeyFile,
        _ if typed.is_ok_and(|typed| RecoveryKey::parse(typed).is_ok()) => KeyKind::Recovery,
        _ => KeyKind::Passphrase,
    }
}
