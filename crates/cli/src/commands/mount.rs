//! `sprat mount`: mounts a container for browsing.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sprat_session::{self as session, Access, mount_point, text};

use super::context::{CommandArgs, Context};
use crate::args::ReadTarget;
use crate::output::path_json;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Example:
  mkdir -p -m 700 /mnt/private && mkdir -p /mnt/private/backup
  sprat mount home /mnt/private/backup && ls /mnt/private/backup/www/latest
  sprat umount /mnt/private/backup";

pub(super) const NOTES: &str = "\
The container stays mounted until `sprat umount`. DIR must be in a folder that only root can enter.
Otherwise other users could read each file whose mode in the backup allows it. --allow-other turns
this check off.";

#[derive(Debug, Args)]
pub(super) struct MountArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// An existing folder
    dir: PathBuf,
    /// Mount for reading and writing; without this option nothing is written to the server
    #[arg(long, conflicts_with = "generation")]
    rw: bool,
    /// Accept a DIR that other users can enter; they can then read each file whose mode allows it
    #[arg(long)]
    allow_other: bool,
}

impl CommandArgs for MountArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target.target)?;
        let dir = context.environment.absolute(&self.dir);
        if !dir.is_dir() {
            return Err(Failure::usage(format!("{} is not a folder", dir.display()))
                .with_hint("nothing was started. Create it with mkdir"));
        }
        let (environment, global) = (&context.environment, &context.global);
        let mut own = vec![
            (environment.absolute(&global.state_dir), "state folder"),
            (environment.absolute(&global.cache_dir), "cache folder"),
            (environment.absolute(&global.runtime_dir), "runtime folder"),
        ];
        let config_dir = environment.config_dir.clone();
        own.extend(config_dir.map(|folder| (folder, "config folder")));
        mount_point::check_hides_nothing(&dir, &resolved.target, own)?;
        if !self.allow_other && mount_point::others_can_enter(&dir) {
            return Err(Failure::usage(format!(
                "other users can enter {}: they could read each file whose mode in the backup allows it",
                dir.display()
            ))
            .with_hint(
                "nothing was started. Mount in a folder that only root can enter (`mkdir -m 700 \
                 /mnt/private; mkdir /mnt/private/backup`), or add --allow-other",
            ));
        }
        let (prepared, how) = match self.rw {
            true => {
                let prepared = context.prepare_resolved(resolved, Access::ReadWrite)?;
                (prepared, "read and write")
            }
            false => (context.prepare_reading(&self.target)?, "read-only"),
        };
        let target = prepared.resolved.target.clone();
        let facts = context.in_own_session(
            prepared,
            |facts| facts,
            |options, secret, reporter| {
                session::mount(&options, secret, &dir, reporter, &context.interrupt)
            },
        )?;
        let text = format!("mounted {target} on {}, {how}\n", dir.display());
        let fields = json!({
            "dir": path_json(&dir),
            "read_write": self.rw,
            "uuid": facts.uuid,
        });
        let exit = context.exit(Exit::Done);
        context.finish("mount", exit, &target, &text, fields)?;
        context.output.note(&format!(
            "the container stays mounted until `sprat umount {}`",
            text::quoted(&dir)
        ));
        Ok(Exit::Done)
    }
}
