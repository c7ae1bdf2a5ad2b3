//! `sprat completions`: prints a shell's completion script, which asks sprat for each completion.

use std::ffi::{OsStr, OsString};

use clap::builder::{PossibleValuesParser, ValueHint};
use clap::{Args, Command};
use clap_complete::engine::{
    ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::{CompleteEnv, Shells};
use sprat_run::completion::Names;

use super::help;
use crate::environment::{self, Environment};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str =
    "Example:\n  sprat completions bash > /etc/bash_completion.d/sprat";

/// The scripts set it: sprat answers instead of running a command.
const VARIABLE: &str = "SPRAT_COMPLETE";

/// The first completion loads the script as a function `_sprat`, and has to be answered, too.
const ZSH_END: &str = "\
if [[ $funcstack[1] == _sprat ]]; then
    _clap_dynamic_completer_sprat
fi
";

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_parser = PossibleValuesParser::new(Shells::builtins().names()))]
    shell: String,
}

pub(super) fn run(args: &CompletionsArgs) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    let shells = Shells::builtins();
    let shell = shells.completer(&args.shell);
    let shell = shell.ok_or_else(|| Failure::usage(format!("no such shell: {}", args.shell)))?;
    shell
        .write_registration(VARIABLE, "sprat", "sprat", "sprat", &mut script)
        .map_err(|error| Failure::failed("the script can't be made").caused_by(&error))?;
    let mut script = String::from_utf8_lossy(&script).trim_start().to_owned();
    if args.shell == "zsh" {
        script.push_str(ZSH_END);
    }
    Ok(help::print(&script))
}

/// Answers a completion script; `false`: no script asks.
pub(super) fn answer(arguments: &[OsString], grammar: fn() -> Command) -> bool {
    let factory = || with_completers(grammar());
    let env = CompleteEnv::with_factory(factory).var(VARIABLE);
    let current_dir = std::env::current_dir().ok();
    // A shell shows nothing of a failure, and offers nothing.
    env.try_complete(arguments.to_vec(), current_dir.as_deref())
        .unwrap_or(true)
}

/// Each argument that names a container, a job, a copy or a snapshot gets its completer.
fn with_completers(command: Command) -> Command {
    command
        .mut_args(|arg| {
            let names = arg.get_value_names().and_then(|names| names.first());
            let name =
                names.map_or_else(|| arg.get_id().as_str().to_uppercase(), ToString::to_string);
            match Value::of(&name) {
                Some(value) => arg.add(ArgValueCompleter::new(value)),
                None if name == "FILE" => arg.value_hint(ValueHint::FilePath),
                None if name == "DIR" => arg.value_hint(ValueHint::DirPath),
                None => arg,
            }
        })
        .mut_subcommands(with_completers)
}

/// What an argument names.
#[derive(Debug, Clone, Copy)]
enum Value {
    Container,
    Job,
    Copy,
    Snapshot,
}

impl Value {
    /// By the argument's name in the help.
    fn of(name: &str) -> Option<Self> {
        match name {
            "TARGET" | "SRC" | "DST" => Some(Self::Container),
            "JOB" => Some(Self::Job),
            "COPY" | "TARGET|COPY" | "COPY|TARGET" => Some(Self::Copy),
            "JOB/SNAPSHOT" | "JOB[/SNAPSHOT][:PATH]" | "JOB[/SNAPSHOT]:PATH" | "JOB:PATH" => {
                Some(Self::Snapshot)
            }
            _ => None,
        }
    }
}

impl ValueCompleter for Value {
    fn complete(&self, current: &OsStr) -> Vec<CompletionCandidate> {
        let Ok(environment) = Environment::read() else {
            return Vec::new();
        };
        let (places, state_dir) = (environment.config_places(), environment::state_dir());
        let files = sprat_run::config::files_of(None, &places);
        let names = Names::load(&files, &places, &state_dir);
        // The container that an earlier word names.
        let words: Vec<_> = std::env::args_os().filter(|word| word != current).collect();
        let is_named = |name: &&str| words.iter().any(|word| word == *name);
        let containers = names.containers.iter().map(String::as_str);
        let named: Vec<&str> = containers.filter(is_named).collect();
        let copies = || names.copies.iter().map(ToString::to_string);
        let offered: Vec<String> = match self {
            Self::Container => names.containers.clone(),
            Self::Job => names.jobs(&named),
            Self::Copy => [names.containers.clone(), names.jobs(&[])]
                .into_iter()
                .flatten()
                .chain(copies())
                .collect(),
            Self::Snapshot if current.to_string_lossy().contains('/') => {
                names.snapshots(&named, &state_dir)
            }
            Self::Snapshot => names.jobs(&named),
        };
        let begins = |name: &String| name.starts_with(&*current.to_string_lossy());
        let offered = offered.into_iter().filter(begins);
        let mut found: Vec<_> = offered.map(CompletionCandidate::new).collect();
        if matches!(self, Self::Container) && found.is_empty() {
            found = PathCompleter::file().complete(current);
        }
        found
    }
}
