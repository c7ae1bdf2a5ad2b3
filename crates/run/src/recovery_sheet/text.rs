//! The recovery sheet as text: all that is needed to get everything back without sprat.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;
use sprat_luks::Pins;
use sprat_session::address::{SshLocation, Target};
use sprat_session::ssh_config::{Known, KnownServer, Proxy};

use crate::config::Config;

/// Where the stock commands mount the server's folder and the volume.
const SERVER_DIR: &str = "/mnt/sprat-server";
const VOLUME_DIR: &str = "/mnt/sprat-volume";
const MAPPER_NAME: &str = "sprat-restore";
/// The ssh configuration that the sheet's first command writes, and the server's name in it.
const SSH_CONFIG: &str = "/root/sprat-ssh.conf";
const SSH_NAME: &str = "sprat-server";
/// The first words of every sheet.
pub const TITLE: &str = "SPRAT RECOVERY SHEET";
/// What to do if the lost machine left its lock.
pub(super) const LOST_IN_A_BACKUP: &str = "\
If a command ends with exit code 11, the old machine was lost in the middle of a\n\
backup. If it is off for good, and not asleep, run this, and then the command again:";
/// The field with the secret.
pub(super) const RECOVERY_KEY: &str = "RECOVERY KEY";

/// Shown instead of the recovery key, to write it in by hand.
pub(super) const NO_RECOVERY_KEY: &str = "____-____-____-____-____-____-____-____-____-____";

/// What a sheet shows beside the container's pins and the recovery key.
#[derive(Debug)]
pub struct SheetParts {
    /// The container.
    pub target: Target,
    /// The server in ssh's configuration.
    pub known: Known,
    /// Path of the key file and the SHA-256 of its content.
    pub key_file: Option<(PathBuf, String)>,
    /// Jobs that the config sends into this container.
    pub jobs: Vec<SheetJob>,
    /// When the sheet is made.
    pub made_at: String,
}

impl SheetParts {
    /// The parts of a sheet that is made now.
    pub fn new(target: &Target, known: Known, jobs: Vec<SheetJob>) -> Self {
        Self {
            target: target.clone(),
            known,
            key_file: None,
            jobs,
            made_at: Timestamp::now()
                .strftime("%Y-%m-%d %H:%M:%S UTC")
                .to_string(),
        }
    }

    /// The sheet of a container with these pins.
    pub fn sheet<'s>(&'s self, pins: &'s Pins, recovery_key: Option<&'s str>) -> Sheet<'s> {
        let key_file = self.key_file.as_ref();
        Sheet {
            target: &self.target,
            known: &self.known,
            pins,
            recovery_key: recovery_key.unwrap_or(NO_RECOVERY_KEY),
            key_file: key_file.map(|(path, sha256)| (path.as_path(), sha256.as_str())),
            jobs: &self.jobs,
            made_at: &self.made_at,
        }
    }
}

/// What the sheet shows. It contains the recovery key: everyone who reads it can read the backup.
#[derive(Debug)]
pub struct Sheet<'s> {
    /// The container.
    pub target: &'s Target,
    /// The server in ssh's configuration.
    pub known: &'s Known,
    /// What the container is known by.
    pub pins: &'s Pins,
    /// The secret, or a blank to be filled in by hand.
    pub recovery_key: &'s str,
    /// Path of the key file and the SHA-256 of its content.
    pub key_file: Option<(&'s Path, &'s str)>,
    /// Jobs that the config sends into this container.
    pub jobs: &'s [SheetJob],
    /// When it is made.
    pub made_at: &'s str,
}

/// A job of the config.
#[derive(Debug, Clone)]
pub struct SheetJob {
    /// Its name.
    pub name: String,
    /// What is backed up, absolute paths.
    pub sources: Vec<String>,
}

impl SheetJob {
    /// The jobs that `config` sends into `container`.
    pub fn of_container(config: &Config, container: &str) -> Vec<Self> {
        let jobs = config.jobs.iter().filter(|job| job.is_in(container));
        jobs.map(|job| Self {
            name: job.name.to_string(),
            sources: job.sources.iter().map(ToString::to_string).collect(),
        })
        .collect()
    }
}

/// One step of a restore.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What it is for.
    pub what: String,
    /// The commands, each to be typed as printed. In a command of several lines, each line but the last
    /// ends in `\`.
    pub commands: Vec<String>,
}

impl Sheet<'_> {
    /// The steps to restore everything with stock commands.
    pub fn steps(&self) -> Vec<Step> {
        let file = self.container_path();
        let mut steps = Vec::new();
        let mut begin = (
            "Create the mount point",
            vec![format!("mkdir -p {VOLUME_DIR}")],
        );
        if let (Some(config), Some(sshfs)) = (self.ssh_config(), self.sshfs()) {
            steps.push(step(
                "Write the ssh configuration. Put ssh's key at the path of IdentityFile, or set another \
                 key that the server accepts",
                vec![config],
            ));
            begin = (
                "Mount the server's folder",
                vec![format!("mkdir -p {SERVER_DIR} {VOLUME_DIR}"), sshfs],
            );
        }
        let open = |key: &[&str]| {
            let mut words = vec!["cryptsetup", "open", "--type", "luks2"];
            words.extend(key);
            words.extend([file.as_str(), MAPPER_NAME]);
            quoted(&words)
        };
        steps.push(step(begin.0, begin.1));
        steps.push(step(
            "Check the container: UUID, cipher (aes-xts-plain64) and offset must be those above",
            vec![quoted(&["cryptsetup", "luksDump", &file])],
        ));
        let typed = open(&[]);
        match self.key_file {
            Some((path, _)) => {
                let path = path.to_string_lossy();
                steps.push(step(
                    "Open the container with the key file",
                    vec![open(&["--key-file", &path])],
                ));
                steps.push(step(
                    "Or, without the key file, open it with the recovery key; type its dashes, too",
                    vec![typed],
                ));
            }
            None => steps.push(step(
                "Open the container with the passphrase, or with the recovery key and its dashes",
                vec![typed],
            )),
        }
        let mapper = format!("/dev/mapper/{MAPPER_NAME}");
        steps.push(step(
            "Mount the snapshots and list them",
            vec![
                quoted(&["mount", "-o", "ro", &mapper, VOLUME_DIR]),
                quoted(&["ls", "-l", VOLUME_DIR]),
            ],
        ));
        steps.push(step(
            "Copy everything to /restore, with owners, times and links",
            self.copy_commands(),
        ));
        let mut end = vec![
            quoted(&["umount", VOLUME_DIR]),
            quoted(&["cryptsetup", "close", MAPPER_NAME]),
        ];
        if self.target.ssh().is_some() {
            end.push(quoted(&["fusermount3", "-u", SERVER_DIR]));
        }
        steps.push(step("Unmount and close everything", end));
        steps
    }

    /// The container for sprat on a new machine, and the words before the command.
    fn with_sprat(&self) -> (String, Vec<String>) {
        let (target, mut first) = match self.target.ssh() {
            Some(server) => (
                format!("{SSH_NAME}:{}", server.path_of(&self.target.name)),
                vec![
                    "sprat".to_owned(),
                    "--ssh-command".to_owned(),
                    format!("ssh -F {SSH_CONFIG}"),
                ],
            ),
            None => (self.container_path(), vec!["sprat".to_owned()]),
        };
        first.extend(["--fingerprint".to_owned(), self.pins.fingerprint()]);
        (target, first)
    }

    /// The command that releases the lock of a machine that was lost in the middle of a backup.
    pub(super) fn unlock(&self) -> String {
        let (target, mut words) = self.with_sprat();
        words.extend(["unlock", &target, "--that-machine-is-off"].map(str::to_owned));
        quoted(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The steps to restore everything, and to continue with backups, on a new machine with sprat.
    pub fn steps_with_sprat(&self) -> Vec<Step> {
        let name = self.target.name.as_str();
        let name = name.strip_suffix(".luks").unwrap_or(name);
        // As a container may be called in the config.
        let name: String = name
            .chars()
            .map(|c| match c {
                c if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') => c,
                _ => '-',
            })
            .collect();
        let name = name.as_str();
        let key = format!("/etc/sprat/keys/{name}.key");
        let ssh = format!("ssh -F {SSH_CONFIG}");
        let (target, first) = self.with_sprat();
        let first: Vec<&str> = first.iter().map(String::as_str).collect();
        let mut steps = Vec::new();
        if let Some(config) = self.ssh_config() {
            let what = format!(
                "Write the ssh configuration, as above in step 1. Then log in once with \
                 `sftp -F {SSH_CONFIG} {SSH_NAME}`, and compare the host key that it shows with the one above: \
                 sprat connects to no server with an unknown host key"
            );
            steps.push(step(&what, vec![config]));
        }
        let with = |words: &[&str]| quoted(&[&first, words].concat());
        steps.push(step(
            "Create a key file for the new machine; sprat prompts for the recovery key",
            vec![with(&["key", "add", &target, "--new-key-file", &key])],
        ));
        let no_job = [SheetJob {
            name: "JOB".to_owned(),
            sources: vec!["/home".to_owned()],
        }];
        let jobs = if self.jobs.is_empty() {
            &no_job[..]
        } else {
            self.jobs
        };
        steps.push(step(
            "Restore everything to /restore; `--to /` restores it to the original paths",
            jobs.iter()
                .map(|job| {
                    let words = ["--key-file", &key, "restore", &target, &job.name];
                    with(&[&words[..], &["--to", "/restore"]].concat())
                })
                .collect(),
        ));
        let text = |text: &str| toml::Value::from(text).to_string();
        let mut config = vec![
            format!("[container.{}]", text(name)),
            format!("target = {}", text(&target)),
            format!("key_file = {}", text(&key)),
        ];
        if self.target.ssh().is_some() {
            config.push(format!("ssh_command = {}", text(&ssh)));
        }
        // The config refuses a job without anything to back up, and the sheet has no `command` of a job.
        for job in jobs.iter().filter(|job| !job.sources.is_empty()) {
            let sources: Vec<String> = job.sources.iter().map(|source| text(source)).collect();
            config.extend([
                format!("[job.{}]", text(&job.name)),
                format!("container = {}", text(name)),
                format!("sources = [{}]", sources.join(", ")),
            ]);
        }
        steps.push(step(
            "Continue the backups. This config has only the sources of each job. If you restored your own sprat.toml, \
             copy all other settings from it",
            vec![
                write_file("/etc/sprat/sprat.toml", &config),
                "sprat backup".to_owned(),
            ],
        ));
        steps
    }

    /// What is not on the sheet, each in a sentence.
    pub fn unknown(&self) -> &[String] {
        &self.known.unknown
    }

    /// The sheet as JSON, with the path of the key file as it is to be shown.
    #[must_use]
    pub fn json(&self, key_file: Option<&str>) -> serde_json::Value {
        serde_json::json!({
            "secret": true,
            "made": self.made_at,
            "recovery_key": self.recovery_key,
            "key_file": key_file,
            "key_file_sha256": self.key_file.map(|(_, sha256)| sha256),
            "steps": self.steps(),
            "steps_with_sprat": self.steps_with_sprat(),
            "unknown": self.unknown(),
            "text": self.text(),
        })
    }

    /// The sheet as it is printed.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let rule = "=".repeat(78);
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{rule}\n{TITLE}                     SECRET: print it, keep it off this machine\n{rule}"
        );
        for (name, value) in self.fields() {
            let _ = writeln!(text, "{name:<14} {value}");
        }
        let _ = writeln!(text, "\n{}", self.advice());
        for unknown in self.unknown() {
            let _ = writeln!(text, "\nNOT ON THIS SHEET: {unknown}");
        }
        text.push_str(
            "\nTo restore everything without sprat, run these commands as root on any Linux\n\
             machine with cryptsetup, sshfs and rsync, while no backup runs:\n",
        );
        print_steps(&mut text, &self.steps());
        text.push_str(
            "\nIf the account may only read: add --readonly to `cryptsetup open` and use\n\
             `mount -o ro,noload`; if the file system is btrfs, `mount -o ro`.\n\
             If `mount` does not know btrfs, use another Linux: RHEL and Rocky have none. The\n\
             package btrfs-progs has the programs that check it.\n",
        );
        text.push_str("\nWith sprat on a new machine, as root:\n");
        print_steps(&mut text, &self.steps_with_sprat());
        let _ = writeln!(text, "\n{LOST_IN_A_BACKUP}\n       {}", self.unlock());
        let _ = writeln!(text, "{rule}");
        text
    }

    /// Everything except the commands: names and values.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("Made", self.made_at.to_owned()),
            ("Container", self.target.to_string()),
        ];
        match self.target.ssh() {
            Some(SshLocation {
                user,
                host,
                port,
                folder,
            }) => {
                match &self.known.server {
                    Some(server) => fields.extend(known_fields(server, host)),
                    None => {
                        let elsewhere = || "as ~/.ssh/config says".to_owned();
                        let port = port.map(|port| port.to_string());
                        fields.extend([
                            ("Server", host.clone()),
                            ("Login", user.clone().unwrap_or_else(elsewhere)),
                            ("Port", port.unwrap_or_else(|| elsewhere() + " (22)")),
                        ]);
                    }
                }
                fields.push(("Folder", folder.clone()));
            }
            None => {
                let folder = self.target.local_folder();
                fields.extend(folder.map(|folder| ("Folder", folder.display().to_string())));
            }
        }
        fields.push(("File", self.target.name.to_string()));
        fields.push(("UUID", self.pins.uuid.clone()));
        fields.push(("Fingerprint", self.pins.fingerprint()));
        let pins = self.pins;
        fields.push((
            "Header",
            format!(
                "{}, {}-bit key, sectors of {} bytes, offset {}, IV tweak {}",
                pins.cipher,
                pins.key_bits,
                pins.sector_bytes,
                pins.payload_offset_bytes,
                pins.iv_tweak
            ),
        ));
        fields.push(("Key digest", pins.volume_key_digest.clone()));
        if let Some((path, sha256)) = self.key_file {
            fields.push(("Key file", path.display().to_string()));
            fields.push(("  its SHA-256", sha256.to_owned()));
        }
        fields.push((RECOVERY_KEY, self.recovery_key.to_owned()));
        fields
    }

    /// What the keys open, and where they are stored.
    pub(super) fn advice(&self) -> String {
        let (what, key_file) = match self.key_file {
            Some(_) => ("key file", true),
            None => ("passphrase", false),
        };
        let mut advice = format!(
            "The {what} and the recovery key each open the container. Without both, nobody can open it."
        );
        if key_file {
            advice += "\nThe key file is on this machine only: copy it to a safe place, too.";
        }
        if self.target.ssh().is_some() {
            advice += "\nssh's own key is on this machine only: copy it to a safe place, too, or let \
                       the\nserver accept a new one.";
        }
        advice
    }

    fn container_path(&self) -> String {
        match self.target.local_path() {
            Some(path) => path.display().to_string(),
            None => format!("{SERVER_DIR}/{}", self.target.name),
        }
    }

    /// The command that writes an ssh configuration, which needs no other one; `None` for a local container.
    fn ssh_config(&self) -> Option<String> {
        let SshLocation {
            user, host, port, ..
        } = self.target.ssh()?;
        let lines = match &self.known.server {
            Some(server) => server.ssh_config(SSH_NAME),
            None => KnownServer {
                host: host.clone(),
                user: user.clone().unwrap_or_default(),
                port: port.unwrap_or(0),
                ..KnownServer::default()
            }
            .ssh_config(SSH_NAME),
        };
        Some(write_file(SSH_CONFIG, &lines))
    }

    /// `sshfs -F CONFIG sprat-server:FOLDER DIR`
    fn sshfs(&self) -> Option<String> {
        let remote = format!("{SSH_NAME}:{}", self.target.ssh()?.folder);
        Some(quoted(&["sshfs", "-F", SSH_CONFIG, &remote, SERVER_DIR]))
    }

    fn copy_commands(&self) -> Vec<String> {
        let mut jobs: Vec<&str> = self.jobs.iter().map(|job| job.name.as_str()).collect();
        if jobs.is_empty() {
            jobs.push("JOB");
        }
        let mut commands = vec!["mkdir -p /restore".to_owned()];
        commands.extend(jobs.iter().map(|job| {
            let from = format!("{VOLUME_DIR}/{job}/latest/");
            quoted(&["rsync", "-aHAXXS", "--numeric-ids", &from, "/restore/"])
        }));
        commands
    }
}

/// The fields of the server, without names that only the lost machine knows; `named` is its name in the
/// target.
fn known_fields(server: &KnownServer, named: &str) -> Vec<(&'static str, String)> {
    let mut host = server.host.clone();
    if !host.eq_ignore_ascii_case(named) {
        let _ = write!(host, " ({named} in this machine's ssh configuration)");
    }
    let mut fields = vec![
        ("Server", host),
        ("Login", server.user.clone()),
        ("Port", server.port.to_string()),
    ];
    for identity in &server.identities {
        let mut shown = identity.path.display().to_string();
        if let Some(fingerprint) = &identity.fingerprint {
            let _ = write!(shown, " ({fingerprint})");
        }
        fields.push(("ssh's key", shown));
    }
    let keys = server.host_keys.iter();
    fields.extend(keys.map(|key| ("Its host key", key.clone())));
    if let Some(proxy) = &server.proxy {
        fields.push(("Reached by", proxy.option()));
    }
    if let Some(Proxy::Jump(hops)) = &server.proxy {
        for hop in hops {
            let keys = hop.host_keys.iter();
            fields.extend(keys.map(|key| ("Jump host key", format!("{} {key}", hop.host))));
        }
    }
    fields
}

fn step(what: &str, commands: Vec<String>) -> Step {
    Step {
        what: what.to_owned(),
        commands,
    }
}

/// Words as a shell line. No word here contains a NUL, the only character that can't be quoted.
fn quoted(words: &[&str]) -> String {
    let quoted = words.iter().map(|word| match shlex::try_quote(word) {
        Ok(quoted) => quoted.into_owned(),
        Err(_) => unreachable!("checked when it was parsed: no NUL"),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// One command that writes these lines to a file. It may be copied with any indentation.
fn write_file(path: &str, lines: &[String]) -> String {
    let mut command = "printf '%s\\n'".to_owned();
    for line in lines {
        command.push_str(" \\\n  ");
        command.push_str(&quoted(&[line]));
    }
    let _ = write!(command, " \\\n  > {path}");
    command
}

fn print_steps(text: &mut String, steps: &[Step]) {
    for (number, step) in steps.iter().enumerate() {
        let _ = writeln!(text, "\n{}. {}", number + 1, step.what);
        for line in step.commands.iter().flat_map(|command| command.lines()) {
            let _ = writeln!(text, "       {line}");
        }
    }
}
