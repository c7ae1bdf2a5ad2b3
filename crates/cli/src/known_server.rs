//! The server as ssh finds it: what an alias of `~/.ssh/config` stands for, and the keys that the server is
//! known by. After a fire neither that file nor `known_hosts` is there, so both stand on the recovery sheet.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::target::{Place, Target};

/// What ssh's own configuration says of a target's server.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct KnownServer {
    /// Name (ssh makes it lower case) or address that is connected to, without brackets.
    pub host: String,
    pub user: String,
    pub port: u16,
    /// `ProxyJump` or `ProxyCommand`, and its value, where the server is reached through one.
    pub proxy: Option<(&'static str, String)>,
    /// Kind and SHA-256 of each key in `known_hosts`, such as `ED25519 SHA256:…`.
    pub host_keys: Vec<String>,
}

impl KnownServer {
    /// Asks `ssh -G` and `ssh-keygen -F`, neither of which connects. `None` for a local target, and
    /// where they can't tell: another program than OpenSSH's stands in for ssh, or fails.
    pub(crate) fn look_up(target: &Target, ssh_command: &[OsString]) -> Option<Self> {
        let Place::Ssh {
            user, host, port, ..
        } = &target.place
        else {
            return None;
        };
        let (program, options) = ssh_command.split_first()?;
        // What only stands in for ssh may do anything with an option that it doesn't know.
        if Path::new(program).file_name() != Some(OsStr::new("ssh")) {
            return None;
        }
        let mut command = Command::new(program);
        command.args(options).arg("-G");
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
                    server.proxy = Some(("ProxyJump", value.to_owned()));
                }
                "proxycommand" if value != "none" => {
                    server.proxy = Some(("ProxyCommand", value.to_owned()));
                }
                "hostkeyalias" => known_as = Some(value.to_owned()),
                "userknownhostsfile" | "globalknownhostsfile" => {
                    files.extend(value.split_whitespace().map(str::to_owned));
                }
                _ => {}
            }
        }
        if server.host.is_empty() || server.user.is_empty() || server.port == 0 {
            return None;
        }
        let known_as =
            known_as.unwrap_or_else(|| match (server.host.to_lowercase(), server.port) {
                (host, 22) => host,
                (host, port) => format!("[{host}]:{port}"),
            });
        for file in files.iter().filter(|file| Path::new(file).is_file()) {
            let mut command = Command::new("ssh-keygen");
            let found = said_by(command.args(["-l", "-F", &known_as, "-f", file]));
            for key in found.iter().flat_map(|found| keys(found)) {
                if !server.host_keys.contains(&key) {
                    server.host_keys.push(key);
                }
            }
        }
        Some(server)
    }
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
        let ((good, good_hash), (bad, _)) = (key("good"), key("bad"));
        let known =
            format!("[nas.example]:2222 {good}\n@revoked [nas.example]:2222 {bad}\nother {bad}\n");
        fs::write(path("known"), &known).unwrap();
        fs::write(path("known too"), &known).unwrap();
        let config = format!(
            "Host nas\n HostName NAS.example\n User u1\n Port 2222\n ProxyJump gate\n\
             UserKnownHostsFile {0}\n GlobalKnownHostsFile {0} /nowhere\n",
            path("known")
        );
        fs::write(path("config"), config).unwrap();
        let ssh = ["ssh", "-F", &path("config")].map(OsString::from);
        let target = |text: &str| Target::parse(text, Path::new("/")).unwrap();
        let mut expected = KnownServer {
            host: "nas.example".to_owned(),
            user: "u1".to_owned(),
            port: 2222,
            proxy: Some(("ProxyJump", "gate".to_owned())),
            host_keys: vec![good_hash],
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
