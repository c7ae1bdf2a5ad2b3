//! The grammar of `sprat copy`. Doc comments here are the help texts.

use std::path::PathBuf;

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
    /// Encrypt DST with a new volume key; it opens with SRC's key that is used here, and with the recovery
    /// key of the new sheet
    #[arg(long)]
    pub new_key: bool,
    /// With --new-key: write the recovery sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE", requires = "new_key")]
    pub sheet: Option<PathBuf>,
    /// With --new-key: also write the sheet as a page to print, with the recovery key as a QR code
    #[arg(long, value_name = "FILE", requires = "new_key")]
    pub html: Option<PathBuf>,
}

pub(super) const COPY_EXAMPLES: &str = "\
No key is needed, except with --new-key. Holes stay holes. An interrupted copy goes on where it
stopped when the same command runs again. DST has its name only once all of it was read back. With
--new-key the sheet is shown when the copy begins, and not again when it goes on.

Examples:
  sprat copy home /mnt/usb/home.luks
  sprat copy --move /mnt/usb/home.luks ssh://u1234@example.org/backup/home.luks
  sprat copy --new-key --move --sheet sheet.txt home ssh://u1234@example.org/backup/home2.luks";
