//! `sprat key remove`: removes a key.

use clap::Args;
use serde_json::json;
use sprat_luks::Secret;
use sprat_session::HeaderChange;

use super::super::context::{Context, Resolved};
use super::change::{change_header, note_key, open};
use crate::args::TARGET_HELP;
use crate::secrets::SecretSource;
use crate::{Exit, Failure};

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// The slot's number in `sprat key list`
    slot: u32,
    /// Remove the slot even if the given key, or the key of this machine's backups, opens it
    #[arg(long, alias = "although-in-use")]
    allow_in_use: bool,
    /// Remove the slot even if it has the only recovery key, or the last key that is not a file
    #[arg(long)]
    allow_last: bool,
}

impl RemoveArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let secret = context.secret(&resolved)?;
        if !self.allow_last {
            self.refuse_last(context, &resolved)?;
        }
        let change = HeaderChange::Remove {
            slot: self.slot,
            although_in_use: self.allow_in_use,
            used_here: self.used_here(context, &resolved)?,
        };
        let changed = change_header(context, &resolved, &secret, &change)?;
        note_key(context, &changed, |notes| notes.removed(&changed.mark));
        let fields = json!({ "slot": changed.slot, "was_gone": changed.as_before });
        let text = if changed.as_before {
            format!("key slot {} was gone already\n", self.slot)
        } else {
            format!("removed key slot {}\n", self.slot)
        };
        context.finish(
            "key remove",
            changed.exit(),
            &resolved.target,
            &text,
            fields,
        )?;
        context.output.note(
            "the removed key still opens old copies of the container file and of its header (on the \
             server, in a snapshot of its disk). If somebody else has the key, run `sprat copy \
             --new-key`, or create a new container",
        );
        Ok(changed.exit())
    }

    fn refuse_last(&self, context: &Context, resolved: &Resolved) -> Result<(), Failure> {
        let file = open(context, resolved)?;
        match file.reason_to_keep(self.slot) {
            None => Ok(()),
            Some(what) => Err(Failure::usage(format!(
                "key slot {} has {what}",
                self.slot
            ))
            .with_hint(
                "nothing was changed. First create a new recovery key and sheet: `sprat key add TARGET \
                 --new-recovery`. To remove the slot anyway, add --allow-last",
            )),
        }
    }

    /// The key that this machine's backups use, if it is not the given one: it must not be removed. A file
    /// that the config names and that is missing counts too: its disk may just not be mounted. A default key
    /// file that is missing does not count.
    fn used_here(&self, context: &Context, resolved: &Resolved) -> Result<Option<Secret>, Failure> {
        let own = &resolved.own_secret;
        let asked = matches!(own, SecretSource::Terminal);
        if self.allow_in_use || asked || *own == resolved.secret {
            return Ok(None);
        }
        let fetched = context.fetch(own);
        Ok(Some(fetched.map_err(|failure| {
            failure
                .context(format!(
                    "can't check whether this machine's backups use key slot {}",
                    self.slot
                ))
                .with_hint(
                    "nothing was changed. Make the key file or command of the config usable (is its \
                     disk mounted?). If the key is gone for good, add --allow-in-use",
                )
        })?))
    }
}
