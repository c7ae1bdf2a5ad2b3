//! `sprat doctor`: diagnoses set-up problems of this machine, the config and the servers.

mod rsync;

use std::process::{Command, Stdio};

use clap::Args;
use serde::Serialize;
use serde_json::json;
use sprat_attach::{Severity, check_host};
use sprat_luks::Copies;
use sprat_session::state::history::History;
use sprat_session::state::paths::StatePaths;
use sprat_session::state::{identity, moved, reserved_names};
use sprat_session::{
    IdentityPolicy, RESERVE_FREE_TIMES, SERVER_SPACE_LOW_BYTES, connect, reserve_name, text,
};
use sprat_snapshot::SnapshotError;
use sprat_store::{Access, FileStat, Store, StoreError, lock};

use super::context::{CommandArgs, Context, Resolved};
use crate::config::Job;
use crate::output::result_json;
use crate::secrets::SecretSource;
use crate::{Exit, Failure};

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    state: State,
    detail: String,
    hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Fine,
    Weak,
    Missing,
}

impl Finding {
    fn new(what: impl Into<String>, state: State, detail: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            state,
            detail: detail.into(),
            hint: None,
        }
    }

    fn failed(what: impl Into<String>, failure: &Failure) -> Self {
        let mut detail = failure.what.clone();
        for cause in &failure.causes {
            detail.push_str(": ");
            detail.push_str(cause);
        }
        Self {
            hint: failure.hint.clone(),
            ..Self::new(what, State::Missing, detail)
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

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
        let mut findings: Vec<Finding> = check_host()
            .into_iter()
            .map(|found| Finding {
                what: found.what.to_owned(),
                state: match found.severity {
                    Severity::Fine => State::Fine,
                    Severity::Weak => State::Weak,
                    _ => State::Missing,
                },
                detail: found.detail,
                hint: found.hint,
            })
            .collect();
        findings.extend(PROGRAMS.iter().map(program));
        let rsync = findings.iter().find(|found| found.what == "rsync");
        if rsync.is_some_and(|found| found.state == State::Fine) {
            findings.push(rsync::links());
        }
        findings.push(config(context));
        findings.extend(context.config.jobs.iter().flat_map(sources));
        for resolved in &resolved {
            context.interrupt.check()?;
            check_target(context, resolved, &mut findings);
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
        context.output.listing(&report(&findings, missing), &json)?;
        Ok(exit)
    }
}

/// A program, how it tells its version, and what it is for.
struct Program {
    name: &'static str,
    arguments: &'static [&'static str],
    needed: bool,
    purpose: &'static str,
}

const PROGRAMS: [Program; 5] = [
    Program {
        name: "ssh",
        arguments: &["-V"],
        needed: true,
        purpose: "reaches the servers",
    },
    Program {
        name: "rsync",
        arguments: &["--version"],
        needed: true,
        purpose: "copies",
    },
    Program {
        name: "e2fsck",
        arguments: &["-V"],
        needed: false,
        purpose: "checks volumes",
    },
    Program {
        name: "cryptsetup",
        arguments: &["--version"],
        needed: false,
        purpose: "opens containers without sprat",
    },
    Program {
        name: "sshfs",
        arguments: &["--version"],
        needed: false,
        purpose: "reaches containers without sprat",
    },
];

fn program(program: &Program) -> Finding {
    let ran = Command::new(program.name)
        .args(program.arguments)
        .stdin(Stdio::null())
        .output();
    let state = if program.needed {
        State::Missing
    } else {
        State::Weak
    };
    match ran {
        Ok(output) => {
            let works = output.status.success();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
            let first = lines.clone().next();
            // sshfs tells that of FUSE first.
            let own = lines.find(|line| line.to_lowercase().starts_with(program.name));
            let version = own.or(first);
            let version = version.unwrap_or("it printed no version");
            if works {
                let version = text::harmless_within(version, 60);
                return Finding::new(program.name, State::Fine, version);
            }
            let version = text::harmless_within(version, 200);
            Finding::new(
                program.name,
                state,
                format!("it starts, but fails ({}): {version}", output.status),
            )
            .hint(format!("install it again: it {}", program.purpose))
        }
        Err(error) => Finding::new(program.name, state, format!("can't be started: {error}"))
            .hint(format!("install it: it {}", program.purpose)),
    }
}

fn config(context: &Context) -> Finding {
    match &context.config.path {
        Some(path) => Finding::new(
            "config",
            State::Fine,
            format!(
                "{}: {}, {}",
                path.display(),
                text::counted(
                    context.config.containers.len() as u64,
                    "container",
                    "containers"
                ),
                text::counted(context.config.jobs.len() as u64, "job", "jobs")
            ),
        ),
        None => Finding::new("config", State::Fine, "none; every command can do without"),
    }
}

/// The sources of a job that can't be backed up as things are; one line where all can.
fn sources(job: &Job) -> Vec<Finding> {
    let what = format!("job {}: sources", job.name);
    let refused = sprat_snapshot::mistakes(&job.spec()).into_iter();
    let mut findings: Vec<Finding> = refused
        .map(|mistake| Finding::new(&what, State::Missing, mistake.to_string()))
        .collect();
    for (path, hint) in job
        .sources
        .iter()
        .map(|path| (path, "mount its disk, or take it out of the job"))
        .chain(job.exclude_from.iter().map(|path| {
            (
                path,
                "make the file with patterns, or take it out of the job",
            )
        }))
    {
        if let Err(error) = std::fs::symlink_metadata(path) {
            let detail = format!("{}: {error}", path.display());
            // Who is not root may not be able to look everywhere.
            let state = if error.kind() == std::io::ErrorKind::PermissionDenied {
                State::Weak
            } else {
                State::Missing
            };
            findings.push(Finding::new(&what, state, detail).hint(hint));
        }
    }
    // What is missing, or is a link, was said above.
    for path in job.sources.iter().filter(|path| !path.is_symlink()) {
        let refused = sprat_snapshot::check_source(path, job.allow_empty).err();
        if let Some(
            error @ (SnapshotError::SourceEmpty { .. } | SnapshotError::SourceRefused { .. }),
        ) = refused
        {
            let finding = Finding::new(&what, State::Missing, error.to_string());
            findings.push(finding.hint(
                "a backup refuses it: mount its disk, take it out of the job, or, for an empty \
                 folder, put allow_empty = true into the job",
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::new(what, State::Fine, "all are there"));
    }
    findings
}

/// Where the container's key comes from, without reading it.
fn key(resolved: &Resolved) -> Finding {
    let what = format!("{}: key", resolved.name);
    let path = match &resolved.secret {
        SecretSource::KeyFile(path) | SecretSource::PassphraseFile(path) => path,
        SecretSource::PassphraseCommand(words) => {
            let program = words.first().map(|word| word.to_string_lossy());
            let program = program.unwrap_or_default();
            return Finding::new(what, State::Fine, format!("what {program} prints"));
        }
        SecretSource::Terminal => {
            return Finding::new(what, State::Weak, "no key file; asked for on a terminal").hint(
                "what runs without a terminal, such as a timer, needs a key_file in the config",
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
                .hint("run doctor as the user that backs up")
        }
        Err(error) => Finding::new(what, State::Missing, format!("{}: {error}", path.display()))
            .hint("put it there from where its copy is kept; the recovery key opens the container, too"),
    }
}

fn check_target(context: &Context, resolved: &Resolved, findings: &mut Vec<Finding>) {
    let name = &resolved.name;
    findings.push(key(resolved));
    let store = match connect::connect(&resolved.target, &resolved.ssh_command) {
        Ok(store) => store,
        Err(error) => {
            findings.push(Finding::failed(
                format!("{name}: server"),
                &Failure::from(error),
            ));
            return;
        }
    };
    findings.push(Finding::new(
        format!("{name}: server"),
        State::Fine,
        store.describe(),
    ));
    findings.push(fsync(name, resolved, &*store));
    findings.extend(removal(name, resolved, &*store));
    let stat = store.stat(&resolved.target.name).ok();
    findings.push(space(name, stat.as_ref(), &*store));
    if stat.is_some() {
        findings.extend(reserve(context, resolved, &*store));
    }
    findings.extend(volume(context, resolved));
    findings.push(lock_state(name, resolved, &*store));
    findings.push(container(context, resolved, &*store));
}

/// What the last session of this machine saw free in the volume.
fn volume(context: &Context, resolved: &Resolved) -> Option<Finding> {
    let state_dir = context.state_dir();
    let policy = identity::policy(&state_dir, &resolved.target, None).ok()?;
    let IdentityPolicy::Known(pins) = policy else {
        return None;
    };
    let seen = History::load(&StatePaths::new(&state_dir, &pins.uuid, &resolved.target)).room?;
    let room = seen.room;
    let what = format!("{}: volume", resolved.name);
    let detail = format!(
        "{} and {} free at the last session",
        text::bytes(room.available_bytes),
        text::counted(room.free_inodes, "file", "files")
    );
    let state = match room.available_bytes == 0 || room.free_inodes == 0 {
        true => State::Missing,
        false if room.is_low() => State::Weak,
        false => return Some(Finding::new(what, State::Fine, detail)),
    };
    Some(Finding::new(what, state, detail).hint("`sprat prune` removes snapshots; `sprat grow`"))
}

fn fsync(name: &str, resolved: &Resolved, store: &dyn Store) -> Finding {
    let what = format!("{name}: fsync");
    if store.capabilities().durable_flush {
        return Finding::new(what, State::Fine, "writes can be made durable");
    }
    let state = if resolved.allow_no_fsync {
        State::Weak
    } else {
        State::Missing
    };
    Finding::new(what, state, "the server can't make writes durable").hint(
        "an OpenSSH server can (fsync@openssh.com); --allow-no-fsync writes all the same, \
         and a crash of the server may then lose the container",
    )
}

/// An account that may not remove files; one that may is not worth a line.
fn removal(name: &str, resolved: &Resolved, store: &dyn Store) -> Option<Finding> {
    if !reserved_names::may_not_remove(store, &resolved.target.name) {
        return None;
    }
    let finding = Finding::new(
        format!("{name}: removal"),
        State::Weak,
        "this account may not remove files",
    );
    Some(finding.hint(reserved_names::WITHOUT_REMOVING))
}

fn space(name: &str, container: Option<&FileStat>, store: &dyn Store) -> Finding {
    let what = format!("{name}: space");
    match store.free_space() {
        Ok(space) if space.read_only => {
            Finding::new(what, State::Weak, "the server's file system is read-only")
                .hint("restore and mount work; backup does not")
        }
        Ok(space) => {
            let mut detail = format!(
                "{} of {} free",
                text::bytes(space.available_bytes),
                text::bytes(space.total_bytes)
            );
            // SFTP tells a file's length only, which is what it may become.
            if let Some(container) = container {
                let limit = text::bytes(container.len);
                detail.push_str(&match container.allocated_bytes {
                    Some(taken) => {
                        format!("; the container takes {} of {limit}", text::bytes(taken))
                    }
                    None => format!("; the container may grow to {limit}"),
                });
            }
            if space.available_bytes < SERVER_SPACE_LOW_BYTES {
                return Finding::new(what, State::Weak, detail)
                    .hint("make room there, or with `sprat prune` and `sprat trim`");
            }
            Finding::new(what, State::Fine, detail)
        }
        Err(StoreError::Unsupported { .. }) => Finding::new(
            what,
            State::Weak,
            "the server doesn't tell its free space (no statvfs@openssh.com)",
        )
        .hint("nobody warns before its disk is full: watch the room there by other means"),
        Err(error) => Finding::failed(what, &Failure::from(error)),
    }
}

/// The file beside the container that pruning gives up on a full disk. Before there is a container there
/// is nothing to keep room for.
fn reserve(context: &Context, resolved: &Resolved, store: &dyn Store) -> Option<Finding> {
    let wanted_bytes = context.global.reserve_bytes;
    let container = &resolved.target.name;
    if wanted_bytes == 0 {
        return None;
    }
    let what = format!("{}: reserve", resolved.name);
    let found = reserve_name(container).and_then(|name| match store.stat(&name) {
        Ok(stat) => Ok(Some(stat.len)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(Failure::from(error)),
    });
    let size = text::bytes(wanted_bytes);
    let missing = match found {
        Err(failure) => return Some(Finding::failed(what, &failure)),
        Ok(Some(len)) if len >= wanted_bytes => {
            let detail = format!("{size} are kept, so that pruning works on a full disk");
            return Some(Finding::new(what, State::Fine, detail));
        }
        Ok(Some(len)) => format!("only {} of {size} are there", text::bytes(len)),
        Ok(None) => "missing: on a full disk even pruning may not work".to_owned(),
    };
    Some(Finding::new(what, State::Weak, missing).hint(format!(
        "the next backup makes it at its end, if {} are free on the server then",
        text::bytes(wanted_bytes.saturating_mul(RESERVE_FREE_TIMES))
    )))
}

fn lock_state(name: &str, resolved: &Resolved, store: &dyn Store) -> Finding {
    let what = format!("{name}: lock");
    match lock::inspect(store, &resolved.target.name, None).map(|found| found.held) {
        Ok(None) => Finding::new(what, State::Fine, "not locked"),
        Ok(Some(info)) => Finding::new(what, State::Weak, format!("locked by {}", info.file)).hint(
            "a backup is running, or one died; on the machine where it died the next run \
                 takes over, elsewhere `sprat unlock` does",
        ),
        Err(error) => Finding::failed(what, &Failure::from(&error)),
    }
}

/// The container's header, as far as it can be judged without a key.
fn container(context: &Context, resolved: &Resolved, store: &dyn Store) -> Finding {
    let what = format!("{}: container", resolved.name);
    let file = match store.open(&resolved.target.name, Access::ReadOnly) {
        Ok(file) => file,
        Err(StoreError::NotFound { .. }) => {
            let state_dir = context.state_dir();
            let hint = moved::hint(&state_dir, &resolved.target);
            return Finding::new(what, State::Missing, "not there").hint(hint);
        }
        Err(error) => return Finding::failed(what, &Failure::from(error)),
    };
    let checked = (|| {
        let state_dir = context.state_dir();
        let (header, kernel_only) = connect::any_header(&*file, &state_dir, &resolved.target)?;
        let fingerprint = context.global.fingerprint.as_deref();
        let known = match identity::policy(&state_dir, &resolved.target, fingerprint)? {
            IdentityPolicy::Known(pins) => {
                header.check_pins(&pins)?;
                "as pinned here"
            }
            IdentityPolicy::Expect(typed) => {
                header.check_fingerprint(&typed)?;
                "as on the sheet"
            }
            IdentityPolicy::TrustOnce => "not pinned here yet",
        };
        Ok::<_, Failure>((header, known, kernel_only))
    })();
    match checked {
        Err(failure) => Finding::failed(what, &failure),
        Ok((header, known, kernel_only)) => {
            let pins = header.pins();
            let kind = if header.copies().is_some() {
                "LUKS2"
            } else {
                "LUKS1"
            };
            let detail = format!(
                "{kind}, UUID {}, fingerprint {}, {known}",
                pins.uuid,
                pins.fingerprint()
            );
            if let Some(why) = kernel_only {
                return Finding::new(what, State::Weak, format!("{detail}; {why}")).hint(
                    "use it where the line \"dm-crypt\" above says that kernel mode works, without \
                     --mode user",
                );
            }
            if header.copies().is_none_or(Copies::both_good) {
                return Finding::new(what, State::Fine, detail);
            }
            Finding::new(
                what,
                State::Weak,
                format!("{detail}; one header copy is damaged"),
            )
            .hint("the data is whole; repair the header soon (`cryptsetup repair`)")
        }
    }
}

fn report(findings: &[Finding], missing: usize) -> String {
    let rows: Vec<Vec<String>> = findings
        .iter()
        .flat_map(|found| {
            let state = match found.state {
                State::Fine => "ok",
                State::Weak => "weak",
                State::Missing => "MISSING",
            };
            let row = [
                state.to_owned(),
                found.what.clone(),
                text::harmless(&found.detail),
            ];
            let hint = found.hint.as_ref().filter(|_| found.state != State::Fine);
            let hint = hint.map(|hint| vec![String::new(), String::new(), format!("-> {hint}")]);
            std::iter::once(row.to_vec()).chain(hint)
        })
        .collect();
    let mut report = text::table(&rows, &[]);
    report.push_str(&match missing {
        0 => "all that is needed is there\n".to_owned(),
        1 => "1 thing is missing\n".to_owned(),
        _ => format!("{missing} things are missing\n"),
    });
    report
}
