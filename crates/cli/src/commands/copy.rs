//! `sprat copy`: copies a container to another location, or moves it there.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use sprat_luks::{Pins, RecoveryKey};
use sprat_run::copy_text::{self, CopyDone};
use sprat_run::recovery_sheet::{SheetJob, SheetParts};
use sprat_session::copy::{
    CopyObserver, CopyOptions, CopyPhase, CopyProgress, CopyStep, NewKeyOptions, copy,
};
use sprat_session::ssh_config::Known;
use sprat_session::state::key_notes;
use sprat_session::{Access, IdentityPolicy, connect};
use sprat_store::StoreError;

use super::context::{CommandArgs, Context, Resolved};
use crate::output::{Reporter, result_json};
use crate::secrets::{self, SecretSource};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat copy home /mnt/usb/home.luks
  sprat copy --move /mnt/usb/home.luks ssh://u1234@example.org/backup/home.luks
  sprat copy --new-key --move --sheet sheet.txt home ssh://u1234@example.org/backup/home2.luks";

pub(super) const NOTES: &str = "\
A copy needs no key, except with --new-key. Holes stay holes. If the copy is interrupted, the same
command continues it. DST gets its name only after sprat has read all of it back. With --new-key
the sheet is shown only when the copy begins, not when it continues.";

#[derive(Debug, Args)]
pub(super) struct CopyArgs {
    /// The container
    #[arg(value_name = "SRC")]
    source: String,
    /// The new location, or its name in the config; no file may exist there
    #[arg(value_name = "DST")]
    destination: String,
    /// Remove SRC when DST is read back and durable
    #[arg(long = "move")]
    remove_source: bool,
    /// Encrypt DST with a new volume key; two keys open DST: the key of SRC that this command uses, and
    /// the recovery key of the new sheet
    #[arg(long)]
    new_key: bool,
    /// With --new-key: write the recovery sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE", requires = "new_key")]
    sheet: Option<PathBuf>,
    /// With --new-key: also write the sheet as a page to print, with the recovery key as a QR code
    #[arg(long, value_name = "FILE", requires = "new_key")]
    html: Option<PathBuf>,
}

impl CommandArgs for CopyArgs {
    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let source = context.resolve(&self.source)?;
        let destination = context.resolve(&self.destination)?;
        let source_options = context.session_options(&source, Access::ReadOnly)?;
        if self.new_key && context.output.json && self.sheet.is_none() {
            return Err(
                Failure::usage("with --json a copy with a new key needs --sheet FILE").with_hint(
                    "nothing was changed. The sheet is shown only when the copy begins; a run that \
                     continues a copy can't show it again",
                ),
            );
        }
        // A copy needs no key, so the user is not asked for one. A key that was found in the config is not
        // used on a header that this machine does not know.
        let source_key = if self.new_key {
            Some(context.secret(&source)?)
        } else if context.named_source()?.is_some() {
            Some(context.fetch(&source.secret)?)
        } else if source.secret == SecretSource::Terminal
            || matches!(source_options.pins, IdentityPolicy::TrustOnce)
        {
            None
        } else {
            context.fetch(&source.secret).ok()
        };
        let new_sheet = source_key.as_ref().filter(|_| self.new_key).map(|secret| {
            let known = Known::look_up(&destination.target, &destination.ssh.command);
            let jobs = [&destination, &source]
                .map(|resolved| SheetJob::of_container(&context.config, &resolved.name))
                .into_iter()
                .find(|jobs| !jobs.is_empty())
                .unwrap_or_default();
            let mut parts = SheetParts::new(&destination.target, known, jobs);
            if let SecretSource::KeyFile(path) = &source.secret {
                parts.key_file = Some((path.clone(), secrets::sha256_hex(secret)));
            }
            NewSheet {
                context,
                args: self,
                parts,
            }
        });
        let new_key = source_key.as_ref().filter(|_| self.new_key);
        let options = CopyOptions {
            new_key: new_key.map(|secret| NewKeyOptions {
                kind: source.secret.slot_kind(secret),
                fast_kdf_for_tests: context.global.cheap_kdf_for_tests,
            }),
            source_key,
            source: source_options,
            destination: context.session_options(&destination, Access::ReadOnly)?,
            remove_source: self.remove_source,
        };
        let begun = Instant::now();
        let mut shown = Shown {
            reporter: Reporter::new(context.output, ""),
            step_begun: Instant::now(),
            step: None,
            new_sheet,
        };
        let report = copy(&options, &mut shown, &context.interrupt);
        shown.reporter.clear();
        let report = report.map_err(|mut failure| {
            // A missing folder at the destination is not a missing container.
            if failure.exit == Exit::NoContainer && has_no_folder(&destination) {
                failure.exit = Exit::Failed;
            }
            failure
        })?;
        if self.new_key {
            let state_dir = &options.destination.state_dir;
            let target = &destination.target;
            let kind = source.secret.key_kind();
            key_notes::note_new_container(state_dir, &report.pins.uuid, target, kind);
        }
        let key_files = (&source.default_key_file, &destination.default_key_file);
        let old_key_file = match key_files {
            (Some(old), Some(new)) if old != new && old.exists() && !new.exists() => Some(old),
            _ => None,
        };
        let done = CopyDone {
            source: &source.target,
            destination: &destination.target,
            report: &report,
            new_key: self.new_key,
            old_key_file: old_key_file.map(PathBuf::as_path),
        };
        let (text, fields) = (done.text(), done.json(begun.elapsed()));
        let json = result_json("copy", Exit::Done, fields);
        context.output.result(&text, &json)?;
        Ok(Exit::Done)
    }
}

fn has_no_folder(resolved: &Resolved) -> bool {
    let connected = connect::connect(&resolved.target, &resolved.ssh);
    matches!(connected, Err(StoreError::NotFound { .. }))
}

/// Shows a copy to the user.
struct Shown<'a> {
    reporter: Reporter,
    step_begun: Instant,
    step: Option<CopyStep>,
    new_sheet: Option<NewSheet<'a>>,
}

/// The sheet of a copy with a new key.
struct NewSheet<'a> {
    context: &'a Context,
    args: &'a CopyArgs,
    parts: SheetParts,
}

impl NewSheet<'_> {
    /// Writes the sheet, or shows it.
    fn show(&self, pins: &Pins, recovery: &RecoveryKey) -> Result<(), Failure> {
        let output = self.context.output;
        let (text, page) = (self.args.sheet.as_ref(), self.args.html.as_ref());
        let files = self.context.sheet_files(text, page, text.is_none())?;
        let sheet = self.parts.sheet(pins, Some(recovery.text()));
        let shown = files.show(output, &sheet, recovery.text());
        shown.inspect_err(|_| files.remove())
    }
}

impl CopyObserver for Shown<'_> {
    fn new_key(&mut self, pins: &Pins, recovery: &RecoveryKey) -> Result<(), Failure> {
        self.reporter.clear();
        match &self.new_sheet {
            Some(sheet) => sheet.show(pins, recovery),
            None => unreachable!("none was asked for"),
        }
    }

    fn phase(&mut self, phase: CopyPhase) {
        let (name, line) = copy_text::phase_text(phase);
        self.reporter.step(line, &json!({ "phase": name }));
    }

    fn progress(&mut self, now: &CopyProgress) {
        if self.step.replace(now.step) != Some(now.step) {
            self.step_begun = Instant::now();
        }
        let (line, json) = copy_text::progress(now, self.step_begun.elapsed());
        let event = json!({ "progress": json });
        self.reporter.other_progress(&line, &event);
    }

    fn tell(&mut self, text: &str, matters: bool) {
        self.reporter.tell(text, matters);
    }
}
