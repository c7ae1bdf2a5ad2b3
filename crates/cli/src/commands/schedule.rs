//! `sprat schedule`: installs, removes and shows what starts sprat by itself.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use sprat_run::schedule::text::{changes_text, config_warning, inactive_warning, installed_text};
use sprat_run::schedule::{Changes, Installed, Places, Schedule};

use crate::args::GlobalArgs;
use crate::environment::{Environment, ROOT_CONFIG_DIR};
use crate::output::{Output, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat schedule install
  sprat schedule show
  sprat schedule install --print";

pub(super) const NOTES: &str = "\
The timers run `sprat run --scheduled` every 15 minutes, and `sprat status --alert --offline` every
hour. They run as root, with the config in /etc/sprat.";

#[derive(Debug, Args)]
pub(super) struct ScheduleArgs {
    #[command(subcommand)]
    command: ScheduleCommand,
}

#[derive(Debug, Subcommand)]
enum ScheduleCommand {
    /// Install the systemd timers, or a file for cron where there is no systemd
    Install {
        /// Print the files to stdout and change nothing
        #[arg(long)]
        print: bool,
    },
    /// Remove what `install` wrote; a running backup continues
    Remove,
    /// Show what is installed, when it runs next, and how the last run ended
    Show {
        /// Print the installed files to stdout
        #[arg(long)]
        print: bool,
    },
}

/// Runs it. The config is not read first: a mistake there must not keep anybody from removing timers.
pub(super) fn run(
    args: &ScheduleArgs,
    global: &GlobalArgs,
    output: Output,
) -> Result<Exit, Failure> {
    let environment = Environment::read()?;
    let schedule = Schedule::new(Places::of_this_machine());
    if !matches!(args.command, ScheduleCommand::Show { .. }) && global.config.is_some() {
        return Err(
            Failure::usage("`sprat schedule` does not accept --config").with_hint(format!(
                "nothing was changed. The timers use {ROOT_CONFIG_DIR}/sprat.toml"
            )),
        );
    }
    match args.command {
        ScheduleCommand::Install { print: true } => print_planned(&schedule, output),
        ScheduleCommand::Install { print: false } => {
            need_root(&environment, "install")?;
            let changes = schedule.install(&running_program()?)?;
            if let Some(warning) = config_warning(Path::new(ROOT_CONFIG_DIR)) {
                output.warning(&warning);
            }
            let installed = schedule.installed(Timestamp::now())?;
            if let Some(warning) = inactive_warning(&installed) {
                output.warning(&warning);
            }
            report("install", &installed, &changes, output)
        }
        ScheduleCommand::Remove => {
            need_root(&environment, "remove")?;
            let changes = schedule.remove()?;
            let installed = schedule.installed(Timestamp::now())?;
            report("remove", &installed, &changes, output)
        }
        ScheduleCommand::Show { print } => show(&schedule, print, output),
    }
}

fn need_root(environment: &Environment, what: &str) -> Result<(), Failure> {
    if environment.root {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "`sprat schedule {what}` must be run as root: the timers belong to the system"
    ))
    .with_hint("nothing was changed. Run it with sudo or as root; `--print` works as anybody"))
}

fn running_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| {
        Failure::failed("the path of the running sprat can't be found").caused_by(&error)
    })
}

fn print_planned(schedule: &Schedule, output: Output) -> Result<Exit, Failure> {
    let program = running_program()?;
    if let Err(failure) = sprat_run::schedule::refuse_replaceable(&program) {
        output.warning(&failure.in_one_line());
    }
    print_files("schedule install", &schedule.texts(&program)?, output)
}

/// The texts under the paths of their files.
fn print_files(
    command: &str,
    files: &[(PathBuf, String)],
    output: Output,
) -> Result<Exit, Failure> {
    let shown: Vec<String> = files
        .iter()
        .map(|(path, text)| format!("# {}\n{text}", path.display()))
        .collect();
    let list: Vec<_> = files
        .iter()
        .map(|(path, text)| json!({ "path": path, "text": text }))
        .collect();
    let json = result_json(command, Exit::Done, json!({ "files": list }));
    output.listing(&shown.join("\n"), &json)?;
    Ok(Exit::Done)
}

fn report(
    what: &str,
    installed: &Installed,
    changes: &Changes,
    output: Output,
) -> Result<Exit, Failure> {
    for path in &changes.left {
        output.warning(&format!(
            "{} was left as it is: somebody else wrote or changed it",
            path.display()
        ));
    }
    let command = format!("schedule {what}");
    let scheduler = installed.scheduler;
    let fields = json!({ "scheduler": scheduler, "active": installed.active, "changes": changes });
    let json = result_json(&command, Exit::Done, fields);
    output.result(
        &changes_text(what, scheduler, changes, installed.active),
        &json,
    )?;
    Ok(Exit::Done)
}

fn show(schedule: &Schedule, print: bool, output: Output) -> Result<Exit, Failure> {
    let installed = schedule.installed(Timestamp::now())?;
    if print {
        let read = |path: &PathBuf| std::fs::read_to_string(path).ok();
        let files: Vec<(PathBuf, String)> = installed
            .files
            .iter()
            .filter_map(|file| Some((file.path.clone(), read(&file.path)?)))
            .collect();
        return print_files("schedule show", &files, output);
    }
    let json = result_json("schedule show", Exit::Done, fields(&installed));
    output.listing(&installed_text(&installed), &json)?;
    Ok(Exit::Done)
}

fn fields(installed: &impl Serialize) -> serde_json::Value {
    // A struct of texts, numbers and lists is always JSON.
    serde_json::to_value(installed).unwrap_or_default()
}
