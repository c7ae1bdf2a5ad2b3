//! `sprat key sheet`: prints the recovery sheet again.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sprat_luks::{RecoveryKey, RecoveryKeyError, Secret};
use sprat_run::recovery_sheet::{SheetJob, SheetParts};
use sprat_session::ssh_config::Known;

use super::super::context::{Context, Resolved};
use super::change::{header_to_show, open};
use crate::args::TARGET_HELP;
use crate::output::{path_json, result_json};
use crate::secrets::{self, SecretSource};
use crate::{Exit, Failure};

#[derive(Debug, Args)]
pub(super) struct SheetArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Write the sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Write the sheet as a page to print, with the recovery key as a QR code, instead of text
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Omit the recovery key, to write it in by hand
    #[arg(long)]
    without_secret: bool,
}

impl SheetArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let recovery = if self.without_secret {
            None
        } else {
            Some(recovery_key(context)?)
        };
        let file = open(context, &resolved)?;
        let header = header_to_show(context, &file)?;
        if let Some(recovery) = &recovery {
            header.unlock(&file.bytes(), &recovery.secret())?;
        }
        let known = Known::look_up(&resolved.target, &resolved.ssh.command);
        let text = self.html.is_none() || self.sheet.is_some();
        let on_stdout = context.output.json || (text && self.sheet.is_none());
        let files = context.sheet_files(
            self.sheet.as_ref(),
            self.html.as_ref(),
            on_stdout && recovery.is_some(),
        )?;
        let page = self.html.as_ref();
        let page = page.map(|path| context.environment.absolute(path));
        let pins = header.pins();
        let jobs = SheetJob::of_container(&context.config, &resolved.name);
        let mut parts = SheetParts::new(&resolved.target, known, jobs);
        parts.key_file = key_file(context, &resolved, |own| {
            header.unlock(&file.bytes(), own)?;
            Ok(())
        });
        let secret = recovery.as_ref().map(RecoveryKey::text);
        let fields = json!({
            "target": resolved.target.to_string(),
            "uuid": header.uuid(),
            "fingerprint": pins.fingerprint(),
            "recovery_key": secret,
            "page": page.as_deref().map(path_json),
            "sheet": files.text_path(),
        });
        let json = result_json("key sheet", Exit::Done, fields);
        let sheet = parts.sheet(&pins, secret);
        files.show_result(context.output, &sheet, secret, text, &json)?;
        Ok(Exit::Done)
    }
}

/// The key file that this machine uses, and its hash, if `opens` succeeds: a sheet shows no key file that
/// opens nothing.
pub(super) fn key_file(
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
                "the key file {} is not on the sheet, because it was not tested: {}",
                path.display(),
                failure.what
            ));
            None
        }
    }
}

/// The source of a key from the sheet: the command line or the terminal, never the config.
pub(super) fn from_the_sheet(context: &Context) -> Result<SecretSource, Failure> {
    Ok(context.named_source()?.unwrap_or(SecretSource::Terminal))
}

pub(in super::super) fn recovery_key(context: &Context) -> Result<RecoveryKey, Failure> {
    if context.global.key_file.is_some() {
        return Err(
            Failure::usage("the sheet shows a recovery key, not a key file")
                .with_hint("omit --key-file and type the recovery key, or use --without-secret"),
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
        _ => Err(Failure::usage("this is not a recovery key").with_hint(
            "a recovery key has ten groups of four characters. If it is lost, create a new one: `sprat \
             key add TARGET --new-recovery`",
        )),
    }
}
