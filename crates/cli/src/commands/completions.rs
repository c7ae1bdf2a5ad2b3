//! `sprat completions`: prints a shell's completion script.

use std::io::Write as _;

use clap::Args;

use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str =
    "Example:\n  sprat completions bash > /etc/bash_completion.d/sprat";

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &CompletionsArgs, grammar: &clap::Command) -> Result<Exit, Failure> {
    let mut shown = without_hidden(grammar);
    // clap_complete panics if it can't write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut shown, "sprat", &mut script);
    let mut out = std::io::stdout().lock();
    match out.write_all(&script).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed("the script can't be written to standard output").caused_by(&error))
        }
        _ => Ok(Exit::Done),
    }
}

/// The grammar without what only sprat itself and its tests use: completions would offer it.
fn without_hidden(command: &clap::Command) -> clap::Command {
    // clap needs names with a static lifetime; this process ends after the script.
    let name: &'static str = Box::leak(command.get_name().to_owned().into_boxed_str());
    let mut shown = clap::Command::new(name);
    if let Some(about) = command.get_about() {
        shown = shown.about(about.clone());
    }
    let arguments: Vec<&clap::Arg> = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set())
        .collect();
    // What an argument requires may be a group.
    let is_shown = |id: &clap::Id| arguments.iter().any(|argument| argument.get_id() == id);
    let groups = command
        .get_groups()
        .filter(|group| group.get_args().all(is_shown));
    shown
        .groups(groups.cloned())
        .args(arguments.iter().map(|argument| (*argument).clone()))
        .subcommands(
            command
                .get_subcommands()
                .filter(|command| !command.is_hide_set())
                .map(without_hidden),
        )
}
