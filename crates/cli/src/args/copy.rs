//! The grammar of `sprat copy`. Doc comments here are the help texts.

use clap::Args;

/// Arguments of `copy`.
#[derive(Debug, Args)]
pub struct CopyArgs {
    /// The container
    #[arg(value_name = "SRC")]
    pub source: String,
    /// Where it goes: a container's name in the config, or a place as for SRC; nothing may be there
    #[arg(value_name = "DST")]
    pub destination: String,
    /// Remove SRC once DST was read back and is durable
    #[arg(long = "move")]
    pub remove_source: bool,
}

pub(super) const COPY_EXAMPLES: &str = "\
Holes stay holes. An interrupted copy goes on where it stopped when the same command runs again. DST
has its name only once all of it was read back.

Examples:
  sprat copy home /mnt/usb/home.luks
  sprat copy --move /mnt/usb/home.luks ssh://u1234@example.org/backup/home.luks";
