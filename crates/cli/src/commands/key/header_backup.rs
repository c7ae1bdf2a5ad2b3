//! `sprat key header-backup`: saves the header to a file.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sprat_session::state::headers;

use super::super::context::Context;
use super::change::{header_to_show, open};
use crate::args::TARGET_HELP;
use crate::output::path_json;
use crate::{Exit, Failure};

#[derive(Debug, Args)]
pub(super) struct HeaderBackupArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// A new file; `cryptsetup luksHeaderRestore` accepts it, too
    file: PathBuf,
}

impl HeaderBackupArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let file = open(context, &resolved)?;
        let header = header_to_show(context, &file)?;
        let path = context.environment.absolute(&self.file);
        headers::write_new(&path, &file.copy_of_header(&header)?)?;
        let text = format!(
            "saved the header of {} in {} ({} key slots)\n",
            resolved.target,
            path.display(),
            header.slots().len()
        );
        let fields = json!({
            "uuid": header.uuid(),
            "sequence": header.sequence_id(),
            "file": path_json(&path),
        });
        let target = &resolved.target;
        context.finish("key header-backup", Exit::Done, target, &text, fields)?;
        context.output.note(
            "this file opens the container for ever with each of today's keys, even if you remove a key \
             later. Keep the file as safe as a key",
        );
        Ok(Exit::Done)
    }
}
