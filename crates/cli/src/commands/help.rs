//! Help pages: commands in groups, global options on a page of their own, and the parser's messages.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;

use clap::error::{ContextKind, ContextValue};
use clap::{Args as _, Command};

use crate::Exit;
use crate::args::{GLOBAL_HEADING, GlobalArgs};
use crate::output::complain;

/// The commands of `sprat --help`, in groups.
const GROUPS: [(&str, &[&str]); 7] = [
    (
        "Set-up",
        &[
            "setup",
            "init",
            "config",
            "schedule",
            "doctor",
            "completions",
        ],
    ),
    (
        "Every day",
        &["backup", "run", "status", "check", "drill", "prune"],
    ),
    ("Alarms", &["notify", "accept"]),
    (
        "Browse and restore",
        &[
            "snapshots",
            "ls",
            "cat",
            "find",
            "versions",
            "diff",
            "analyze",
            "generations",
            "browse",
            "restore",
            "mount",
            "umount",
        ],
    ),
    ("Keep and remove", &["pin", "unpin", "remove"]),
    (
        "Container maintenance",
        &["key", "trim", "grow", "shrink", "copy", "export"],
    ),
    ("Emergencies", &["unlock"]),
];

const TOP_TEMPLATE: &str = "{about-with-newline}\n{usage-heading} {usage}\n\n{before-help}";

/// Examples come before the options.
const COMMAND_TEMPLATE: &str =
    "{about-with-newline}\n{usage-heading} {usage}\n\n{before-help}{all-args}{after-help}";

const POINTER: &str = "Global options, environment: sprat help options";

const MORE_HELP: &str = "\
More help:
  sprat COMMAND --help  Arguments, options and examples of a command
  sprat help options    Global options and environment variables
  sprat --version       The version";

/// The environment variables, as the help shows them.
pub const ENVIRONMENT: &str = "\
Environment:
  SPRAT_CONFIG_DIR      Folder of the config and the key files, instead of /etc/sprat (root) or
                        $XDG_CONFIG_HOME/sprat (if unset, ~/.config/sprat)
  SPRAT_STATE_DIR       Folder for what this machine knows of each container
                        [default: /var/lib/sprat]
  SPRAT_CACHE_DIR       Folder of the encrypted block caches [default: /var/cache/sprat]
  SPRAT_RUNTIME_DIR     Folder for files that are not needed after a reboot [default: /run/sprat]
  SPRAT_RESERVE_BYTES   Size of NAME.luks.reserve, the space that `sprat prune` uses on a full disk;
                        0 for none [default: 67108864]
  SPRAT_LOG             Log to stderr: error, warn, info, debug or trace
  SPRAT_ANSWER_TIMEOUT  Seconds to wait for an answer from the server, 1 to 3600 [default: 60]
";

/// The grammar with its help pages: global options are left out of every page but their own.
pub(super) fn with_pages(grammar: Command) -> Command {
    let page = format!("{}{}\n\n{MORE_HELP}", listing(&grammar), exit_codes());
    let hide_global = |arg: clap::Arg| {
        let is_global = arg.get_help_heading() == Some(GLOBAL_HEADING);
        let hide = is_global || arg.is_hide_set();
        arg.hide(hide)
    };
    let grammar = grammar.mut_args(hide_global).mut_subcommands(with_pointer);
    grammar
        .help_template(TOP_TEMPLATE)
        .override_usage("sprat [OPTIONS] COMMAND")
        .before_help(page)
}

fn with_pointer(command: Command) -> Command {
    let end = match command.get_after_help() {
        Some(notes) => format!("{notes}\n\n{POINTER}"),
        None => POINTER.to_owned(),
    };
    command
        .mut_subcommands(with_pointer)
        .help_template(COMMAND_TEMPLATE)
        .after_help(end)
}

fn listing(grammar: &Command) -> String {
    let mut text = String::new();
    for (title, names) in GROUPS {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{title}:");
        for name in names {
            let command = grammar.find_subcommand(name);
            let about = command.and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {name:<12} {about}");
        }
        text.push('\n');
    }
    text
}

fn exit_codes() -> String {
    let line = |exit: &Exit| format!("\n  {:>3}  {}", exit.code(), exit.meaning());
    let lines: String = Exit::ALL.iter().map(line).collect();
    format!("Exit codes:{lines}")
}

/// The page that `sprat help options` asks for; `None` if the arguments ask for something else.
pub(super) fn options_page(arguments: &[OsString]) -> Option<String> {
    let asks = arguments.get(1).is_some_and(|word| word == "help")
        && arguments.len() == 3
        && (arguments[2] == "options" || arguments[2] == "environment");
    asks.then(|| {
        let options = GlobalArgs::augment_args(Command::new("sprat"))
            .disable_help_flag(true)
            .max_term_width(100)
            .help_template("Global options (`sprat status` refuses those for keys):\n{options}");
        let options = options.clone().render_long_help();
        format!("{}\n\n{ENVIRONMENT}", options.to_string().trim_end())
    })
}

/// The arguments without `--help` behind `help`, which the parser would take for a command.
pub(super) fn without_help_for_help(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let asks = |text: &OsString| text == "--help" || text == "-h";
    if arguments.get(1).is_some_and(|text| text == "help") && arguments.get(2).is_some_and(asks) {
        arguments.remove(2);
    }
    arguments
}

/// A message of the parser lists the commands: those of sprat's own processes are left out.
fn hide_internal(error: &mut clap::Error, grammar: &Command) {
    let Some(ContextValue::Strings(commands)) = error.get(ContextKind::ValidSubcommand) else {
        return;
    };
    let is_hidden = |name: &String| {
        grammar
            .get_subcommands()
            .any(|command| command.is_hide_set() && command.get_name() == name)
    };
    let shown = commands.iter().filter(|name| !is_hidden(name)).cloned();
    let shown = ContextValue::Strings(shown.collect());
    error.insert(ContextKind::ValidSubcommand, shown);
}

/// Prints help, version or an error of the parser, and returns how to exit.
pub(super) fn report(mut error: clap::Error, grammar: &Command) -> Exit {
    hide_internal(&mut error, grammar);
    if !error.use_stderr() {
        // `print` buffers: what can't be written is seen only when it is flushed.
        return shown(error.print().and_then(|()| std::io::stdout().flush()));
    }
    let text = error.render().to_string();
    complain(text.strip_prefix("error: ").unwrap_or(&text));
    Exit::Usage
}

/// Prints a page.
pub(super) fn print(page: &str) -> Exit {
    let mut out = std::io::stdout().lock();
    shown(out.write_all(page.as_bytes()).and_then(|()| out.flush()))
}

fn shown(written: std::io::Result<()>) -> Exit {
    match written {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            complain(&format!("standard output can't be written to: {error}\n"));
            Exit::Failed
        }
        _ => Exit::Done,
    }
}
