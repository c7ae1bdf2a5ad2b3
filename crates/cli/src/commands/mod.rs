//! The commands of sprat, a file for each: its arguments, its examples, and what it does.
//!
//! A new command is a file here, a variant of `Command`, and its name in a group of `help.rs`.

mod accept;
mod analyze;
mod backup;
mod backup_preview;
mod browse;
mod cat;
mod check;
mod completions;
mod config;
mod context;
mod copies;
mod copy;
mod diff;
mod doctor;
mod drill;
mod export;
mod find;
mod generations;
mod grow;
mod help;
mod init;
mod key;
mod lookup;
mod ls;
mod mount;
mod notify;
mod pin;
mod prune;
mod remove;
mod restore;
mod run;
mod schedule;
mod setup;
mod shrink;
mod snapshots;
mod status;
mod trim;
mod umount;
mod unlock;
mod unpin;
mod versions;

use std::ffi::OsString;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use sprat_session as session;
use sprat_session::interrupt::Interrupt;

use crate::args::GlobalArgs;
use crate::environment::Environment;
use crate::output::Output;
use crate::{Exit, Failure};
use context::{CommandArgs, Context};
pub use help::ENVIRONMENT;

/// End-to-end encrypted backups with rsync: one LUKS2 file on any SSH server
#[derive(Debug, Parser)]
#[command(
    name = "sprat",
    version,
    arg_required_else_help = true,
    max_term_width = 100
)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Set up backups: from an SSH login to the first scheduled backup
    #[command(before_help = setup::EXAMPLES, after_help = setup::NOTES)]
    Setup(setup::SetupArgs),
    /// Create a container, its key file and its recovery sheet
    #[command(before_help = init::EXAMPLES, after_help = init::NOTES)]
    Init(init::InitArgs),
    /// Back up: run jobs of the config, or one job given on the command line
    #[command(before_help = backup::EXAMPLES, after_help = backup::NOTES, override_usage = backup::USAGE)]
    Backup(backup::BackupArgs),
    /// Make the backups that are due, then prune: for timers
    #[command(before_help = run::EXAMPLES, after_help = run::NOTES)]
    Run(run::RunArgs),
    /// List a container's snapshots
    #[command(before_help = snapshots::EXAMPLES)]
    Snapshots(snapshots::SnapshotsArgs),
    /// List a folder of a snapshot
    #[command(before_help = ls::EXAMPLES)]
    Ls(ls::LsArgs),
    /// Print a file of a snapshot
    #[command(before_help = cat::EXAMPLES)]
    Cat(cat::CatArgs),
    /// Find files in all snapshots: when they came, changed and went
    #[command(before_help = find::EXAMPLES, after_help = find::NOTES)]
    Find(find::FindArgs),
    /// List the versions of a file or folder
    #[command(before_help = versions::EXAMPLES)]
    Versions(versions::VersionsArgs),
    /// Compare two snapshots
    #[command(before_help = diff::EXAMPLES, after_help = diff::NOTES)]
    Diff(diff::DiffArgs),
    /// Show what snapshots cost, and what a removal would free
    #[command(before_help = analyze::EXAMPLES, after_help = analyze::NOTES)]
    Analyze(analyze::AnalyzeArgs),
    /// List the past states of a container that its server keeps
    #[command(before_help = generations::EXAMPLES, after_help = generations::NOTES)]
    Generations(generations::GenerationsArgs),
    /// Browse snapshots on the terminal
    #[command(before_help = browse::EXAMPLES, after_help = browse::NOTES)]
    Browse(browse::BrowseArgs),
    /// Restore a snapshot, or a part of it
    #[command(before_help = restore::EXAMPLES)]
    Restore(restore::RestoreArgs),
    /// Remove the snapshots of a job that no retention rule keeps
    #[command(before_help = prune::EXAMPLES, after_help = prune::NOTES)]
    Prune(prune::PruneArgs),
    /// Pin a snapshot, so that it is never pruned or removed
    #[command(before_help = pin::EXAMPLES)]
    Pin(pin::PinArgs),
    /// Unpin a snapshot, so that it can be pruned again
    #[command(before_help = unpin::EXAMPLES)]
    Unpin(unpin::UnpinArgs),
    /// Remove snapshots by name
    #[command(before_help = remove::EXAMPLES, after_help = remove::NOTES)]
    Remove(remove::RemoveArgs),
    /// Mount snapshots for browsing
    #[command(before_help = mount::EXAMPLES, after_help = mount::NOTES)]
    Mount(mount::MountArgs),
    /// Unmount a container and wait until all data is on the server's disk
    #[command(before_help = umount::EXAMPLES)]
    Umount(umount::UmountArgs),
    /// Check a container's integrity
    #[command(before_help = check::EXAMPLES, after_help = check::NOTES)]
    Check(check::CheckArgs),
    /// Restore a sample from the server, and compare it
    #[command(before_help = drill::EXAMPLES, after_help = drill::NOTES)]
    Drill(drill::DrillArgs),
    /// Copy or move a container, and verify the copy
    #[command(before_help = copy::EXAMPLES, after_help = copy::NOTES)]
    Copy(copy::CopyArgs),
    /// Export snapshots to a folder, and verify them
    #[command(before_help = export::EXAMPLES, after_help = export::NOTES)]
    Export(export::ExportArgs),
    /// Release unused space to the server
    #[command(before_help = trim::EXAMPLES, after_help = trim::NOTES)]
    Trim(trim::TrimArgs),
    /// Enlarge a container
    #[command(before_help = grow::EXAMPLES, after_help = grow::NOTES)]
    Grow(grow::GrowArgs),
    /// Make a container smaller
    #[command(before_help = shrink::EXAMPLES, after_help = shrink::NOTES)]
    Shrink(shrink::ShrinkArgs),
    /// Show each copy, free space and the lock
    #[command(before_help = status::EXAMPLES, after_help = status::NOTES)]
    Status(status::StatusArgs),
    /// Close an alarm that stops a backup or a prune, so that it can continue
    #[command(before_help = accept::EXAMPLES, after_help = accept::NOTES)]
    Accept(accept::AcceptArgs),
    /// Send a test notice, list open problems, send notices that wait
    #[command(before_help = notify::EXAMPLES)]
    Notify(notify::NotifyArgs),
    /// Install, remove or show the timers that start sprat by itself
    #[command(before_help = schedule::EXAMPLES, after_help = schedule::NOTES)]
    Schedule(schedule::ScheduleArgs),
    /// Remove the lock of a session that died on another machine
    #[command(before_help = unlock::EXAMPLES, after_help = unlock::NOTES)]
    Unlock(unlock::UnlockArgs),
    /// Manage keys, the recovery sheet and header backups
    #[command(before_help = key::EXAMPLES, after_help = key::NOTES)]
    Key(key::KeyArgs),
    /// Check the config, and show what is in effect
    #[command(before_help = config::EXAMPLES)]
    Config(config::ConfigArgs),
    /// Diagnose set-up problems
    #[command(before_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArgs),
    /// Print a completion script for a shell
    #[command(before_help = completions::EXAMPLES)]
    Completions(completions::CompletionsArgs),
    /// One process of a session: the encrypted volume.
    #[command(hide = true)]
    VolumeProcess,
    /// One process of a session: the mounted files.
    #[command(hide = true)]
    Worker,
    /// The process that cleans up after a mount in the background.
    #[command(hide = true)]
    MountKeeper,
}

/// The whole grammar, with what is hidden.
pub(crate) fn grammar() -> clap::Command {
    Cli::command()
}

/// Parses the arguments (program name first), runs the command, and prints how it ended.
pub(crate) fn run(arguments: Vec<OsString>) -> Exit {
    if completions::answer(&arguments, grammar) {
        return Exit::Done;
    }
    if let Some(page) = help::options_page(&arguments) {
        return help::print(&page);
    }
    let mut grammar = help::with_pages(Cli::command());
    let parsed = grammar
        .try_get_matches_from_mut(help::without_help_for_help(arguments))
        .and_then(|matches| {
            let name = matches.subcommand_name().unwrap_or_default().to_owned();
            Ok((name, Cli::from_arg_matches(&matches)?))
        });
    match parsed {
        Ok((name, cli)) => dispatch(name, cli),
        Err(error) => help::report(error, &grammar),
    }
}

fn dispatch(name: String, cli: Cli) -> Exit {
    let output = Output::new(&cli.global);
    let mut run = Run {
        name,
        global: cli.global,
        output,
        interrupt: None,
    };
    let done = match cli.command {
        // First, and alone: they may not have threads yet.
        Command::VolumeProcess => return session::volume_process::run(),
        Command::Worker => return session::worker::run(),
        Command::MountKeeper => return session::worker::mount_keeper::run(),
        Command::Completions(args) => completions::run(&args),
        Command::Config(args) => Environment::read()
            .and_then(|environment| config::run(&args, &run.global, &environment, output)),
        Command::Setup(args) => run.command(&args),
        Command::Schedule(args) => schedule::run(&args, &run.global, output),
        Command::Init(args) => run.command(&args),
        Command::Backup(args) => run.command(&args),
        Command::Run(args) => run.command(&args),
        Command::Snapshots(args) => run.command(&args),
        Command::Ls(args) => run.command(&args),
        Command::Cat(args) => run.command(&args),
        Command::Find(args) => run.command(&args),
        Command::Versions(args) => run.command(&args),
        Command::Diff(args) => run.command(&args),
        Command::Analyze(args) => run.command(&args),
        Command::Generations(args) => run.command(&args),
        Command::Browse(args) => run.command(&args),
        Command::Restore(args) => run.command(&args),
        Command::Prune(args) => run.command(&args),
        Command::Pin(args) => run.command(&args),
        Command::Unpin(args) => run.command(&args),
        Command::Remove(args) => run.command(&args),
        Command::Mount(args) => run.command(&args),
        Command::Umount(args) => run.command(&args),
        Command::Check(args) => run.command(&args),
        Command::Drill(args) => run.command(&args),
        Command::Copy(args) => run.command(&args),
        Command::Export(args) => run.command(&args),
        Command::Trim(args) => run.command(&args),
        Command::Grow(args) => run.command(&args),
        Command::Shrink(args) => run.command(&args),
        Command::Unlock(args) => run.command(&args),
        Command::Key(args) => run.command(&args),
        Command::Doctor(args) => run.command(&args),
        Command::Status(args) => run.command(&args),
        Command::Accept(args) => run.command(&args),
        Command::Notify(args) => run.command(&args),
    };
    let exit = done.unwrap_or_else(|failure| {
        output.failure(&failure);
        failure.exit
    });
    // Everything is done, durable and reported: the rest may be interrupted.
    if let Some(interrupt) = run.interrupt {
        session::make_reserves(&interrupt, || {
            output.note(
                "the command is done. If there is space, sprat now creates the reserve file, which \
                 `sprat prune` uses on a full disk. Ctrl-C is safe: the next run creates the file",
            );
        });
    }
    exit
}

/// One run of a command.
struct Run {
    name: String,
    global: GlobalArgs,
    output: Output,
    /// Of the command that has begun.
    interrupt: Option<Interrupt>,
}

impl Run {
    fn command<A: CommandArgs>(&mut self, args: &A) -> Result<Exit, Failure> {
        let environment = Environment::read()?;
        if A::NEEDS_ROOT {
            environment.need_root(&self.name)?;
        }
        let context = Context::begin(
            self.global.clone(),
            environment,
            self.output,
            A::READS || args.accepts_mistakes(),
        )?;
        if A::READS {
            context.accept_mistakes()?;
        }
        self.interrupt = Some(context.interrupt.clone());
        if let Some(state) = args.state_when_interrupted() {
            let output = self.output;
            context.interrupt.on_request(move |_| {
                let failure = Failure::interrupted().with_hint(state);
                let exit = failure.exit;
                session::interrupt::end_after(move || output.failure(&failure), exit);
            });
        }
        let ended = match args.run(&context) {
            Ok(exit) => Ok(context.exit(exit)),
            Err(failure) => Err(context.with_key_hint(failure)),
        };
        if !A::NOTES_DAMAGE {
            context.report_damage(&ended);
        }
        ended
    }
}
