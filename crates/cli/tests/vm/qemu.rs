//! A person's backups on a real sshd, and the rescue system in which that person has only the sheet.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod guest;

use std::fmt::Write as _;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use sprat_testkit::needs;

use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem};
use sprat_testkit::program::{run_within, shown, system};

/// A name that only the ssh configuration (here) and /etc/hosts (in the guest) can resolve.
pub const SERVER: &str = "backup.example";

fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.join("../..").canonicalize().expect("the repository")
}

/// Where cargo builds, as this test was built; the VM's image is there.
fn target_folder() -> PathBuf {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    scratch.parent().expect("target/tmp").to_owned()
}

/// A program of `tests/vm`.
pub fn tool(name: &str) -> Command {
    let mut command = Command::new(repository().join("tests/vm").join(name));
    command
        .env("CARGO_TARGET_DIR", target_folder())
        .stdin(Stdio::null());
    command
}

/// What is missing on this machine for the VM; makes its image if it isn't there.
pub fn missing() -> Option<String> {
    let programs = [
        "qemu-system-x86_64",
        "busybox",
        "cpio",
        "depmod",
        "sshfs",
        "getfattr",
    ];
    client_and_server::missing()
        .or_else(|| programs.into_iter().find_map(needs::program))
        .or_else(|| {
            let output = tool("image").output().expect("tests/vm/image starts");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            (!output.status.success()).then(|| format!("the VM's image can't be made: {said}"))
        })
}

/// A person's machine with a config of several containers, and the server.
pub struct Owner(ClientAndServer);

impl Deref for Owner {
    type Target = ClientAndServer;

    fn deref(&self) -> &ClientAndServer {
        &self.0
    }
}

impl Owner {
    /// Writes the config. Each container `x` has its own key file and the job `job-x`.
    pub fn new(containers: &[&str]) -> Self {
        let owner = Self(ClientAndServer::new());
        // Plain `ssh`, as most people have it: with this first in PATH, it is not named on the sheet.
        let ssh = needs::find_program("ssh").expect("checked by missing()");
        let config = owner.sshd.path("ssh_config");
        let wrapper = format!(
            "#!/bin/sh\nexec {} -F {} \"$@\"\n",
            ssh.display(),
            config.display()
        );
        write(&owner.path("bin/ssh"), wrapper, 0o755);
        let mut config = String::new();
        for name in containers {
            let _ = write!(
                config,
                "[container.{name}]\ntarget = \"ssh://root@{SERVER}:{}{}\"\nkey_file = \"{}\"\n\
                 [job.job-{name}]\ncontainer = \"{name}\"\nsources = [\"{}\"]\n",
                owner.sshd.port(),
                owner.container(name).display(),
                owner.key_file(name).display(),
                owner.source().display(),
            );
        }
        write(&owner.path("sprat.toml"), config, 0o600);
        owner
    }

    /// What is backed up.
    pub fn source(&self) -> PathBuf {
        self.path("source")
    }

    /// A container's file on the server's disk.
    pub fn container(&self, name: &str) -> PathBuf {
        self.server().join(format!("{name}.luks"))
    }

    /// A container's key file.
    pub fn key_file(&self, name: &str) -> PathBuf {
        self.path(format!("{name}.key"))
    }

    /// `sprat` with this person's config.
    pub fn sprat(&self, arguments: &[&str]) -> Command {
        let mut command = self.machine.command();
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            // No server's process outlives its connection here; a minute is long.
            .args(["--quiet-time", "1", "--config"])
            .arg(self.path("sprat.toml"))
            .args(arguments);
        command
    }

    /// Runs `sprat` to its end; anything but exit code 0 fails the test.
    pub fn ok(&self, arguments: &[&str]) -> Output {
        let mut command = self.sprat(arguments);
        let output = run_within(&mut command, Duration::from_secs(200));
        assert!(output.status.success(), "{}", shown(&command, &output));
        output
    }

    /// Makes a container; returns the sheet as it was printed.
    pub fn init(&mut self, name: &str) -> Sheet {
        self.init_with(name, FileSystem::Ext4)
    }

    /// The same with this file system in it.
    pub fn init_with(&mut self, name: &str, file_system: FileSystem) -> Sheet {
        let size = self.0.choose_size(2).to_string();
        let kind = ["--file-system", file_system.name()];
        self.sheet(
            name,
            &[&["init", name, "--size", &size][..], &kind].concat(),
        )
    }

    /// Runs a command that prints a sheet.
    pub fn sheet(&self, name: &str, arguments: &[&str]) -> Sheet {
        let output = self.ok(arguments);
        Sheet {
            container: name.to_owned(),
            text: String::from_utf8(output.stdout).expect("a sheet is text"),
        }
    }

    /// Where the server keeps a container as it was in some state.
    pub fn state(&self, state: &str) -> PathBuf {
        self.path("states").join(format!("{state}.luks"))
    }

    /// Keeps the container as it is now; the guest will find it so in its place.
    pub fn keep_state(&self, name: &str, state: &str) {
        let (from, to) = (self.container(name), self.state(state));
        fs::create_dir_all(self.path("states")).expect("a folder");
        let words = [from, to].map(|path| path.display().to_string());
        system("cp", &["--sparse=always", &words[0], &words[1]]);
    }

    /// Runs the container's job.
    pub fn backup(&self, name: &str) {
        self.ok(&["backup", &format!("job-{name}")]);
    }

    /// Restores the latest snapshot with sprat; returns where the source came back.
    pub fn restore(&self, name: &str) -> PathBuf {
        let to = self.path("restored").join(name);
        let shown_to = to.display().to_string();
        self.ok(&["restore", name, &format!("job-{name}"), "--to", &shown_to]);
        to.join(self.source().strip_prefix("/").expect("an absolute path"))
    }
}

/// A recovery sheet, as `sprat init` printed it.
pub struct Sheet {
    container: String,
    text: String,
}

impl Sheet {
    /// The commands that it shows, in their order.
    fn commands(&self) -> Vec<String> {
        // Those behind it are for a machine with sprat.
        let without_sprat = self.text.split("\nWith sprat").next().unwrap_or_default();
        let lines = without_sprat
            .lines()
            .filter_map(|line| line.strip_prefix("       "));
        let mut commands: Vec<String> = Vec::new();
        let mut goes_on = false;
        for line in lines {
            match commands.last_mut() {
                Some(last) if goes_on => *last += &format!("\n{line}"),
                _ => commands.push(line.to_owned()),
            }
            goes_on = line.ends_with('\\');
        }
        assert!(
            commands.len() >= 6,
            "a sheet with its commands: {}",
            self.text
        );
        commands
    }

    /// The commands of docs/recovery.md's stock blocks in place of a sheet; the names in them are
    /// replaced by this container's.
    pub fn of_the_docs(owner: &Owner, container: &str, block: usize) -> Self {
        let page = fs::read_to_string(repository().join("docs/recovery.md")).expect("tracked");
        let (_, stock) = page.split_once("## Without sprat").expect("its section");
        let blocks: Vec<&str> = stock.split("```sh\n").skip(1).collect();
        let (commands, _) = blocks[block].split_once("```").expect("a block ends");
        let server = format!("root@{SERVER}:{}", owner.server().display());
        let key = owner.key_file(container).display().to_string();
        let commands = commands
            .replace("user@host:/path", &server)
            .replace("laptop.key", &key)
            .replace("laptop.luks", &format!("{container}.luks"))
            .replace("/home/", &format!("/job-{container}/"));
        let lines = commands.lines().filter(|line| !line.starts_with('#'));
        let text = lines.fold(String::new(), |text, line| text + "       " + line + "\n");
        Self {
            container: container.to_owned(),
            text,
        }
    }

    /// The key that is typed at the prompt.
    pub fn recovery_key(&self) -> &str {
        let line = self
            .text
            .lines()
            .find_map(|line| line.strip_prefix("RECOVERY KEY"));
        line.expect("the sheet has a recovery key").trim()
    }
}

/// Which of the sheet's two ways opens the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenWith {
    KeyFile,
    RecoveryKey,
}

/// The rescue system: its files, and the script that it will run.
pub struct Guest<'o> {
    owner: &'o Owner,
    script: String,
    /// Snapshots expected so far, by container.
    snapshots: Vec<String>,
}

impl<'o> Guest<'o> {
    /// Copies the ssh key, the server's host key, and its name's address to the guest.
    pub fn new(owner: &'o Owner) -> Self {
        let states = owner.path("states").display().to_string();
        let guest = Self {
            owner,
            script: format!("states={states}\n{PRELUDE}"),
            snapshots: Vec::new(),
        };
        guest::give_keys(owner);
        guest
    }

    fn give(&self, path: &str, content: impl AsRef<[u8]>, mode: u32) {
        guest::give(self.owner, path, content, mode);
    }

    fn listing(&self, options: &[&str]) -> Vec<u8> {
        let mut command = tool("listing");
        command.arg(self.owner.source()).args(options);
        let output = command.output().expect("tests/vm/listing starts");
        assert!(output.status.success(), "{}", shown(&command, &output));
        output.stdout
    }

    /// In that state the container's latest snapshot has the present content of the source.
    pub fn expect_latest(&self, state: &str) {
        self.give(
            &format!("expected/{state}"),
            self.listing(&["links"]),
            0o600,
        );
    }

    /// Nothing has changed since another state was kept.
    pub fn expect_as_in(&self, before: &str, state: &str) {
        let path = |state: &str| self.owner.path("overlay/expected").join(state);
        fs::copy(path(before), path(state)).expect("the former is expected");
    }

    /// The same for the snapshot just made, which is compared in its place.
    pub fn expect_snapshot(&mut self, state: &str) {
        self.snapshots.push(state.to_owned());
        let number = self.snapshots.iter().filter(|its| *its == state).count();
        let path = format!("expected/{state}.{number}");
        // In its place a file has the names of other snapshots, too.
        self.give(&path, self.listing(&[]), 0o600);
    }

    /// Has the container in the state that was kept, runs a sheet's commands, compares every file, and
    /// closes it as the sheet shows.
    pub fn recover(&mut self, state: &str, sheet: &Sheet, with: OpenWith) {
        self.recover_after("", state, sheet, with, "");
    }

    /// The same after commands of ours, and with more of them before the container is left.
    pub fn recover_after(
        &mut self,
        first: &str,
        state: &str,
        sheet: &Sheet,
        with: OpenWith,
        before_it_is_left: &str,
    ) {
        self.begin(state, sheet, with);
        let _ = writeln!(self.script, "{first}");
        let name = &sheet.container;
        let snapshots = self.snapshots.iter().filter(|its| *its == state).count();
        for command in sheet.commands() {
            if command.starts_with("umount") {
                let source = self.owner.source();
                let _ = writeln!(
                    self.script,
                    "compare /expected/{state} '/restore{}' links\n\
                     compare_snapshots {state} {name} {snapshots} '{}'\n{before_it_is_left}",
                    source.display(),
                    source.display(),
                );
            }
            self.type_it(sheet, with, &command);
            if command.starts_with("printf") {
                // The sheet names this machine's loopback, which from the guest is another address.
                let _ = writeln!(
                    self.script,
                    "sed -i 's/HostName 127\\.0\\.0\\.1/HostName 10.0.2.2/' /root/sprat-ssh.conf"
                );
            }
        }
    }

    fn begin(&mut self, state: &str, sheet: &Sheet, with: OpenWith) {
        let key = self.owner.key_file(&sheet.container);
        let path = key
            .strip_prefix("/")
            .expect("an absolute path")
            .to_string_lossy();
        self.give(&path, fs::read(&key).expect("init made it"), 0o600);
        let container = self.owner.container(&sheet.container);
        let place = container.display();
        let _ = writeln!(self.script, "begin {state} '{place}' '{with:?}'");
    }

    /// One command of the sheet; of the two ways to open the container, only the one chosen.
    fn type_it(&mut self, sheet: &Sheet, with: OpenWith, command: &str) {
        let opens = command.starts_with("cryptsetup open");
        if opens && command.contains("--key-file") != (with == OpenWith::KeyFile) {
            return;
        }
        let typed = match with {
            OpenWith::RecoveryKey if opens => sheet.recovery_key(),
            _ => "",
        };
        let command = shlex::try_quote(command).expect("no NUL");
        let _ = writeln!(self.script, "type_it {command} '{typed}'");
    }

    /// Boots it; fails the test unless everything came back.
    pub fn run(&self, limit: Duration) {
        let script = format!("{}\necho all done\n", self.script);
        let said = guest::run(self.owner, &script, limit);
        assert!(said.trim_end().ends_with("all done"), "{said}");
        for line in said.lines().filter(|line| line.starts_with('=')) {
            println!("{line}");
        }
    }
}

/// What the script of every guest begins with.
const PRELUDE: &str = r#"
set -eu -o pipefail
volume=/mnt/sprat-volume
# On the server the container's name now leads to the state that was kept; nothing is restored yet.
begin() {
    ssh -n backup.example "ln -f '$states/$1.luks' '$2'"
    umount /restore
    mke2fs -q -F -t ext4 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard /dev/vda
    mount /dev/vda /restore
    rmdir /restore/lost+found
    echo "== $SECONDS s: $1, $3"
}
# A line as the sheet has it, and what is typed at its prompt.
type_it() {
    echo "[$SECONDS s] # $1"
    # No pipe from another program: that would end with SIGPIPE if the command ends before it has written.
    eval "$1" <<<"$2"
}
compare() {
    listing "$2" ${3:-} >/tmp/listing
    diff "$1" /tmp/listing >/tmp/differences || { head -c 4000 /tmp/differences; echo "$2 is not as it was"; exit 1; }
    echo "=  $(grep -c -E '^.?[0-9a-f]{64}  ' /tmp/listing) checksums are right: $2"
}
compare_snapshots() {
    local number folder
    for number in $(seq "$3"); do
        folder=$(find "$volume/job-$2" -maxdepth 1 -name '20*Z' | sort | sed -n "${number}p")
        compare "/expected/$1.$number" "$folder$4"
    done
}
"#;

fn write(path: &Path, content: impl AsRef<[u8]>, mode: u32) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, content).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}
