//! `sprat mount`: mounts a container for browsing.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use sprat_session::address::Location;
use sprat_session::{self as session, Access, text};

use super::context::{CommandArgs, Context, Resolved};
use crate::args::TARGET_HELP;
use crate::output::path_json;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Example:
  mkdir -p -m 700 /mnt/private && mkdir -p /mnt/private/backup
  sprat mount home /mnt/private/backup && ls /mnt/private/backup/www/latest
  sprat umount /mnt/private/backup";

pub(super) const NOTES: &str = "\
It stays mounted until `sprat umount`. DIR must be in a folder that only root can enter. Otherwise
other users could read every file that its mode in the backup lets them read. --allow-other turns
this check off.";

#[derive(Debug, Args)]
pub(super) struct MountArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// An existing folder
    dir: PathBuf,
    /// Mount for reading and writing; without it nothing is written to the server
    #[arg(long)]
    rw: bool,
    /// Allow a folder that other users can enter: they see the files as their modes allow
    #[arg(long)]
    allow_other: bool,
}

impl CommandArgs for MountArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let dir = context.environment.absolute(&self.dir);
        if !dir.is_dir() {
            return Err(Failure::usage(format!("{} is not a folder", dir.display()))
                .with_hint("nothing was started. Make it with mkdir"));
        }
        refuse_own_places(context, &resolved, &dir)?;
        if !self.allow_other && others_can_enter(&dir) {
            return Err(Failure::usage(format!(
                "other users can enter {}: they would see the files in the backup as their old modes allow",
                dir.display()
            ))
            .with_hint(
                "nothing was started. Mount in a folder that only root can enter (`mkdir -m 700 \
                 /mnt/private; mkdir /mnt/private/backup`), or let the others in with --allow-other",
            ));
        }
        let (access, how) = match self.rw {
            true => (Access::ReadWrite, "read and write"),
            false => (Access::ReadOnly, "read-only"),
        };
        let prepared = context.prepare_resolved(resolved.clone(), access)?;
        let facts = context.in_own_session(
            prepared,
            |facts| facts,
            |options, secret, reporter| {
                session::mount(options, secret, &dir, reporter, &context.interrupt)
            },
        )?;
        let text = format!("mounted {} on {}, {how}\n", resolved.target, dir.display());
        let fields = json!({
            "dir": path_json(&dir),
            "read_write": self.rw,
            "uuid": facts.uuid,
        });
        let exit = context.exit(Exit::Done);
        context.finish("mount", exit, &resolved.target, &text, fields)?;
        context.output.note(&format!(
            "it stays mounted until `sprat umount {}`",
            text::quoted(&dir)
        ));
        Ok(Exit::Done)
    }
}

/// Whether anybody but root and this user can walk to `dir`: what is mounted there has the modes of the
/// backup, and those of `dir` itself are covered by it.
fn others_can_enter(dir: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    !real.ancestors().skip(1).any(|above| {
        above.metadata().is_ok_and(|about| {
            // With an ACL the bits of the group are its mask, the most that it gives.
            about.mode() & 0o011 == 0 && (about.uid() == 0 || about.uid() == me)
        })
    })
}

/// Refuses a mount point that would hide what the session and its `umount` need.
fn refuse_own_places(context: &Context, resolved: &Resolved, dir: &Path) -> Result<(), Failure> {
    let environment = &context.environment;
    let global = &context.global;
    let real = |path: &Path| canonical(&environment.absolute(path));
    let dir = real(dir);
    let mut places = vec![
        (real(&global.state_dir), "state folder"),
        (real(&global.cache_dir), "cache folder"),
        (real(&global.runtime_dir), "runtime folder"),
        (PathBuf::from("/proc"), "processes of this machine"),
        (PathBuf::from("/dev"), "devices of this machine"),
        (PathBuf::from("/sys"), "devices of this machine"),
    ];
    if let Some(config) = &environment.config_dir {
        places.push((real(config), "config folder"));
    }
    if let Location::Local { folder } = &resolved.target.place {
        places.push((real(folder), "container's folder"));
    }
    for (place, what) in places {
        if place.starts_with(&dir) {
            return Err(Failure::usage(format!(
                "can't mount at {}: that would hide the {what} ({})",
                dir.display(),
                place.display()
            ))
            .with_hint("nothing was started. Mount it at an empty folder"));
        }
    }
    Ok(())
}

/// As the kernel names it; of what doesn't exist yet, as much as does.
fn canonical(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => canonical(parent).join(name),
        _ => path.to_owned(),
    })
}
