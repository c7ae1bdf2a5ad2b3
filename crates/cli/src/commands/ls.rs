//! `sprat ls`: lists a folder of a snapshot.

use std::ffi::OsString;
use std::io::IsTerminal as _;

use clap::Args;
use sprat_inside::ListSpec;
use sprat_run::inside_text;

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::ReadTarget;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat ls home www
  sprat ls home www/2026-11-23:/etc
  sprat ls home www:/etc --at yesterday --recursive";

#[derive(Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// What to list. SNAPSHOT is a name, the beginning of a name (the newest match), or
    /// `latest-complete`; the default is the latest snapshot. PATH is a path in the source
    #[arg(value_name = "JOB[/SNAPSHOT][:PATH]")]
    what: OsString,
    /// List the newest snapshot that began at TIME or before: 2026-11-28 14:00, 14:00, yesterday, 3d
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// Also list everything in the folders
    #[arg(long, short = 'R')]
    recursive: bool,
    /// Print only the paths, as raw bytes, each with a zero byte at its end
    #[arg(long, short = '0')]
    null: bool,
}

impl CommandArgs for LsArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let spec = ListSpec {
            place: lookup::place(context, &self.what, self.at.as_deref())?,
            recursive: self.recursive,
        };
        let (target, listing) = lookup::look(context, &self.target, |session, reporter| {
            session.list_folder(spec, reporter, &context.interrupt)
        })?;
        lookup::note_kind(context, &listing.snapshot, listing.kind);
        let colours = context.environment.colours && std::io::stdout().is_terminal();
        let text = match self.null {
            true => lookup::raw(listing.entries.iter().map(|entry| &*entry.path)),
            false => inside_text::listing(&listing, colours, &context.shown()).into_bytes(),
        };
        lookup::print(context, "ls", &target, &text, &listing, listing.more)
    }
}
