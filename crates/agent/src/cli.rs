//! The command line: parses arguments and runs one command.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::admin;
use crate::confine;
use crate::disk::{self, bad};
use crate::lease;
use crate::notify;
use crate::page;
use crate::root::{AGENT, Root};
use crate::serve::Server;
use crate::status::Status;
use crate::time_text::duration_s;

/// So long `allow-header` lets clients write to the header.
const HEADER_FOR_S: i64 = 600;

const HELP: &str = "\
sprat-agent: keeps past states of sprat containers on their server

Not ready for production: docs/agent.md in the sources lists what is missing.

Usage: sprat-agent COMMAND --root DIR [OPTIONS]

Commands:
  adopt                      Prepare a folder; nothing in it is moved
  serve                      Serve one connection on standard input and output (for sshd's ForceCommand)
  status                     Show space, alarms and overdue containers; exit code 3 alarm, 4 overdue, 5 quota
  list                       List past states
  pin NAME TIME              Keep a past state whatever the policy says
  unpin NAME TIME            Leave it to the policy again
  hold NAME                  Let nothing of a container expire
  release NAME               Let the policy decide again
  ack NAME                   Confirm an alarm
  expire NAME TIME --yes     Remove a past state now
  revert NAME TIME --yes     Write a past state back; the present becomes a past state
  remove NAME --yes          Remove a container with all its past states
  tidy                       Remove what the policy does not keep any more (run it by cron every hour)
  allow-header NAME          Let clients change the header, which has the keys, for a while
  unlock NAME                Release the lock of a client that is gone; what it still writes is refused
  repair NAME                Make a new record of the state where `status` says that it is damaged
  repair --yes               Write the damaged file `format` of a folder again
  check                      Check that past states can be read
  export NAME TIME FILE      Copy a past state to a file
  policy check               Show what the policy means
  clock accept               Confirm that the wall clock is right

Options:
  --root DIR      The folder of one client
  --policy FILE   The policy; default: ROOT/.sprat-agent/policy
  --read-only     serve: refuse every change
  --landlock      serve: the kernel lets this process reach nothing but ROOT (needs setpriv of util-linux 2.40)
  --read-data     check: read every saved block
  --for TIME      allow-header: how long; default: 10m
  --json          status: as JSON
  --prometheus    status: as text for Prometheus's node exporter
  --html FILE     status: as a page for a browser
  --all FOLDER    status: of every root in this folder, instead of --root
  --discard-present  revert: keep no past state of the present, which needs space
  --yes           expire, revert, remove: do it; unlock: even if the client is active; repair: no newer
                  sprat-agent was used here
";

/// Arguments of any command.
#[derive(Default)]
pub struct Arguments {
    pub root: Option<PathBuf>,
    pub policy: Option<PathBuf>,
    pub read_only: bool,
    landlock: bool,
    read_data: bool,
    json: bool,
    prometheus: bool,
    /// A page for a browser goes to this file.
    html: Option<PathBuf>,
    /// The folder of the roots.
    all: Option<PathBuf>,
    for_s: Option<i64>,
    yes: bool,
    discard_present: bool,
    /// What is no option: the command first.
    pub words: Vec<String>,
}

impl Arguments {
    fn parse(given: Vec<OsString>) -> Result<Self, String> {
        let mut arguments = Self::default();
        let mut given = given.into_iter();
        while let Some(word) = given.next() {
            let mut path = |what: &str| {
                given
                    .next()
                    .map(PathBuf::from)
                    .ok_or(format!("{what} needs a value"))
            };
            match word.to_str() {
                Some("--root") => arguments.root = Some(path("--root")?),
                Some("--policy") => arguments.policy = Some(path("--policy")?),
                Some("--for") => {
                    let given = path("--for")?;
                    let seconds = given.to_str().and_then(duration_s);
                    arguments.for_s = Some(seconds.ok_or("--for needs a time like 10m")?);
                }
                Some("--html") => arguments.html = Some(path("--html")?),
                Some("--all") => arguments.all = Some(path("--all")?),
                Some("--read-only") => arguments.read_only = true,
                Some("--landlock") => arguments.landlock = true,
                Some("--read-data") => arguments.read_data = true,
                Some("--json") => arguments.json = true,
                Some("--prometheus") => arguments.prometheus = true,
                Some("--discard-present") => arguments.discard_present = true,
                Some("--yes") => arguments.yes = true,
                Some(option) if option.starts_with('-') && option != "-h" && option != "--help" => {
                    return Err(format!("unknown option {option}"));
                }
                Some(word) => arguments.words.push(word.to_owned()),
                None => return Err("an argument is not UTF-8".to_owned()),
            }
        }
        Ok(arguments)
    }

    fn root_path(&self) -> io::Result<&Path> {
        self.root.as_deref().ok_or_else(|| bad("--root is missing"))
    }

    fn root(&self) -> io::Result<Root> {
        Root::open(self.root_path()?, self.policy.as_deref())
    }
}

/// Runs a command. Exit codes: 0 done, 1 failed, 2 wrong command line.
pub fn run(given: Vec<OsString>) -> ExitCode {
    let arguments = match Arguments::parse(given) {
        Ok(arguments) => arguments,
        Err(error) => return failed(2, &error),
    };
    let words: Vec<&str> = arguments.words.iter().map(String::as_str).collect();
    let known = match words.as_slice() {
        ["help" | "--help" | "-h", ..] => return code_of(print(HELP).map(|()| 0)),
        [] => return failed(2, HELP.trim_end()),
        ["status"] if arguments.all.is_some() && (arguments.prometheus || arguments.json) => {
            return failed(2, "--prometheus and --json need one --root");
        }
        ["status"] if arguments.all.is_some() => status_of_every_root(&arguments),
        ["serve"] => serve(&arguments).map(|()| 0),
        ["adopt"] => adopt(&arguments).map(|()| 0),
        ["repair"] => repair(&arguments).map(|()| 0),
        _ => match arguments.root() {
            Ok(root) => match administer(&arguments, &root, &words) {
                Some(outcome) => outcome,
                None => {
                    return failed(
                        2,
                        "unknown command, or an argument is missing; see sprat-agent --help",
                    );
                }
            },
            Err(error) => Err(error),
        },
    };
    code_of(known)
}

/// Runs one of the administrator's commands. `None`: there is no such command.
fn administer(arguments: &Arguments, root: &Root, words: &[&str]) -> Option<io::Result<u8>> {
    let quiet = |done: io::Result<()>| done.map(|()| 0);
    let shown = |text: io::Result<String>| text.and_then(|text| print(&text)).map(|()| 0);
    Some(match words {
        ["status"] => Status::of(root).and_then(|status| {
            let path = arguments.root.clone().unwrap_or_default();
            show_status(arguments, &[(path, status)])
        }),
        ["list"] => shown(admin::list(root)),
        ["pin", name, time] => quiet(admin::set_mark(root, name, time, "pinned", true)),
        ["unpin", name, time] => quiet(admin::set_mark(root, name, time, "pinned", false)),
        ["hold", name] => quiet(admin::hold(root, name, true)),
        ["release", name] => quiet(admin::hold(root, name, false)),
        ["ack", name] => quiet(admin::ack(root, name)),
        ["expire", name, time] if arguments.yes => shown(admin::expire(root, name, time)),
        ["expire", ..] => Err(bad("this removes a past state for ever; say --yes")),
        ["revert", name, time] if arguments.yes => {
            shown(admin::revert(root, name, time, arguments.discard_present))
        }
        ["remove", name] if arguments.yes => quiet(admin::remove(root, name)),
        ["revert", ..] => Err(bad("this changes the container; say --yes")),
        ["remove", ..] => Err(bad(
            "this removes a container and its past states; say --yes",
        )),
        ["allow-header", name] => quiet(admin::allow_header(
            root,
            name,
            arguments.for_s.unwrap_or(HEADER_FOR_S),
        )),
        ["unlock", name] => shown(lease::unlock(root, name, arguments.yes)),
        ["repair", name] => shown(admin::repair(root, name)),
        ["tidy"] => {
            let done = shown(admin::tidy(root));
            // What stops it is what the program has to know.
            let notified = notify::run(root);
            done.and_then(|code| notified.map(|()| code))
        }
        ["check"] => admin::check(root, arguments.read_data).and_then(|(damaged, states)| {
            let mut text: String = damaged.iter().map(|line| format!("{line}\n")).collect();
            text += &format!("{states} past states checked, {} findings\n", damaged.len());
            print(&text).map(|()| u8::from(!damaged.is_empty()))
        }),
        ["export", name, time, file] => quiet(admin::export(root, name, time, Path::new(file))),
        ["policy", "check"] => shown(admin::policy_check(root)),
        ["clock", "accept"] => quiet(admin::accept_clock(root)),
        _ => return None,
    })
}

/// Shows the status of each root in a folder. One that can't be read hides no other, and ends with code 1.
fn status_of_every_root(arguments: &Arguments) -> io::Result<u8> {
    let folder = arguments.all.clone().unwrap_or_default();
    let (mut all, mut failures) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let status = match path.join(".sprat-agent/format").try_exists() {
            Ok(false) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
            Ok(true) => {
                Root::open(&path, arguments.policy.as_deref()).and_then(|root| Status::of(&root))
            }
            Err(error) => Err(error),
        };
        match status {
            Ok(status) => all.push((path, status)),
            Err(error) => failures.push(format!("{}: {error}", path.display())),
        }
    }
    if all.is_empty() && failures.is_empty() {
        return Err(bad(format!("no root in {}", folder.display())));
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let code = show_status(arguments, &all)?;
    for failure in &failures {
        failed(1, failure);
    }
    Ok(if failures.is_empty() { code } else { 1 })
}

/// Returns the exit code of the gravest problem.
fn show_status(arguments: &Arguments, all: &[(PathBuf, Status)]) -> io::Result<u8> {
    if let Some(file) = &arguments.html {
        let page = page::page(all, crate::clock::reading("").wall_s);
        // A web server may read it at any time.
        disk::write_file(file, 0o666, |file| file.write_all(page.as_bytes()))?;
    }
    for (path, status) in all {
        let text = match () {
            () if arguments.json => status.json(),
            () if arguments.prometheus => status.prometheus(),
            () if arguments.html.is_some() => continue,
            () if arguments.all.is_some() => format!("{}: {}", path.display(), status.text()),
            () => status.text(),
        };
        print(&text)?;
    }
    let codes = all.iter().map(|(_, status)| status.code());
    Ok(codes.filter(|code| *code > 0).min().unwrap_or(0))
}

fn code_of(outcome: io::Result<u8>) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(1, &error.to_string()),
    }
}

fn failed(code: u8, message: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "sprat-agent: {message}");
    ExitCode::from(code)
}

/// Writes to standard output.
pub fn print(text: &str) -> io::Result<()> {
    io::stdout().write_all(text.as_bytes())
}

fn serve(arguments: &Arguments) -> io::Result<()> {
    // sshd runs the forced command for every request of a client; only SFTP is served.
    let wanted = std::env::var("SSH_ORIGINAL_COMMAND");
    if wanted.is_ok_and(|wanted| !wanted.contains("sftp")) {
        return Err(bad("this account serves SFTP only"));
    }
    if arguments.landlock {
        let (root, policy) = (arguments.root_path()?, arguments.policy.as_deref());
        return confine::serve(root, policy, arguments.read_only);
    }
    confine::limit();
    let confined = confine::is_confined();
    let root = arguments.root()?;
    if !root.is_newer {
        // It is for `status` only. On a full disk, and beside another process that does the same, the client is served.
        let _ = root.note_confined(confined);
    }
    let mut server = Server::new(root, arguments.read_only);
    server.run(&mut io::stdin().lock(), &mut io::stdout().lock())
}

/// What is left to do as root, ready to be copied.
const NEXT_STEPS: &str = "\
Write this into /etc/ssh/sshd_config, the key of the client into /etc/sprat-agent/ACCOUNT.keys, and reload sshd:

Match User ACCOUNT
    AuthorizedKeysFile /etc/sprat-agent/%u.keys
    ForceCommand AGENT serveOPTIONS --root ROOT
    DisableForwarding yes
    PermitTTY no

Write this into the crontab of ACCOUNT. Without it nothing expires:

7 * * * * AGENT tidy --root ROOT
";

fn repair(arguments: &Arguments) -> io::Result<()> {
    print(match Root::repair(arguments.root_path()?, arguments.yes)? {
        true => "repaired; clients can connect again\n",
        false => "the file format is whole, nothing was changed\n",
    })
}

fn adopt(arguments: &Arguments) -> io::Result<()> {
    let path = arguments.root_path()?;
    let id = Root::adopt(path)?;
    let path = path.canonicalize()?;
    let owner = path.metadata()?.uid();
    let root = path.display().to_string();
    let options = match confine::can_confine()? {
        true => " --landlock",
        false => "",
    };
    let steps = NEXT_STEPS
        .replace("ACCOUNT", &account(owner)?)
        .replace("OPTIONS", options)
        .replace("AGENT", &std::env::current_exe()?.display().to_string())
        .replace("ROOT", &root);
    let note = match owner {
        0 => {
            "The folder belongs to root. Give it to an account of this client, and run adopt again.\n"
        }
        _ => &steps,
    };
    let agent = disk::folder_in(disk::open_folder(&path)?, AGENT)?;
    let can = match disk::can_clone(agent) {
        Ok(true) => "Files can be cloned there; the policy may say keeper = clone\n",
        Ok(false) => "The file system can't clone files; past states are in logs\n",
        // A full disk.
        Err(_) => "",
    };
    print(&format!("{root} is adopted; its id is {id}\n{can}\n{note}"))
}

/// The name of an account, or its number.
fn account(number: u32) -> io::Result<String> {
    let accounts = std::fs::read_to_string("/etc/passwd")?;
    let number = number.to_string();
    let name = accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    });
    Ok(name.unwrap_or(number))
}
