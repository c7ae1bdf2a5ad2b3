//! `sprat umount`: unmounts a container in order.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sprat_session::{self as session, text};

use super::context::{CommandArgs, Context};
use crate::output::{Reporter, path_json, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "Example:\n  sprat umount /mnt/private/backup";

#[derive(Debug, Args)]
pub(super) struct UmountArgs {
    /// The folder where `sprat mount` mounted the container
    dir: PathBuf,
}

impl CommandArgs for UmountArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let dir = context.environment.absolute(&self.dir);
        let runtime_dir = context.environment.absolute(&context.global.runtime_dir);
        let mut reporter = Reporter::new(context.output, "");
        let closed = session::unmount(&runtime_dir, &dir, &mut reporter, &context.interrupt)?;
        reporter.clear();
        let sent = closed.volume.written_bytes;
        let mut text = format!("unmounted {}", dir.display());
        if sent > 0 {
            text.push_str(&format!("; {} sent", text::bytes(sent)));
            if closed.durable {
                text.push_str(", everything is on the server's disk");
            }
        }
        text.push('\n');
        let fields = json!({
            "dir": path_json(&dir),
            "durable": closed.durable,
            "volume": closed.volume,
        });
        let json = result_json("umount", Exit::Done, fields);
        context.output.result(&text, &json)?;
        Ok(Exit::Done)
    }
}
