//! The server as ssh finds it: what an alias of `~/.ssh/config` stands for, how one logs in there, and the
//! keys that the server is known by. After a fire neither that file nor `known_hosts` is there, so all of it
//! stands on the recovery sheet.

mod text;

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::address::{SshLocation, Target};
use crate::ssh_config::text::{
    config_word, expanded, is_default_known_hosts, jump_of_command, keys, new_known_hosts,
    of_jumps, paths, settings,
};

/// A jump host may itself be reached by another one, so many deep at most; ssh has no limit.
const DEPTH_MAX: usize = 8;

/// How long all questions together may take: `ssh -G` runs the `Match exec` of the configuration, and
/// that may hang.
const TIME_MAX: Duration = Duration::from_secs(10);

/// Settings that decide whether ssh reaches a server and is let in; each stands on the sheet where it is
/// not as without a configuration. Not among them are those that are asked for by name below.
const SETTINGS: &[&str] = &[
    "addressfamily",
    "bindaddress",
    "bindinterface",
    "casignaturealgorithms",
    "certificatefile",
    "ciphers",
    "hostkeyalgorithms",
    "identitiesonly",
    "ipqos",
    "kbdinteractiveauthentication",
    "kexalgorithms",
    "macs",
    "passwordauthentication",
    "pkcs11provider",
    "preferredauthentications",
    "pubkeyacceptedalgorithms",
    "pubkeyauthentication",
    "requiredrsasize",
    "securitykeyprovider",
];

/// What ssh's own configuration says of a server.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct KnownServer {
    /// Name (ssh makes it lower case) or address that is connected to, without brackets.
    pub host: String,
    /// Empty: not known.
    pub user: String,
    /// 0: not known.
    pub port: u16,
    /// The way through another server, if there is one.
    pub proxy: Option<Proxy>,
    /// Kind and SHA-256 of each key in `known_hosts`, such as `ED25519 SHA256:…`.
    pub host_keys: Vec<String>,
    /// The name that its keys have in `known_hosts`.
    pub known_as: String,
    /// The file that ssh adds new host keys to. It may not be there yet. `None`: ssh adds none.
    pub known_hosts: Option<PathBuf>,
    /// ssh's key files that are there.
    pub identities: Vec<Identity>,
    /// Further settings that are not the default: the name as `ssh -G` writes it, and the value.
    pub settings: Vec<(String, String)>,
}

/// A key file of ssh's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The private key file.
    pub path: PathBuf,
    /// Kind and SHA-256, where `ssh-keygen` can tell.
    pub fingerprint: Option<String>,
}

/// What a server is reached by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proxy {
    /// `ProxyJump`: one after the other, the first of them from this machine.
    Jump(Vec<KnownServer>),
    /// `ProxyCommand`.
    Command(String),
}

/// What could be found out of a target's server.
#[derive(Debug, Default)]
pub struct Known {
    /// `None` for a local target, and where ssh can't tell.
    pub server: Option<KnownServer>,
    /// What could not be found out, each a sentence for the sheet.
    pub unknown: Vec<String>,
}

impl Known {
    /// Asks `ssh -G`, `ssh-keygen -F` and `ssh-keygen -l`, none of which connects; for ten seconds at
    /// most.
    pub fn look_up(target: &Target, ssh_command: &[OsString]) -> Self {
        let mut known = Self::default();
        let Some(SshLocation { host, .. }) = target.ssh() else {
            return known;
        };
        // What only stands in for ssh may do anything with an option that it doesn't know: it is not
        // run. What stands before ssh, such as sshpass, is left out.
        let is_ssh = |word: &OsString| Path::new(word).file_name() == Some(OsStr::new("ssh"));
        let named = |word: Option<&OsString>| {
            let name = word.map(Path::new).and_then(Path::file_name);
            name.unwrap_or_default().to_string_lossy().into_owned()
        };
        let Some(at) = ssh_command.iter().position(is_ssh) else {
            known.unknown.push(format!(
                "The machine connects with another program than ssh, `{}`. How this program reaches \
                 {host} is not known.",
                named(ssh_command.first())
            ));
            return known;
        };
        if at > 0 {
            known.unknown.push(format!(
                "The machine starts ssh through `{}`. What this program adds, such as a password, is \
                 not known.",
                named(ssh_command.first())
            ));
        }
        let mut asking = Asking {
            until: Instant::now() + TIME_MAX,
            unknown: Vec::new(),
        };
        known.server = asking.server(&ssh_command[at..], target, DEPTH_MAX);
        known.unknown.append(&mut asking.unknown);
        match &known.server {
            None => {
                let why = if Instant::now() >= asking.until {
                    "did not answer in time (a `Match exec` of its configuration may hang)"
                } else {
                    "failed"
                };
                known.unknown.push(format!(
                    "How {host} is reached is not known: `ssh -G {host}` {why}."
                ));
            }
            Some(server) if server.identities.is_empty() => known.unknown.push(
                "No key file of ssh was found. How the machine logs in (password, agent, hardware key) \
                 is not known."
                    .to_owned(),
            ),
            Some(_) => {}
        }
        known
    }
}

impl Proxy {
    /// As an option of ssh, for people to read.
    pub fn option(&self) -> String {
        match self {
            Self::Jump(hops) => {
                let hops: Vec<String> = hops.iter().map(KnownServer::spelled).collect();
                format!("ProxyJump={}", hops.join(","))
            }
            Self::Command(command) => format!("ProxyCommand={command}"),
        }
    }
}

impl KnownServer {
    /// `user@host:port`; without a user ssh did not tell it.
    fn spelled(&self) -> String {
        if self.user.is_empty() {
            return self.host.clone();
        }
        let mut spelled = format!("{}@", self.user);
        match self.host.contains(':') {
            true => spelled.push_str(&format!("[{}]", self.host)),
            false => spelled.push_str(&self.host),
        }
        if self.port != 22 && self.port != 0 {
            spelled.push_str(&format!(":{}", self.port));
        }
        spelled
    }

    /// A configuration of ssh's that needs no other: the server as `name`, its jump hosts as
    /// `NAME-hop-1` and so on. One line of the file each.
    pub fn ssh_config(&self, name: &str) -> Vec<String> {
        let mut lines = Vec::new();
        let mut proxy = match &self.proxy {
            Some(Proxy::Command(command)) => Some(format!("ProxyCommand {command}")),
            _ => None,
        };
        if let Some(Proxy::Jump(hops)) = &self.proxy {
            for (index, hop) in hops.iter().enumerate() {
                let hop_name = format!("{name}-hop-{}", index + 1);
                let before = match &hop.proxy {
                    Some(Proxy::Command(command)) => Some(format!("ProxyCommand {command}")),
                    _ => proxy,
                };
                hop.host_lines(&hop_name, before, &mut lines);
                proxy = Some(format!("ProxyJump {hop_name}"));
            }
        }
        self.host_lines(name, proxy, &mut lines);
        lines
    }

    fn host_lines(&self, name: &str, proxy: Option<String>, lines: &mut Vec<String>) {
        lines.push(format!("Host {name}"));
        let mut setting = |line: String| lines.push(format!("  {line}"));
        // ssh expands `%` here.
        setting(format!("HostName {}", self.host.replace('%', "%%")));
        if !self.user.is_empty() {
            setting(format!("User {}", config_word(&self.user)));
        }
        if self.port != 22 && self.port != 0 {
            setting(format!("Port {}", self.port));
        }
        for identity in &self.identities {
            let path = identity.path.to_string_lossy().replace('%', "%%");
            setting(format!("IdentityFile {}", config_word(&path)));
        }
        for (name, value) in &self.settings {
            setting(format!("{name} {value}"));
        }
        proxy.into_iter().for_each(setting);
    }
}

/// Questions to ssh, with an end.
struct Asking {
    until: Instant,
    unknown: Vec<String>,
}

impl Asking {
    fn server(&mut self, ssh: &[OsString], target: &Target, depth: usize) -> Option<KnownServer> {
        let SshLocation {
            user, host, port, ..
        } = target.ssh()?;
        let mut words: Vec<OsString> = Vec::new();
        if let Some(user) = user {
            words.extend(["-l".into(), user.into()]);
        }
        if let Some(port) = port {
            words.extend(["-p".into(), port.to_string().into()]);
        }
        words.extend(["--".into(), host.into()]);
        self.ask(ssh, &words, depth)
    }

    /// Asks what `SSH… -G WORDS…` says.
    fn ask(&mut self, ssh: &[OsString], words: &[OsString], depth: usize) -> Option<KnownServer> {
        let (program, first) = ssh.split_first()?;
        let said = self.said_by(Command::new(program).args(first).arg("-G").args(words))?;
        let mut server = KnownServer::default();
        let (mut known_as, mut files, mut identities) = (None, Vec::new(), Vec::new());
        let mut user_files = None;
        for (word, value) in settings(&said) {
            match word {
                "hostname" => value.clone_into(&mut server.host),
                "user" => value.clone_into(&mut server.user),
                "port" => server.port = value.parse().ok()?,
                "proxyjump" if value != "none" => {
                    let hops = self.hops(&of_jumps(&[ssh, words].concat()), value, depth);
                    server.proxy = Some(Proxy::Jump(hops));
                }
                "proxycommand" if value != "none" => {
                    server.proxy = Some(self.proxy_command(value, depth));
                }
                "hostkeyalias" => known_as = Some(value.to_owned()),
                "userknownhostsfile" => {
                    user_files = Some(value);
                    files.extend(paths(value));
                }
                "globalknownhostsfile" => files.extend(paths(value)),
                "identityfile" => identities.push(value),
                _ => {}
            }
        }
        if server.host.is_empty() || server.user.is_empty() || server.port == 0 {
            return None;
        }
        for value in identities {
            let path = expanded(value, &server);
            if path.is_file() && !server.identities.iter().any(|known| known.path == path) {
                let fingerprint = self.fingerprint(&path);
                server.identities.push(Identity { path, fingerprint });
            }
        }
        self.settings(program, &said, &mut server);
        if let Some(alias) = &known_as {
            let alias = ("hostkeyalias".to_owned(), config_word(alias));
            server.settings.push(alias);
        }
        // Those that are not ssh's own are named on the sheet: on this machine they answer for the
        // server, elsewhere ssh asks a person to compare the key.
        server.known_hosts = user_files.and_then(new_known_hosts);
        if let Some(value) = user_files
            && !is_default_known_hosts(value)
        {
            let own: Vec<String> = paths(value).iter().map(|file| config_word(file)).collect();
            if !own.is_empty() {
                let setting = ("userknownhostsfile".to_owned(), own.join(" "));
                server.settings.push(setting);
            }
        }
        server.known_as = known_as.unwrap_or_else(|| match (&server.host, server.port) {
            (host, 22) => host.clone(),
            (host, port) => format!("[{host}]:{port}"),
        });
        for file in files {
            let mut command = Command::new("ssh-keygen");
            let found = self.said_by(command.args(["-l", "-F", &server.known_as, "-f", &file]));
            for key in found.iter().flat_map(|found| keys(found)) {
                if !server.host_keys.contains(&key) {
                    server.host_keys.push(key);
                }
            }
        }
        Some(server)
    }

    /// What differs from ssh without any configuration.
    fn settings(&mut self, program: &OsStr, said: &str, server: &mut KnownServer) {
        let mut command = Command::new(program);
        let plain = self.said_by(command.args(["-F", "none", "-G", "--", &server.host]));
        let Some(plain) = plain else {
            return;
        };
        let plain: Vec<_> = settings(&plain).collect();
        for (name, value) in settings(said) {
            if !SETTINGS.contains(&name) || plain.contains(&(name, value)) {
                continue;
            }
            let value = match name {
                "certificatefile" | "pkcs11provider" | "securitykeyprovider" => {
                    let path = expanded(value, server);
                    config_word(&path.to_string_lossy().replace('%', "%%"))
                }
                _ => value.to_owned(),
            };
            server.settings.push((name.to_owned(), value));
        }
    }

    fn fingerprint(&mut self, key: &Path) -> Option<String> {
        let said = self.said_by(Command::new("ssh-keygen").arg("-l").arg("-f").arg(key))?;
        let words: Vec<&str> = said.split_whitespace().collect();
        let kind = words.last()?.trim_matches(['(', ')']);
        Some(format!("{kind} {}", words.get(1)?))
    }

    /// A `ProxyCommand` that only does what `ProxyJump` does is taken as one: it may need the very
    /// configuration that is lost.
    fn proxy_command(&mut self, command: &str, depth: usize) -> Proxy {
        let as_it_stands = || Proxy::Command(command.to_owned());
        if let Some(words) = jump_of_command(command)
            && depth > 0
        {
            let ssh: Vec<OsString> = words.iter().map(OsString::from).collect();
            let server = self.ask(&ssh[..1], &ssh[1..], depth - 1);
            if let Some(mut server) = server {
                let mut hops = Vec::new();
                if let Some(Proxy::Jump(before)) = &mut server.proxy {
                    hops.append(before);
                    server.proxy = None;
                }
                hops.push(server);
                return Proxy::Jump(hops);
            }
        }
        self.unknown.push(format!(
            "The ProxyCommand is that of the machine: `{command}`. The programs, files and names in it \
             must exist where you use it."
        ));
        as_it_stands()
    }

    /// The hosts of a `ProxyJump`. Only the first of them may have a proxy of its own: ssh sets the
    /// others' itself.
    fn hops(&mut self, ssh: &[OsString], value: &str, depth: usize) -> Vec<KnownServer> {
        let mut hops: Vec<KnownServer> = Vec::new();
        for hop in value.split(',') {
            let hop = hop.strip_prefix("ssh://").unwrap_or(hop);
            // As the server of a target is written.
            let target = Target::parse(&format!("ssh://{hop}/x.luks"), Path::new("/")).ok();
            let asked = target
                .filter(|_| depth > 0)
                .and_then(|target| self.server(ssh, &target, depth - 1));
            let mut server = asked.unwrap_or_else(|| {
                self.unknown
                    .push(format!("The address of the jump host {hop} is not known."));
                KnownServer {
                    host: hop.to_owned(),
                    ..KnownServer::default()
                }
            });
            if !hops.is_empty() {
                server.proxy = None;
            } else if let Some(Proxy::Jump(before)) = &mut server.proxy {
                hops.append(before);
                server.proxy = None;
            }
            hops.push(server);
        }
        hops
    }

    /// Standard output of a command that ended well, in time.
    fn said_by(&self, command: &mut Command) -> Option<String> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut out = child.stdout.take()?;
        let (done, answer) = mpsc::channel();
        // It may leave a child that holds the pipe: that thread then waits on, and nobody for it.
        std::thread::spawn(move || {
            let mut said = Vec::new();
            let read = out.read_to_end(&mut said).map(|_| said);
            let _ = done.send(read);
        });
        let left = self.until.saturating_duration_since(Instant::now());
        let Ok(Ok(said)) = answer.recv_timeout(left) else {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        };
        while Instant::now() < self.until {
            match child.try_wait() {
                Ok(Some(status)) => {
                    return String::from_utf8(said).ok().filter(|_| status.success());
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => return None,
            }
        }
        let _ = child.kill();
        let _ = child.wait();
        None
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sprat_testkit::{needs, requires};

    use super::*;

    #[test]
    fn an_alias_is_what_ssh_makes_of_it_and_its_keys_are_those_that_are_trusted() {
        requires!(needs::program("ssh-keygen"));
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let key = |name: &str| {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", &path(name)])
                .status();
            assert!(made.unwrap().success());
            let public = fs::read_to_string(path(&format!("{name}.pub"))).unwrap();
            let told = Command::new("ssh-keygen")
                .args(["-l", "-f", &path(name)])
                .output();
            let told = String::from_utf8(told.unwrap().stdout).unwrap();
            let hash = told.split_whitespace().nth(1).unwrap().to_owned();
            (public.trim().to_owned(), format!("ED25519 {hash}"))
        };
        let ((good, good_hash), (bad, bad_hash)) = (key("good"), key("bad"));
        let known =
            format!("[nas.example]:2222 {good}\n@revoked [nas.example]:2222 {bad}\nother {bad}\n");
        fs::write(path("known"), &known).unwrap();
        let gate_known = format!("gate.example {bad}\n");
        fs::write(path("known too"), gate_known).unwrap();
        let config = format!(
            "Host nas\n HostName NAS.example\n User u1\n Port 2222\n ProxyJump gate,u3@inner:23\n\
             Host gate\n HostName gate.example\n User u2\n ProxyJump [fe80::1]:24\n\
             Host inner\n ProxyJump elsewhere\n\
             Host *\n UserKnownHostsFile \"{1}\" {0}\n GlobalKnownHostsFile {0} /nowhere\n User u0\n",
            path("known"),
            path("known too"),
        );
        fs::write(path("config"), config).unwrap();
        let ssh = ["ssh", "-F", &path("config")].map(OsString::from);
        let target = |text: &str| Target::parse(text, Path::new("/")).unwrap();
        // Where the known keys lie is named on the sheet; that is tested by typing it.
        let look_up = |target: &Target, ssh: &[OsString]| {
            let mut server = Known::look_up(target, ssh).server?;
            let bare = |server: &mut KnownServer| {
                server.settings.clear();
                server.identities.clear();
                server.known_hosts = None;
                server.known_as.clear();
            };
            bare(&mut server);
            if let Some(Proxy::Jump(hops)) = &mut server.proxy {
                hops.iter_mut().for_each(bare);
            }
            Some(server)
        };
        let hop = |host: &str, user: &str, port, host_keys: &[String]| KnownServer {
            host: host.to_owned(),
            user: user.to_owned(),
            port,
            proxy: None,
            host_keys: host_keys.to_vec(),
            ..KnownServer::default()
        };
        let jump = Proxy::Jump(vec![
            hop("fe80::1", "u0", 24, &[]),
            hop("gate.example", "u2", 22, &[bad_hash]),
            hop("inner", "u3", 23, &[]),
        ]);
        let option = "ProxyJump=u0@[fe80::1]:24,u2@gate.example,u3@inner:23";
        assert_eq!(jump.option(), option);
        let mut expected = KnownServer {
            proxy: Some(jump),
            ..hop("nas.example", "u1", 2222, &[good_hash])
        };
        let found = look_up(&target("nas:x.luks"), &ssh);
        assert_eq!(found.as_ref(), Some(&expected));
        // What the target says goes before what the file says.
        expected.user = "u2".to_owned();
        expected.port = 23;
        expected.host_keys.clear();
        let found = look_up(&target("ssh://u2@nas:23/x.luks"), &ssh);
        assert_eq!(found.as_ref(), Some(&expected));
        assert_eq!(look_up(&target("/x.luks"), &ssh), None);
        // Nothing but ssh itself is asked, and one that fails is no reason for having no sheet.
        let other = [path("config").into()];
        assert_eq!(look_up(&target("nas:x.luks"), &other), None);
        let absent = [path("ssh").into()];
        assert_eq!(look_up(&target("nas:x.luks"), &absent), None);
    }
    #[test]
    fn ssh_that_hangs_or_is_another_program_is_said_and_costs_no_more_than_the_limit() {
        requires!(needs::program("ssh"));
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config");
        fs::write(&config, "Match exec \"sleep 600\"\n User x\n").unwrap();
        let target = Target::parse("nas:x.luks", Path::new("/")).unwrap();
        let config = config.display().to_string();
        let begun = Instant::now();
        let known = Known::look_up(&target, &["ssh", "-F", &config].map(OsString::from));
        assert!(begun.elapsed() < TIME_MAX + Duration::from_secs(10));
        assert_eq!(known.server, None);
        assert!(
            known.unknown[0].contains("did not answer in time"),
            "{known:?}"
        );
        let known = Known::look_up(&target, &["rclone".into()]);
        assert!(
            known.server.is_none() && known.unknown.len() == 1,
            "{known:?}"
        );
        let wrapped = ["sshpass", "-e", "ssh", "-F", "none"].map(OsString::from);
        let known = Known::look_up(&target, &wrapped);
        assert!(known.server.is_some(), "{known:?}");
        assert!(known.unknown[0].contains("sshpass"), "{known:?}");
    }
}
