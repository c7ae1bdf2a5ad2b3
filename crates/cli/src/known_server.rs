//! The server as ssh finds it: what an alias of `~/.ssh/config` stands for, and the keys that the server is
//! known by. After a fire neither that file nor `known_hosts` is there, so both stand on the recovery sheet.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::target::{Place, Target};

/// A jump host may itself be reached by another one, so many deep at most; ssh has no limit.
const DEPTH_MAX: usize = 8;

/// What ssh's own configuration says of a server.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct KnownServer {
    /// Name (ssh makes it lower case) or address that is connected to, without brackets.
    pub host: String,
    pub user: String,
    pub port: u16,
    pub proxy: Option<Proxy>,
    /// Kind and SHA-256 of each key in `known_hosts`, such as `ED25519 SHA256:…`.
    pub host_keys: Vec<String>,
}

/// What a server is reached by.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    /// `ProxyJump`: one after the other, the first of them from this machine.
    Jump(Vec<KnownServer>),
    /// `ProxyCommand`.
    Command(String),
}

impl Proxy {
    /// As an option of ssh, which needs no configuration file.
    pub(crate) fn option(&self) -> String {
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
    /// Asks `ssh -G` and `ssh-keygen -F`, neither of which connects. `None` for a local target, and
    /// where they can't tell: another program than OpenSSH's stands in for ssh, or fails.
    pub(crate) fn look_up(target: &Target, ssh_command: &[OsString]) -> Option<Self> {
        // What only stands in for ssh may do anything with an option that it doesn't know.
        if Path::new(ssh_command.first()?).file_name() != Some(OsStr::new("ssh")) {
            return None;
        }
        Self::ask(ssh_command, target, DEPTH_MAX)
    }

    fn ask(ssh: &[OsString], target: &Target, depth: usize) -> Option<Self> {
        let Place::Ssh {
            user, host, port, ..
        } = &target.place
        else {
            return None;
        };
        let (program, first) = ssh.split_first()?;
        let mut command = Command::new(program);
        command.args(first).arg("-G");
        if let Some(user) = user {
            command.args(["-l", user]);
        }
        if let Some(port) = port {
            command.args(["-p", &port.to_string()]);
        }
        let said = said_by(command.args(["--", host]))?;
        let mut server = Self::default();
        let (mut known_as, mut files) = (None, Vec::new());
        for line in said.lines() {
            let (word, value) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "hostname" => value.clone_into(&mut server.host),
                "user" => value.clone_into(&mut server.user),
                "port" => server.port = value.parse().ok()?,
                "proxyjump" if value != "none" => {
                    server.proxy = Some(Proxy::Jump(hops(&of_jumps(ssh), value, depth)));
                }
                "proxycommand" if value != "none" => {
                    server.proxy = Some(Proxy::Command(value.to_owned()));
                }
                "hostkeyalias" => known_as = Some(value.to_owned()),
                "userknownhostsfile" | "globalknownhostsfile" => files.extend(paths(value)),
                _ => {}
            }
        }
        if server.host.is_empty() || server.user.is_empty() || server.port == 0 {
            return None;
        }
        let known_as = known_as.unwrap_or_else(|| match (&server.host, server.port) {
            (host, 22) => host.clone(),
            (host, port) => format!("[{host}]:{port}"),
        });
        for file in files {
            let mut command = Command::new("ssh-keygen");
            let found = said_by(command.args(["-l", "-F", &known_as, "-f", &file]));
            for key in found.iter().flat_map(|found| keys(found)) {
                if !server.host_keys.contains(&key) {
                    server.host_keys.push(key);
                }
            }
        }
        Some(server)
    }

    /// As ssh takes it for a jump host: `user@host:port`; without a user it was not told by ssh.
    fn spelled(&self) -> String {
        if self.user.is_empty() {
            return self.host.clone();
        }
        let mut spelled = format!("{}@", self.user);
        match self.host.contains(':') {
            true => spelled.push_str(&format!("[{}]", self.host)),
            false => spelled.push_str(&self.host),
        }
        if self.port != 22 {
            spelled.push_str(&format!(":{}", self.port));
        }
        spelled
    }
}

/// The command for a jump host: of all options ssh hands on only the configuration file
/// (`main` in OpenSSH's ssh.c).
fn of_jumps(ssh: &[OsString]) -> Vec<OsString> {
    let mut command = vec![ssh[0].clone()];
    let mut words = ssh[1..].iter();
    while let Some(word) = words.next() {
        if word.to_string_lossy().starts_with("-F") {
            command.push(word.clone());
            command.extend(words.next().filter(|_| word == "-F").cloned());
        }
    }
    command
}

/// The hosts of a `ProxyJump`. Only the first of them may have a jump host of its own: ssh sets the
/// others' itself.
fn hops(ssh: &[OsString], value: &str, depth: usize) -> Vec<KnownServer> {
    let mut hops: Vec<KnownServer> = Vec::new();
    for hop in value.split(',') {
        let hop = hop.strip_prefix("ssh://").unwrap_or(hop);
        // As the server of a target is written.
        let target = Target::parse(&format!("ssh://{hop}/x.luks"), Path::new("/")).ok();
        let asked = target
            .filter(|_| depth > 0)
            .and_then(|target| KnownServer::ask(ssh, &target, depth - 1));
        // What can't be told stands there as it is written.
        let mut server = asked.unwrap_or_else(|| KnownServer {
            host: hop.to_owned(),
            ..KnownServer::default()
        });
        if let Some(Proxy::Jump(before)) = server.proxy.take()
            && hops.is_empty()
        {
            hops.extend(before);
        }
        hops.push(server);
    }
    hops
}

/// The files in a list that is separated by blanks, which the names may hold, too.
fn paths(list: &str) -> Vec<String> {
    let words: Vec<&str> = list.split(' ').collect();
    let mut files = Vec::new();
    let mut from = 0;
    while from < words.len() {
        let file = (from + 1..=words.len())
            .rev()
            .map(|to| (to, words[from..to].join(" ")))
            .find(|(_, path)| Path::new(path).is_file());
        from += 1;
        if let Some((to, path)) = file {
            files.push(path);
            from = to;
        }
    }
    files
}

/// Standard output of a command that ended well.
fn said_by(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let said = output.status.success().then_some(output.stdout)?;
    String::from_utf8(said).ok()
}

/// The keys that `ssh-keygen -l -F` found: below a line `# Host NAME found: line N`, which ends in
/// `REVOKED` or `CA` for what is no key of the server's, a line `NAME KIND HASH`
/// (`known_hosts_find_delete` in OpenSSH's ssh-keygen.c).
fn keys(found: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut of_the_server = false;
    for line in found.lines() {
        if line.starts_with('#') {
            of_the_server = !line.ends_with(" REVOKED") && !line.ends_with(" CA");
        } else if of_the_server
            && let [_, kind, hash, ..] = line.split_whitespace().collect::<Vec<_>>()[..]
        {
            keys.push(format!("{kind} {hash}"));
        }
    }
    keys
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
        let hop = |host: &str, user: &str, port, host_keys: &[String]| KnownServer {
            host: host.to_owned(),
            user: user.to_owned(),
            port,
            proxy: None,
            host_keys: host_keys.to_vec(),
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
        let found = KnownServer::look_up(&target("nas:x.luks"), &ssh);
        assert_eq!(found.as_ref(), Some(&expected));
        // What the target says goes before what the file says.
        expected.user = "u2".to_owned();
        expected.port = 23;
        expected.host_keys.clear();
        let found = KnownServer::look_up(&target("ssh://u2@nas:23/x.luks"), &ssh);
        assert_eq!(found.as_ref(), Some(&expected));
        assert_eq!(KnownServer::look_up(&target("/x.luks"), &ssh), None);
        // Nothing but ssh itself is asked, and one that fails is no reason for having no sheet.
        let other = [path("config").into()];
        assert_eq!(KnownServer::look_up(&target("nas:x.luks"), &other), None);
        let absent = [path("ssh").into()];
        assert_eq!(KnownServer::look_up(&target("nas:x.luks"), &absent), None);
    }
}
