//! `sprat cat`: prints a file of a snapshot.

use std::ffi::OsString;

use clap::Args;
use sprat_inside::CatSpec;

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::ReadTarget;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat cat home www:/etc/fstab
  sprat cat home www/2026-11-23:/srv/dump.sql.zst | zstdcat
  sprat cat home www:/etc/fstab --at 3d | diff - /etc/fstab";

#[derive(Debug, Args)]
pub(super) struct CatArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// The file. SNAPSHOT is a name, the beginning of a name (the newest match), or
    /// `latest-complete`; the default is the latest snapshot. PATH is a path in the source
    #[arg(value_name = "JOB[/SNAPSHOT]:PATH")]
    what: OsString,
    /// Print from the newest snapshot that began at TIME or before: 2026-11-28 14:00, 14:00, yesterday, 3d
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
}

impl CommandArgs for CatArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let place = lookup::place(context, &self.what, self.at.as_deref())?;
        let out = rustix::stdio::stdout().try_clone_to_owned();
        let out = out
            .map_err(|error| Failure::failed("standard output can't be used").caused_by(&error))?;
        let spec = CatSpec {
            place,
            bytes_max: None,
        };
        lookup::look(context, &self.target, |session, reporter| {
            session.cat(spec, out, reporter, &context.interrupt)
        })?;
        Ok(context.exit(Exit::Done))
    }
}
