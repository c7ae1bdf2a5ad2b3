//! `sprat setup`: from an SSH login to the first scheduled backup.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use sprat_luks::RecoveryKey;
use sprat_run::copy_name::CopyName;
use sprat_run::schedule::Places;
use sprat_run::setup::{self, ContainerWish, Host, Machine, Request};
use zeroize::Zeroizing;

use super::backup::BackupArgs;
use super::context::{CommandArgs, Context, split};
use super::init::InitArgs;
use crate::{Exit, Failure, terminal};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat setup
  sprat setup u1234@example.org:backup --what home --notify mail:root@example.org
  sprat setup /mnt/usb --name usb --yes --sheet /root/usb-sheet.txt --notify desktop";

pub(super) const NOTES: &str = "\
sprat setup asks for what you do not give, with at most six questions. It skips steps that are done
already, so you can run it again after an interruption. It does not change your config files, and
installs no packages.";

/// Where the config of the timers is.
const ROOT_CONFIG_DIR: &str = "/etc/sprat";

#[derive(Debug, Args)]
pub(super) struct SetupArgs {
    /// Where the backups go: user@host, user@host:folder, ssh://user@host:port/folder, or a folder
    target: Option<String>,
    /// Name of the container [default: this machine's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// What is backed up: home (the home folders and /etc), system, or folders
    #[arg(long, value_name = "home|system|PATH", num_args = 1..)]
    what: Vec<String>,
    /// When: daily, hourly or HH:MM [default: daily]
    #[arg(long, value_name = "WHEN")]
    when: Option<String>,
    /// Where problems are reported: mail:ADDRESS, ntfy:URL, desktop or none
    #[arg(long, value_name = "WHERE")]
    notify: Option<String>,
    /// Accept the server's host key if it has this fingerprint
    #[arg(long, value_name = "SHA256:…")]
    host_key: Option<String>,
    /// Log in with this private key file [default: a key that root has, else a new key]
    #[arg(long, value_name = "FILE")]
    ssh_key: Option<PathBuf>,
    /// Size that the container may grow to
    #[arg(long, value_parser = sprat_session::text::parse_size, default_value = "5T")]
    size: u64,
    /// Write the recovery sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Install no timer
    #[arg(long)]
    no_schedule: bool,
    /// Make no backup now
    #[arg(long)]
    no_first_run: bool,
    /// Ask nothing; give a value for everything that has no default
    #[arg(long)]
    yes: bool,
}

impl CommandArgs for SetupArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let (global, environment) = (&context.global, &context.environment);
        if global.json || global.config.is_some() {
            return Err(
                Failure::usage("`sprat setup` accepts neither --json nor --config").with_hint(
                    "nothing was changed. `sprat init --json` makes a container for scripts",
                ),
            );
        }
        let absolute = |path: &PathBuf| environment.absolute(path);
        let ssh_command = global.ssh_command.as_ref();
        let request = Request {
            target: self.target.clone(),
            name: self.name.clone(),
            what: self.what.clone(),
            when: self.when.clone(),
            notify: self.notify.clone(),
            host_key: self.host_key.clone(),
            ssh_key: self.ssh_key.as_ref().map(absolute),
            sheet: self.sheet.as_ref().map(absolute),
            schedule: !self.no_schedule,
            first_run: !self.no_first_run,
            yes: self.yes,
            ssh_command: ssh_command
                .map(|text| split(text, "--ssh-command"))
                .transpose()?,
            allow_no_fsync: global.allow_no_fsync,
        };
        let is_roots = environment.config_dir.as_deref() == Some(Path::new(ROOT_CONFIG_DIR));
        let machine = Machine {
            host: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            places: environment.config_places(),
            current_dir: environment.current_dir.clone(),
            state_dir: context.state_dir(),
            answer_timeout: environment.answer_timeout,
            network: environment.network(),
            program: std::env::current_exe().unwrap_or_default(),
            schedule: match is_roots {
                true => Ok(Places::of_this_machine()),
                false => Err("the timers use the config in /etc/sprat only"),
            },
        };
        let mut host = Terminal {
            args: self,
            context,
        };
        let outcome = setup::run(&request, &machine, &mut host)?;
        context.output.result(&outcome.text, &json!(null))?;
        Ok(outcome.exit)
    }
}

/// The person at the terminal, and the commands that setup uses.
struct Terminal<'t> {
    args: &'t SetupArgs,
    context: &'t Context,
}

impl Host for Terminal<'_> {
    fn show(&mut self, text: &str) {
        self.context.output.asked_about(text);
    }

    fn ask(&mut self, prompt: &str) -> Result<String, Failure> {
        let asked = terminal::ask_openly(prompt, &self.context.interrupt);
        asked.map_err(|failure| match failure.exit {
            Exit::Usage => {
                failure.with_hint("give --yes and the answers as options: `sprat setup --help`")
            }
            _ => failure,
        })
    }

    fn ask_secret(&mut self, prompt: &str) -> Result<Zeroizing<String>, Failure> {
        terminal::ask(prompt, &self.context.interrupt)
    }

    fn note(&mut self, text: &str) {
        self.context.output.note(text);
    }

    fn warn(&mut self, text: &str) {
        self.context.output.warning(text);
    }

    fn check_interrupt(&self) -> Result<(), Failure> {
        self.context.interrupt.check()
    }

    fn make_container(&mut self, wish: ContainerWish<'_>) -> Result<RecoveryKey, Failure> {
        let mut global = self.context.global.clone();
        global.ssh_command = Some(sprat_run::config::join_words(wish.ssh_command));
        let sheet = wish.sheet.map(Path::to_owned);
        let init = InitArgs::of_setup(wish.target.to_string(), sheet, self.args.size, wish.jobs);
        init.make(&self.context.with(global)?)
    }

    fn back_up(&mut self, copy: &CopyName) -> Result<Exit, Failure> {
        let context = self.context.with(self.context.global.clone())?;
        BackupArgs::of_copy(copy).run(&context)
    }
}
