//! Carries out one command of the command line; a file for each.

mod backup;
mod check;
mod context;
mod copy;
mod doctor;
mod grow;
mod init;
mod key;
mod mount;
mod prune;
mod restore;
mod sheet_files;
mod snapshots;
mod status;
mod trim;
mod unlock;

use std::io::Write as _;

use context::Context;
use sprat_session as session;
use sprat_session::text;

use crate::args::{Cli, Command, KeyCommand};
use crate::environment::Environment;
use crate::output::Output;
use crate::{Exit, Failure};

/// Runs the command and prints how it ended.
pub(crate) fn run(cli: Cli) -> Exit {
    let output = Output::new(&cli.global);
    let mut interrupt = None;
    let done = match cli.command {
        // First, and alone: they may not have threads yet.
        Command::VolumeProcess => return session::volume_process::run(),
        Command::Worker => return session::worker::run(),
        Command::MountKeeper => return session::worker::mount_keeper::run(),
        Command::Completions { shell } => completions(shell),
        command => Environment::read().and_then(|environment| {
            if let Some(name) = command.needs_root() {
                environment.need_root(name)?;
            }
            let context = Context::begin(cli.global, environment, output)?;
            interrupt = Some(context.interrupt.clone());
            let done = run_in(&context, command);
            done.map(|exit| context.exit(exit))
                .map_err(|failure| context.doubtful(failure))
        }),
    };
    let exit = done.unwrap_or_else(|failure| {
        output.failure(&failure);
        failure.exit
    });
    // Everything is done, durable and reported: what is left may be stopped.
    if let Some(interrupt) = interrupt {
        session::make_reserves(&interrupt, || {
            output.note(
                "all is done; where there is room, the reserve for a full disk is made beside the \
                 container now. Ctrl-C leaves it to the next run",
            );
        });
    }
    exit
}

fn run_in(context: &Context, command: Command) -> Result<Exit, Failure> {
    if let Some(state) = state_at_any_moment(&command) {
        let output = context.output;
        context.interrupt.on_request(move |_| {
            let failure = Failure::interrupted().with_hint(state);
            let exit = failure.exit;
            sprat_session::interrupt::end_after(move || output.failure(&failure), exit);
        });
    }
    match command {
        Command::Init(args) => init::run(context, &args),
        Command::Backup(args) => backup::run(context, &args),
        Command::Snapshots(args) => snapshots::run(context, &args),
        Command::Restore(args) => restore::run(context, &args),
        Command::Prune(args) => prune::run(context, &args),
        Command::Mount(args) => mount::run(context, &args),
        Command::Umount(args) => mount::run_umount(context, &args),
        Command::Check(args) => check::run(context, &args),
        Command::Copy(args) => copy::run(context, &args),
        Command::Trim(args) => trim::run(context, &args),
        Command::Grow(args) => grow::run(context, &args),
        Command::Unlock(args) => unlock::run(context, &args),
        Command::Key(args) => key::run(context, args.command),
        Command::Doctor(args) => doctor::run(context, &args),
        Command::Status(args) => status::run(context, &args),
        Command::VolumeProcess
        | Command::Worker
        | Command::MountKeeper
        | Command::Completions { .. } => {
            unreachable!("handled before")
        }
    }
}

/// Commands that hold nothing and leave nothing half done: a first request to stop ends them at once,
/// whatever they wait for. With what is true then.
fn state_at_any_moment(command: &Command) -> Option<&'static str> {
    match command {
        Command::Doctor(_) | Command::Status(_) => Some("nothing was changed"),
        Command::Key(args) if matches!(args.command, KeyCommand::List(_)) => {
            Some("nothing was changed")
        }
        Command::Unlock(_) => {
            Some("the container stays locked, or taken over: run `sprat unlock` again, it goes on")
        }
        _ => None,
    }
}

/// The words for what a run's record warns of.
fn warning_text(warning: &sprat_snapshot::Warning) -> String {
    use sprat_snapshot::Warning as W;
    match warning {
        W::ClockBehind { newest } => {
            format!("the clock is behind the newest snapshot, {newest}; is it right?")
        }
        W::OwnVolumeLeftOut { path } => format!("left out {path}: the volume itself"),
        W::KernelFileSystemLeftOut { path } => {
            format!("left out {path}: a file system of the kernel's own")
        }
        W::LatestLeftAlone => "`latest` in the volume is not ours and was left alone".to_owned(),
        W::CrashedRunSwept { files } => format!(
            "the run before crashed: {} of it copied again",
            text::counted(*files, "file", "files")
        ),
        W::LeftoverKept { folder, reason } => {
            format!("the interrupted tree {folder} could not be removed: {reason}")
        }
        W::UnmountedMeanwhile { path } => format!(
            "{path} was unmounted, or mounted anew, while it was copied: the snapshot is NOT whole"
        ),
        W::MountedMeanwhile { path } => format!(
            "something was mounted at {path} while it was copied: the snapshot is NOT whole"
        ),
        W::NotMounted { path, before } => format!(
            "{path} is not mounted: this snapshot lacks its disk. {before} has it, and prune keeps that \
             one. Mount the disk, exclude its place, or if the disk is gone for good, run \
             one backup with --disk-gone {path}"
        ),
        W::OtherFileSystem {
            path,
            before,
            was,
            now,
        } => format!(
            "{path}: another file system ({now}) is there than before ({was}). This snapshot has the new \
             one; {before} has the former one, and prune keeps that one. If the former one is gone for \
             good, run one backup with --disk-gone {path}"
        ),
        W::AutomountEmpty { path } => format!(
            "{path}: nothing could be mounted at this automount point, so this snapshot has nothing of it"
        ),
        W::FoldersVanished { folders } => format!(
            "{} moved or removed while the backup ran: the snapshot is NOT whole",
            text::counted(*folders, "folder was", "folders were")
        ),
        W::ManyVanished { files } => format!(
            "{} vanished while it ran, too large a part: the snapshot is NOT called whole",
            text::counted(*files, "file", "files")
        ),
        W::AttributesTooLarge { files } => format!(
            "{} with more attributes (xattrs, ACLs) than the volume's file system holds, about 4 KiB \
             for each file: the content is there, some of the attributes are not",
            text::counted(*files, "file", "files")
        ),
        W::DamageHealed { files } => format!(
            "{} that a check had found damaged in an older snapshot: read from the source again, and \
             right in this snapshot. Older snapshots keep the damage",
            text::counted(*files, "file", "files")
        ),
        W::MissedChangeCopied { files } => format!(
            "{} changed without a new size or time, which an older snapshot missed: the content is in \
             this snapshot",
            text::counted(*files, "file", "files")
        ),
        W::LatestNotMoved { reason } => format!(
            "the snapshot is made, but `latest` in the volume could not be pointed to it: {reason}"
        ),
        W::AttributesRefused { files } => format!(
            "{} with attributes that the volume's file system refuses: the content is there, those \
             attributes are not",
            text::counted(*files, "file", "files")
        ),
        W::SourceLeftOut { path, why } => {
            format!("source {path}: {why}; the snapshot is made without it")
        }
        W::LinksSplit { path } => format!(
            "{path} has more hard links than the volume allows for one file, those in older snapshots \
             included: this snapshot has a further copy of it, and no name is missing"
        ),
        W::UnchangedCopied { files } => format!(
            "rsync copied at least {} that did not change, instead of linking {}: the volume fills up \
             without need. Some releases of rsync ignore --link-dest; `sprat doctor` tries yours",
            text::counted(*files, "file", "files"),
            if *files == 1 { "it" } else { "them" }
        ),
        W::HolesRead {
            path,
            bytes,
            data_bytes,
        } => format!(
            "{path} is {} long with {} of data, and rsync reads its holes, too: that takes long at each \
             change of the file. If it is not needed, leave it out: --exclude {}",
            text::bytes(*bytes),
            text::bytes(*data_bytes),
            text::quoted(std::path::Path::new(path))
        ),
        W::ForeignObject { path, done } => {
            format!("{path} on the volume is not sprat's; it was {done}")
        }
        W::SubvolumesLeftOut { path, subvolumes } => format!(
            "{path}{} of btrfs, which one_file_system leaves out: empty in this snapshot. Name {} as a source \
             of its own, or leave it out by a pattern",
            match subvolumes {
                1 => " is a subvolume".to_owned(),
                more => format!(" and {} more are subvolumes", more - 1),
            },
            if *subvolumes == 1 { "it" } else { "each" }
        ),
        _ => "the run's record holds a warning that this version has no words for".to_owned(),
    }
}

fn completions(shell: clap_complete::Shell) -> Result<Exit, Failure> {
    use clap::CommandFactory as _;
    let mut shown = without_hidden(&Cli::command());
    // clap_complete panics where it can't write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut shown, "sprat", &mut script);
    let mut out = std::io::stdout().lock();
    match out.write_all(&script).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed("the script can't be written to standard output").caused_by(&error))
        }
        _ => Ok(Exit::Done),
    }
}

/// The same grammar without what only sprat itself and its tests use: completions would offer it.
fn without_hidden(command: &clap::Command) -> clap::Command {
    // clap wants names that live for ever; this process ends with the script.
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
