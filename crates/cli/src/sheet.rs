//! The recovery sheet: all that is needed to get everything back without sprat.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use sprat_luks::Pins;

use crate::known_server::{KnownServer, Proxy};
use crate::target::{Place, Target};

/// Where the stock commands mount the server's folder and the volume.
const SERVER_DIR: &str = "/mnt/sprat-server";
const VOLUME_DIR: &str = "/mnt/sprat-volume";
const MAPPER_NAME: &str = "sprat-restore";
/// The field that holds the secret.
pub(crate) const RECOVERY_KEY: &str = "RECOVERY KEY";

/// What the sheet tells. It holds the recovery key: whoever reads it reads the backup.
#[derive(Debug)]
pub(crate) struct Sheet<'s> {
    pub target: &'s Target,
    pub ssh_command: &'s [OsString],
    /// What ssh's configuration says of the server.
    pub server: Option<KnownServer>,
    pub pins: &'s Pins,
    pub recovery_key: &'s str,
    /// Path of the key file and the SHA-256 of its content.
    pub key_file: Option<(&'s Path, &'s str)>,
    /// Jobs that the config sends into this container.
    pub jobs: &'s [String],
}

/// One step of getting everything back.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Step {
    /// What it is for.
    pub what: String,
    /// The commands, each a line to be typed as it stands.
    pub commands: Vec<String>,
}

impl Sheet<'_> {
    /// The stock commands, with real values.
    pub(crate) fn steps(&self) -> Vec<Step> {
        let file = self.container_path();
        let mut begin = vec![format!("mkdir -p {VOLUME_DIR}")];
        if let Some(sshfs) = self.sshfs() {
            begin = vec![format!("mkdir -p {SERVER_DIR} {VOLUME_DIR}"), sshfs];
        }
        let open = |key: &[&str]| {
            let mut words = vec!["cryptsetup", "open", "--type", "luks2"];
            words.extend(key);
            words.extend([file.as_str(), MAPPER_NAME]);
            quoted(&words)
        };
        let mut steps = vec![
            step("Reach the server's folder", begin),
            step(
                "Look at the container: the UUID, aes-xts-plain64 and the offset must be those above",
                vec![quoted(&["cryptsetup", "luksDump", &file])],
            ),
        ];
        let typed = open(&[]);
        match self.key_file {
            Some((path, _)) => {
                let path = path.to_string_lossy();
                steps.push(step(
                    "Open it with the key file",
                    vec![open(&["--key-file", &path])],
                ));
                steps.push(step(
                    "… or, without the key file, with the recovery key, typed with its dashes",
                    vec![typed],
                ));
            }
            None => steps.push(step(
                "Open it with the passphrase or the recovery key, the latter typed with its dashes",
                vec![typed],
            )),
        }
        let mapper = format!("/dev/mapper/{MAPPER_NAME}");
        steps.push(step(
            "Look inside",
            vec![
                quoted(&["mount", "-o", "ro", &mapper, VOLUME_DIR]),
                quoted(&["ls", "-l", VOLUME_DIR]),
            ],
        ));
        steps.push(step(
            "Copy everything back to /restore, owners, times, links and all",
            self.copy_commands(),
        ));
        let mut end = vec![
            quoted(&["umount", VOLUME_DIR]),
            quoted(&["cryptsetup", "close", MAPPER_NAME]),
        ];
        if self.target.login().is_some() {
            end.push(quoted(&["fusermount3", "-u", SERVER_DIR]));
        }
        steps.push(step("Leave it as it was", end));
        steps
    }

    /// The sheet as it is printed.
    pub(crate) fn text(&self, made_at: &str) -> String {
        let mut text = String::new();
        let rule = "=".repeat(78);
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{rule}\nSPRAT RECOVERY SHEET                     SECRET: print it, keep it off this machine\n{rule}"
        );
        for (name, value) in self.fields(made_at) {
            let _ = writeln!(text, "{name:<14} {value}");
        }
        let _ = writeln!(text, "\n{}", self.advice());
        text.push_str(
            "\nTo get everything back without sprat, type these as root on any Linux machine with\n\
             cryptsetup, sshfs and rsync, while no backup runs:\n",
        );
        for (number, step) in self.steps().iter().enumerate() {
            let _ = writeln!(text, "\n{}. {}", number + 1, step.what);
            for command in &step.commands {
                let _ = writeln!(text, "       {command}");
            }
        }
        text.push_str(
            "\nIf the server lets you only read: add --readonly to `cryptsetup open` and use\n\
             `mount -o ro,noload`.\n\
             With sprat on a new machine: `sprat restore` with --fingerprint and the value above.\n",
        );
        let _ = writeln!(text, "{rule}");
        text
    }

    /// Everything but the commands, name and value.
    pub(crate) fn fields(&self, made_at: &str) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("Made", made_at.to_owned()),
            ("Container", self.target.to_string()),
        ];
        match &self.target.place {
            Place::Ssh {
                user,
                host,
                port,
                folder,
            } => {
                match &self.server {
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
            Place::Local { folder } => fields.push(("Folder", folder.display().to_string())),
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

    /// What the keys are worth, and where they lie.
    pub(crate) fn advice(&self) -> &'static str {
        match self.key_file {
            Some(_) => {
                "Either the key file or the recovery key opens the container; without both nobody\n\
                 can. The key file lies on this machine only: copy it to a safe place too."
            }
            None => {
                "Either the passphrase or the recovery key opens the container; without both nobody\n\
                 can."
            }
        }
    }

    fn container_path(&self) -> String {
        match &self.target.place {
            Place::Ssh { .. } => format!("{SERVER_DIR}/{}", self.target.name),
            Place::Local { folder } => folder.join(self.target.name.as_str()).display().to_string(),
        }
    }

    /// `sshfs [-p PORT] [-o ssh_command=…] user@host:folder DIR`
    fn sshfs(&self) -> Option<String> {
        let Place::Ssh {
            user,
            host,
            port,
            folder,
        } = &self.target.place
        else {
            return None;
        };
        let mut ssh: Vec<String> = self
            .ssh_command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let (host, user, port) = match &self.server {
            // Not by the alias: where these are typed nothing knows it.
            Some(server) => {
                if let Some(proxy) = &server.proxy {
                    ssh.extend(["-o".to_owned(), proxy.option()]);
                }
                let port = Some(server.port).filter(|port| *port != 22);
                (&server.host, Some(&server.user), port)
            }
            None => (host, user.as_ref(), *port),
        };
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.clone()
        };
        let login = user.map_or(host.clone(), |user| format!("{user}@{host}"));
        let remote = format!("{login}:{folder}");
        let port = port.map(|port| port.to_string());
        let mut words = vec!["sshfs"];
        if let Some(port) = &port {
            words.extend(["-p", port]);
        }
        let ssh_option = format!("ssh_command={}", sshfs_words(&ssh));
        if ssh != ["ssh"] {
            words.extend(["-o", &ssh_option]);
        }
        words.extend([remote.as_str(), SERVER_DIR]);
        Some(quoted(&words))
    }

    fn copy_commands(&self) -> Vec<String> {
        let jobs = if self.jobs.is_empty() {
            &["JOB".to_owned()]
        } else {
            self.jobs
        };
        let mut commands = vec!["mkdir -p /restore".to_owned()];
        commands.extend(jobs.iter().map(|job| {
            let from = format!("{VOLUME_DIR}/{job}/latest/");
            quoted(&["rsync", "-aHAXXS", "--numeric-ids", &from, "/restore/"])
        }));
        commands
    }
}

/// The server without the help of the machine that is lost; `named` is what the target calls it.
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

/// Words as a shell line. No word here holds a NUL, which alone can't be quoted.
fn quoted(words: &[&str]) -> String {
    let quoted = words.iter().map(|word| match shlex::try_quote(word) {
        Ok(quoted) => quoted.into_owned(),
        Err(_) => unreachable!("checked when it was parsed: no NUL"),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// How sshfs splits `ssh_command`: at blanks, unless a backslash is before them; its option
/// parser before that (fuse_opt) takes a comma as the end, unless a backslash is before it.
fn sshfs_words(words: &[String]) -> String {
    let escape = |text: &str, special: &[char]| {
        let mut escaped = String::new();
        for c in text.chars() {
            if special.contains(&c) {
                escaped.push('\\');
            }
            escaped.push(c);
        }
        escaped
    };
    let words: Vec<String> = words.iter().map(|word| escape(word, &[' '])).collect();
    escape(&words.join(" "), &[',', '\\'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pinned::tests::pins;

    #[test]
    fn commands_of_the_sheet_are_quoted_for_the_shell_and_for_sshfs() {
        let target = "ssh://u1@[2001:db8::1]:2222/srv/it's here/x y.luks";
        let target = Target::parse(target, Path::new("/")).unwrap();
        let ssh = ["ssh", "-i", "/root/my key", "-o", "Ciphers=a,b"].map(OsString::from);
        let sheet = Sheet {
            target: &target,
            ssh_command: &ssh,
            server: None,
            pins: &pins(),
            recovery_key: "aaaa-cccc",
            key_file: Some((Path::new("/etc/sprat/keys/x y.key"), "ff00")),
            jobs: &["büro 2".to_owned()],
        };
        insta::assert_snapshot!(sheet.text("2026-11-23 13:21:01 UTC"), @r#"
        ==============================================================================
        SPRAT RECOVERY SHEET                     SECRET: print it, keep it off this machine
        ==============================================================================
        Made           2026-11-23 13:21:01 UTC
        Container      ssh://u1@[2001:db8::1]:2222/srv/it's here/x y.luks
        Server         2001:db8::1
        Login          u1
        Port           2222
        Folder         /srv/it's here
        File           x y.luks
        UUID           8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46
        Fingerprint    893B-F403-70A0-DA3E-1442
        Header         aes-xts-plain64, 512-bit key, sectors of 4096 bytes, offset 16777216, IV tweak 0
        Key digest     0000000000000000000000000000000000000000000000000000000000000000
        Key file       /etc/sprat/keys/x y.key
          its SHA-256  ff00
        RECOVERY KEY   aaaa-cccc

        Either the key file or the recovery key opens the container; without both nobody
        can. The key file lies on this machine only: copy it to a safe place too.

        To get everything back without sprat, type these as root on any Linux machine with
        cryptsetup, sshfs and rsync, while no backup runs:

        1. Reach the server's folder
               mkdir -p /mnt/sprat-server /mnt/sprat-volume
               sshfs -p 2222 -o "ssh_command=ssh -i /root/my\\\\ key -o Ciphers=a\\,b" "u1@[2001:db8::1]:/srv/it's here" /mnt/sprat-server

        2. Look at the container: the UUID, aes-xts-plain64 and the offset must be those above
               cryptsetup luksDump '/mnt/sprat-server/x y.luks'

        3. Open it with the key file
               cryptsetup open --type luks2 --key-file '/etc/sprat/keys/x y.key' '/mnt/sprat-server/x y.luks' sprat-restore

        4. … or, without the key file, with the recovery key, typed with its dashes
               cryptsetup open --type luks2 '/mnt/sprat-server/x y.luks' sprat-restore

        5. Look inside
               mount -o ro /dev/mapper/sprat-restore /mnt/sprat-volume
               ls -l /mnt/sprat-volume

        6. Copy everything back to /restore, owners, times, links and all
               mkdir -p /restore
               rsync -aHAXXS --numeric-ids '/mnt/sprat-volume/büro 2/latest/' /restore/

        7. Leave it as it was
               umount /mnt/sprat-volume
               cryptsetup close sprat-restore
               fusermount3 -u /mnt/sprat-server

        If the server lets you only read: add --readonly to `cryptsetup open` and use
        `mount -o ro,noload`.
        With sprat on a new machine: `sprat restore` with --fingerprint and the value above.
        ==============================================================================
        "#);
    }

    #[test]
    fn a_sheet_needs_nothing_of_the_machines_ssh_configuration() {
        let target = Target::parse("nas:backup/x.luks", Path::new("/")).unwrap();
        let sheet = Sheet {
            target: &target,
            ssh_command: &["ssh".into()],
            server: Some(KnownServer {
                host: "nas.example".to_owned(),
                user: "u1".to_owned(),
                port: 2222,
                proxy: Some(Proxy::Jump(vec![
                    KnownServer {
                        host: "gate.example".to_owned(),
                        host_keys: vec!["RSA SHA256:def".to_owned()],
                        ..KnownServer::default()
                    },
                    KnownServer {
                        host: "inner".to_owned(),
                        user: "u2".to_owned(),
                        port: 22,
                        ..KnownServer::default()
                    },
                ])),
                host_keys: vec!["ED25519 SHA256:abc".to_owned()],
            }),
            pins: &pins(),
            recovery_key: "aaaa-cccc",
            key_file: None,
            jobs: &[],
        };
        let fields = sheet.fields("2026-11-23");
        let of_server: Vec<_> = fields[2..8]
            .iter()
            .map(|(name, value)| format!("{name}: {value}"))
            .collect();
        insta::assert_snapshot!(of_server.join("\n"), @r"
        Server: nas.example (nas in this machine's ssh configuration)
        Login: u1
        Port: 2222
        Its host key: ED25519 SHA256:abc
        Reached by: ProxyJump=gate.example,u2@inner
        Jump host key: gate.example RSA SHA256:def
        ");
        insta::assert_snapshot!(sheet.sshfs().unwrap(), @r#"
        sshfs -p 2222 -o "ssh_command=ssh -o ProxyJump=gate.example\\,u2@inner" u1@nas.example:backup /mnt/sprat-server
        "#);
    }
}
