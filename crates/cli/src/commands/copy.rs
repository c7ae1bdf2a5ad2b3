//! `sprat copy`: copies a container to another location, or moves it there.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use sprat_luks::{Pins, RecoveryKey};
use sprat_run::recovery_sheet::{SheetJob, SheetParts};
use sprat_session::copy::{CopyObserver, CopyOptions, CopyPhase, CopyReport, NewKeyOptions, copy};
use sprat_session::ssh_config::Known;
use sprat_session::state::key_notes;
use sprat_session::{Access, IdentityPolicy, connect, progress, text};
use sprat_store::StoreError;
use sprat_store::copy::{CopyProgress, CopyStep};

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
        let text = summary(&source, &destination, &report, self.new_key);
        let figures = report.figures;
        let fields = json!({
            "source": source.target.to_string(),
            "destination": destination.target.to_string(),
            "uuid": report.pins.uuid,
            "fingerprint": report.pins.fingerprint(),
            "container_bytes": report.container_bytes,
            "resumed_bytes": report.resumed_bytes,
            "read_bytes": figures.map_or(0, |figures| figures.read_bytes),
            "written_bytes": figures.map_or(0, |figures| figures.written_bytes),
            "verified_bytes": figures.map_or(0, |figures| figures.verified_bytes),
            "holes_by": report.holes_by,
            "new_key": self.new_key,
            "source_removed": report.source_removed,
            "source_found": report.source_found,
            "seconds": begun.elapsed().as_secs_f64(),
        });
        let json = result_json("copy", Exit::Done, fields);
        context.output.result(&text, &json)?;
        Ok(Exit::Done)
    }
}

fn has_no_folder(resolved: &Resolved) -> bool {
    let connected = connect::connect(&resolved.target, &resolved.ssh);
    matches!(connected, Err(StoreError::NotFound { .. }))
}

/// The result as text, and what is left to do.
fn summary(
    source: &Resolved,
    destination: &Resolved,
    report: &CopyReport,
    new_key: bool,
) -> String {
    let (from, to) = (&source.target, &destination.target);
    let verb = if report.source_removed {
        "moved"
    } else {
        "copied"
    };
    let mut text = format!("{verb} {from} to {to}\n");
    match &report.figures {
        Some(figures) => text.push_str(&format!(
            "{} long, {} written, {} read back and equal\n",
            text::bytes(report.container_bytes),
            text::bytes(figures.written_bytes),
            text::bytes(figures.verified_bytes),
        )),
        None => text.push_str("an earlier run had copied the container and read it back\n"),
    }
    if !report.source_found {
        text.push_str(&format!(
            "{from} is not there: an earlier run removed it, or its disk is not mounted. This machine \
             keeps its notes about {from}\n"
        ));
    }
    if new_key {
        text.push_str(&format!(
            "{to} has a new volume key. It opens with the key that was used here and with the \
             recovery key of the sheet that was shown when the copy began, and with no other key of \
             {from}: add others with\n  sprat key add {to}\n\
             Without that sheet, make another one with\n  sprat key add {to} --new-recovery\n"
        ));
    }
    let gone = report.source_removed || !report.source_found;
    if gone && !new_key {
        text.push_str(&format!(
            "The recovery sheet shows the old location. Print a new one:\n  sprat key sheet {to}\n"
        ));
    }
    if gone {
        text.push_str(&format!("In the config, write\n  target = \"{to}\"\n"));
    }
    if source.default_key_file != destination.default_key_file
        && let (Some(old), Some(new)) = (&source.default_key_file, &destination.default_key_file)
        && old.exists()
        && !new.exists()
    {
        text.push_str(&format!(
            "The key file is {}: give it with --key-file, or set key_file in the config\n",
            old.display()
        ));
    }
    text
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
        let (name, line) = phase_text(phase);
        self.reporter.step(line, &json!({ "phase": name }));
    }

    fn progress(&mut self, now: &CopyProgress) {
        if self.step.replace(now.step) != Some(now.step) {
            self.step_begun = Instant::now();
        }
        let rate = progress::bytes_per_s(now.done_bytes, self.step_begun.elapsed());
        let left_bytes = now.total_bytes.saturating_sub(now.done_bytes);
        let left = progress::time_left(left_bytes, rate);
        let event = json!({ "progress": {
            "phase": match now.step {
                CopyStep::Copying => "copying",
                CopyStep::Verifying => "verifying",
            },
            "done_bytes": now.done_bytes,
            "total_bytes": now.total_bytes,
            "read_bytes": now.read_bytes,
            "written_bytes": now.written_bytes,
            "verified_bytes": now.verified_bytes,
            "bytes_per_s": rate,
            "seconds_left": left.map(|left| left.as_secs()),
        }});
        let line = progress_text(now, rate, left);
        self.reporter.other_progress(&line, &event);
    }

    fn tell(&mut self, text: &str, matters: bool) {
        self.reporter.tell(text, matters);
    }
}

fn phase_text(phase: CopyPhase) -> (&'static str, &'static str) {
    match phase {
        CopyPhase::Opening => ("opening", "acquiring both locks"),
        CopyPhase::Mapping => ("mapping", "finding the data in the source"),
        CopyPhase::Copying => ("copying", "copying"),
        CopyPhase::Verifying => ("verifying", "reading back"),
        CopyPhase::Publishing => ("publishing", "renaming the copy to its final name"),
        CopyPhase::Removing => ("removing", "removing the source"),
    }
}

fn progress_text(progress: &CopyProgress, rate: Option<u64>, left: Option<Duration>) -> String {
    let doing = match progress.step {
        CopyStep::Copying => "copying",
        CopyStep::Verifying => "reading back",
    };
    let percent = progress.done_bytes * 100 / progress.total_bytes.max(1);
    let mut parts = vec![
        format!("{doing}, {percent}%"),
        format!(
            "{} of {}",
            text::bytes(progress.done_bytes),
            text::bytes(progress.total_bytes)
        ),
    ];
    if progress.step == CopyStep::Copying && progress.written_bytes < progress.done_bytes / 2 {
        parts.push(format!("{} sent", text::bytes(progress.written_bytes)));
    }
    parts.extend(rate.map(|rate| format!("{}/s", text::bytes(rate))));
    parts.extend(left.map(|left| format!("{} left", text::duration(left))));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_rate_and_time_left_of_the_step() {
        let progress = CopyProgress {
            step: CopyStep::Copying,
            done_bytes: 300 << 20,
            total_bytes: 1 << 30,
            read_bytes: 300 << 20,
            written_bytes: 10 << 20,
            verified_bytes: 0,
        };
        insta::assert_snapshot!(
            progress_text(&progress, Some(10 << 20), Some(Duration::from_secs(72))),
            @"copying, 29%, 300 MiB of 1.0 GiB, 10.0 MiB sent, 10.0 MiB/s, 1 min 12 s left"
        );
    }
}
