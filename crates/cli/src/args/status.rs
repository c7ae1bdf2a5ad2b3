//! The grammar of `sprat status`. Doc comments here are the help texts.

use clap::Args;

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Containers (those of the config if none is named)
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// Ask no server: only what this machine remembers
    #[arg(long)]
    pub offline: bool,
}

pub(super) const STATUS_EXAMPLES: &str = "\
Needs no key and opens nothing: room and jobs are as this machine's last sessions saw them, the rest
is asked of the server.

Examples:
  sprat status
  sprat status home --json";
