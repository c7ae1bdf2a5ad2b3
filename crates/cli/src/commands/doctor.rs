//! `sprat doctor`: diagnoses set-up problems of this machine, the config and the servers.

use clap::Args;
use serde_json::json;
use sprat_run::config::{CHANNEL_HINT, Job};
use sprat_session::diagnosis::{self, Finding, ServerCheck, State};
use sprat_session::text;

use super::context::{CommandArgs, Context, Resolved};
use crate::output::result_json;
use crate::secrets::SecretSource;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat doctor
  sprat doctor home ssh://u1234@example.org/backup/www.luks";

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Containers to check; the default is all of the config
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

impl CommandArgs for DoctorArgs {
    fn state_when_interrupted(&self) -> Option<&'static str> {
        Some("nothing was changed")
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve_all(&self.targets)?;
        let mut findings = diagnosis::host();
        findings.push(config(context));
        findings.extend(notices(context));
        let specs = context.config.jobs.iter().map(Job::spec);
        findings.extend(specs.flat_map(|spec| diagnosis::sources(&spec, &context.interrupt)));
        let state_dir = context.state_dir();
        for resolved in &resolved {
            context.interrupt.check()?;
            findings.push(key(resolved));
            findings.extend(diagnosis::server(&ServerCheck {
                name: &resolved.name,
                target: &resolved.target,
                ssh: &resolved.ssh,
                state_dir: &state_dir,
                fingerprint: context.global.fingerprint.as_deref(),
                allow_no_fsync: resolved.allow_no_fsync,
                connections: resolved.connections,
                reserve_bytes: context.global.reserve_bytes,
            }));
        }
        let missing = findings
            .iter()
            .filter(|found| found.state == State::Missing)
            .count();
        let exit = if missing == 0 {
            Exit::Done
        } else {
            Exit::Failed
        };
        let json = result_json("doctor", exit, json!({ "findings": findings }));
        context
            .output
            .listing(&diagnosis::table(&findings, missing), &json)?;
        Ok(exit)
    }
}

fn config(context: &Context) -> Finding {
    match context.config.files_in_words() {
        Some(files) => Finding::new(
            "config",
            State::Fine,
            format!(
                "{}: {}, {}",
                files,
                text::counted(
                    context.config.containers.len() as u64,
                    "container",
                    "containers"
                ),
                text::counted(context.config.jobs.len() as u64, "job", "jobs")
            ),
        ),
        None => Finding::new(
            "config",
            State::Fine,
            "no config; commands also work with a location as \
                              TARGET",
        ),
    }
}

/// Warns if nobody learns of a failure.
fn notices(context: &Context) -> Option<Finding> {
    let warning = context.config.no_channel()?;
    let finding = Finding::new("notices", State::Weak, warning.what);
    Some(finding.hint(CHANNEL_HINT))
}

/// Checks the source of the container's key, without reading the key.
fn key(resolved: &Resolved) -> Finding {
    let what = format!("{}: key", resolved.name);
    let path = match &resolved.secret {
        SecretSource::KeyFile(path) | SecretSource::PassphraseFile(path) => path,
        SecretSource::PassphraseCommand(words) => {
            let program = words.first().map(|word| word.to_string_lossy());
            let program = program.unwrap_or_default();
            return Finding::new(what, State::Fine, format!("the output of {program}"));
        }
        SecretSource::Terminal => {
            return Finding::new(what, State::Weak, "no key file; sprat prompts for the key on a \
                terminal").hint(
                "a run from a timer can't prompt: set key_file, passphrase_file or passphrase_command \
                 in the config",
            );
        }
    };
    match std::fs::metadata(path) {
        Ok(about) if about.is_file() && about.len() == 0 => {
            Finding::new(what, State::Missing, format!("{} is empty", path.display()))
        }
        Ok(_) => Finding::new(what, State::Fine, path.display().to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Finding::new(what, State::Weak, format!("{}: {error}", path.display()))
                .hint("run `sprat doctor` as the user that runs the backups")
        }
        Err(error) => Finding::new(what, State::Missing, format!("{}: {error}", path.display()))
            .hint("copy the key file back from your copy of it; the recovery key opens the container, \
                   too"),
    }
}
