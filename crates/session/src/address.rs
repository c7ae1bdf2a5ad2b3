//! Where a container lies: parses the TARGET of the command line and the config.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sprat_store::FileName;

use crate::files::short_hash;

/// A folder that holds containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Location {
    /// A folder on an SSH server.
    Ssh(SshLocation),
    /// A folder on this machine, absolute.
    Local(PathBuf),
}

/// A folder on an SSH server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshLocation {
    /// The login, if the target names one; else `~/.ssh/config` decides.
    pub user: Option<String>,
    /// A host name, an address without brackets, or an alias of `~/.ssh/config`. Never begins
    /// with `-`.
    pub host: String,
    /// The port, if the target names one.
    pub port: Option<u16>,
    /// Absolute, or relative to the login's home folder (`.` for the home folder itself).
    pub folder: String,
}

impl SshLocation {
    /// The path of a file in the folder.
    #[must_use]
    pub fn path_of(&self, name: &FileName) -> String {
        format!("{}/{name}", self.folder)
    }
}

/// One container: the folder and the file's name in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The folder.
    pub location: Location,
    /// The container's file name.
    #[serde(with = "file_name_text")]
    pub name: FileName,
}

/// A TARGET that names no container.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The text is empty.
    #[error("the target is empty")]
    Empty,
    /// A control character or other byte that no target needs.
    #[error("the target has a control character in it")]
    ControlCharacter,
    /// No host.
    #[error("{0:?} has no host name")]
    NoHost(String),
    /// A host that ssh could take for an option or the shell for more than a name.
    #[error("{0:?} is not a host name")]
    BadHost(String),
    /// A user that ssh would refuse or misread.
    #[error("{0:?} is not a user name")]
    BadUser(String),
    /// Not a port.
    #[error("{0:?} is not a port (1 to 65535)")]
    BadPort(String),
    /// `..` or `~user` in a remote path.
    #[error("{0:?} in a remote path is not accepted")]
    BadFolder(String),
    /// The path ends in a folder.
    #[error("{0:?} must end in the container's file name, such as /srv/backup/home.luks")]
    NoFileName(String),
    /// The path's last part is not a usable file name.
    #[error(transparent)]
    BadFileName(#[from] sprat_store::FileNameError),
    /// A login without a path, or with a slash where the colon belongs.
    #[error("{0:?} seems to be a login on a server, without the path of a container there")]
    LoginOnly(String),
    /// A URL of another kind.
    #[error("{0:?}: the only supported URL scheme is ssh://")]
    UnknownScheme(String),
}

impl Target {
    /// The container's name without its ending.
    #[must_use]
    pub fn shown_name(&self) -> String {
        let name = self.name.as_str();
        name.strip_suffix(".luks").unwrap_or(name).to_owned()
    }

    /// Parses `ssh://[user@]host[:port]/abs/path/x.luks`, `[user@]host:path/x.luks` or a local
    /// path (made absolute against `current_folder`). As with scp, a colon before the first slash
    /// makes it a remote one; a local `a:b.luks` is written `./a:b.luks`. Nothing in it is decoded.
    pub fn parse(text: &str, current_folder: &Path) -> Result<Self, TargetError> {
        if text.is_empty() {
            return Err(TargetError::Empty);
        }
        if text.chars().any(char::is_control) {
            return Err(TargetError::ControlCharacter);
        }
        if let Some(rest) = text.strip_prefix("ssh://") {
            return parse_url(rest);
        }
        if let Some((scheme, _)) = text.split_once("://")
            && scheme
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
        {
            return Err(TargetError::UnknownScheme(text.to_owned()));
        }
        match remote_parts(text) {
            Some((authority, path)) => parse_remote(authority, path),
            // It would be a local file of that name, which nobody means.
            None if text
                .split('/')
                .next()
                .is_some_and(|first| first.contains('@')) =>
            {
                Err(TargetError::LoginOnly(text.to_owned()))
            }
            None => parse_local(text, current_folder),
        }
    }

    /// True if `text` can only be a name in the config: no slash, no colon, no `.luks` at the end.
    #[must_use]
    pub fn is_config_name(text: &str) -> bool {
        is_name(text) && !text.ends_with(".luks")
    }

    /// One text for one target, from which the name of its local state is derived.
    #[must_use]
    pub fn identity(&self) -> String {
        self.to_string()
    }

    /// The same as part of a file's name: 16 digits of a hash.
    #[must_use]
    pub fn id(&self) -> String {
        short_hash(self.identity().as_bytes())
    }

    /// The server, for a container on one.
    #[must_use]
    pub fn ssh(&self) -> Option<&SshLocation> {
        match &self.location {
            Location::Ssh(server) => Some(server),
            Location::Local(_) => None,
        }
    }

    /// The folder, for a container on this machine.
    #[must_use]
    pub fn local_folder(&self) -> Option<&Path> {
        match &self.location {
            Location::Local(folder) => Some(folder),
            Location::Ssh(_) => None,
        }
    }

    /// The container's path, if it is on this machine.
    #[must_use]
    pub fn local_path(&self) -> Option<PathBuf> {
        Some(self.local_folder()?.join(self.name.as_str()))
    }
}

/// True for the names of containers and jobs in the config: letters, digits, `.`, `_`, `-`, not
/// beginning with `.` or `-`, at most 64 bytes.
#[must_use]
pub fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

fn login(user: Option<&str>, host: &str) -> String {
    match user {
        Some(user) => format!("{user}@{host}"),
        None => host.to_owned(),
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(folder) => write!(f, "{}", folder.display()),
            Self::Ssh(SshLocation {
                user,
                host,
                port,
                folder,
            }) => {
                let host = if host.contains(':') {
                    format!("[{host}]")
                } else {
                    host.clone()
                };
                let login = login(user.as_deref(), &host);
                match (port, folder.starts_with('/')) {
                    (Some(port), true) => write!(f, "ssh://{login}:{port}{folder}"),
                    (None, true) => write!(f, "ssh://{login}{folder}"),
                    // Only the form without a port can be relative.
                    (_, false) => write!(f, "{login}:{folder}"),
                }
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let folder = self.location.to_string();
        let slash = if folder.ends_with('/') { "" } else { "/" };
        write!(f, "{folder}{slash}{}", self.name)
    }
}

fn parse_url(rest: &str) -> Result<Target, TargetError> {
    let Some(slash) = rest.find('/') else {
        return Err(TargetError::NoFileName(format!("ssh://{rest}")));
    };
    let (authority, path) = rest.split_at(slash);
    let (user, host_and_port) = split_user(authority)?;
    let (host, port) = match host_and_port.strip_prefix('[') {
        Some(bracketed) => {
            let Some((host, after)) = bracketed.split_once(']') else {
                return Err(TargetError::BadHost(host_and_port.to_owned()));
            };
            match after.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if after.is_empty() => (host, None),
                None => return Err(TargetError::BadHost(host_and_port.to_owned())),
            }
        }
        None => match host_and_port.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (host_and_port, None),
        },
    };
    let bracketed = host_and_port.starts_with('[');
    let host = check_host(host, bracketed)?;
    let port = port.map(parse_port).transpose()?;
    let (folder, name) = split_remote_path(path)?;
    Ok(Target {
        location: Location::Ssh(SshLocation {
            user,
            host,
            port,
            folder,
        }),
        name,
    })
}

/// Splits `[user@]host:path` before the path, or says that there is no such colon.
fn remote_parts(text: &str) -> Option<(&str, &str)> {
    let slash = text.find('/').unwrap_or(text.len());
    let colon = match text[..slash].find('[') {
        Some(open) => open + text[open..slash].find("]:")? + 1,
        None => text[..slash].find(':')?,
    };
    Some((&text[..colon], &text[colon + 1..]))
}

fn parse_remote(authority: &str, path: &str) -> Result<Target, TargetError> {
    let (user, host) = split_user(authority)?;
    let inner = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = check_host(inner.unwrap_or(host), inner.is_some())?;
    let path = path.strip_prefix("~/").unwrap_or(path);
    let (folder, name) = split_remote_path(path)?;
    Ok(Target {
        location: Location::Ssh(SshLocation {
            user,
            host,
            port: None,
            folder,
        }),
        name,
    })
}

fn parse_local(text: &str, current_folder: &Path) -> Result<Target, TargetError> {
    let path = current_folder.join(text);
    let ends_in_folder = text == "." || text.ends_with('/') || text.ends_with("/.");
    let (Some(name), Some(folder), false) = (path.file_name(), path.parent(), ends_in_folder)
    else {
        return Err(TargetError::NoFileName(text.to_owned()));
    };
    // `text` was UTF-8, so its last component is.
    let name = FileName::new(&name.to_string_lossy())?;
    let folder = folder
        .components()
        .filter(|part| *part != Component::CurDir)
        .collect();
    Ok(Target {
        location: Location::Local(folder),
        name,
    })
}

fn split_user(authority: &str) -> Result<(Option<String>, &str), TargetError> {
    let Some((user, host)) = authority.rsplit_once('@') else {
        return Ok((None, authority));
    };
    // What ssh itself refuses (valid_ruser in OpenSSH's ssh.c), and blanks.
    let plain = !user.is_empty()
        && !user.starts_with('-')
        && !user.ends_with('\\')
        && !user.contains(|c: char| c.is_whitespace() || "'`\";&<>|(){}$:".contains(c));
    if !plain {
        return Err(TargetError::BadUser(user.to_owned()));
    }
    Ok((Some(user.to_owned()), host))
}

fn check_host(host: &str, bracketed: bool) -> Result<String, TargetError> {
    if host.is_empty() {
        return Err(TargetError::NoHost(host.to_owned()));
    }
    let plain = !host.starts_with('-')
        && host.len() <= 255
        && host.chars().all(|c| {
            c.is_ascii_alphanumeric() || "._-".contains(c) || (bracketed && ":%".contains(c))
        });
    if plain {
        Ok(host.to_owned())
    } else {
        Err(TargetError::BadHost(host.to_owned()))
    }
}

fn parse_port(text: &str) -> Result<u16, TargetError> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(TargetError::BadPort(text.to_owned())),
    }
}

/// Splits a remote path into a folder without doubled slashes and the file name.
fn split_remote_path(path: &str) -> Result<(String, FileName), TargetError> {
    let (folder, name) = path.rsplit_once('/').unwrap_or((".", path));
    if name.is_empty() || name == "." {
        return Err(TargetError::NoFileName(path.to_owned()));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(TargetError::BadFolder("..".to_owned()));
    }
    if path.starts_with('~') {
        return Err(TargetError::BadFolder("~".to_owned()));
    }
    let name = FileName::new(name)?;
    let parts: Vec<&str> = folder
        .split('/')
        .filter(|part| !matches!(*part, "" | "."))
        .collect();
    let folder = match (path.starts_with('/'), parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => parts.join("/"),
    };
    Ok((folder, name))
}

mod file_name_text {
    //! A file name as text, checked again when it is read.

    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use sprat_store::FileName;

    pub(super) fn serialize<S: Serializer>(name: &FileName, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(name.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<FileName, D::Error> {
        FileName::new(&String::deserialize(input)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        Target::parse(text, Path::new("/cwd"))
            .map(|target| format!("{:?} {}", target.location, target.name))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_accepted_form_is_understood() {
        let cases = [
            "ssh://u@host:2222/srv/b/x.luks",
            "ssh://host/x.luks",
            "ssh://[::1]:22/srv/x.luks",
            "ssh://a@b@host//srv/./x.luks",
            "u@host:b/x.luks",
            "host:x.luks",
            "host:~/x.luks",
            "host:/srv/x.luks",
            "[fe80::1%eth0]:x.luks",
            "x.luks",
            "./a:b.luks",
            "/mnt/usb/../x.luks",
        ];
        let seen: Vec<String> = cases
            .iter()
            .map(|case| parse(case).unwrap_or_else(|e| panic!("{case}: {e}")))
            .collect();
        insta::assert_snapshot!(seen.join("\n"), @r#"
        Ssh(SshLocation { user: Some("u"), host: "host", port: Some(2222), folder: "/srv/b" }) x.luks
        Ssh(SshLocation { user: None, host: "host", port: None, folder: "/" }) x.luks
        Ssh(SshLocation { user: None, host: "::1", port: Some(22), folder: "/srv" }) x.luks
        Ssh(SshLocation { user: Some("a@b"), host: "host", port: None, folder: "/srv" }) x.luks
        Ssh(SshLocation { user: Some("u"), host: "host", port: None, folder: "b" }) x.luks
        Ssh(SshLocation { user: None, host: "host", port: None, folder: "." }) x.luks
        Ssh(SshLocation { user: None, host: "host", port: None, folder: "." }) x.luks
        Ssh(SshLocation { user: None, host: "host", port: None, folder: "/srv" }) x.luks
        Ssh(SshLocation { user: None, host: "fe80::1%eth0", port: None, folder: "." }) x.luks
        Local("/cwd") x.luks
        Local("/cwd") a:b.luks
        Local("/mnt/usb/..") x.luks
        "#);
    }

    #[test]
    fn a_login_without_a_path_is_no_local_file() {
        for login in ["user@host", "user@host/srv/x.luks"] {
            let refused = parse(login).expect_err(login);
            assert!(refused.contains("seems to be a login"), "{refused}");
        }
        assert!(parse("./user@host").is_ok());
    }

    #[test]
    fn hostile_and_incomplete_forms_are_refused() {
        let cases = [
            "",
            "-oProxyCommand=x:a.luks",
            "ssh://-oProxyCommand=x/a.luks",
            "ssh://u@-oProxyCommand=x/a.luks",
            "-l@host:a.luks",
            "ssh:///a.luks",
            ":a.luks",
            "u@:a.luks",
            "ssh://host:0/a.luks",
            "ssh://host:+2/a.luks",
            "ssh://host:99999/a.luks",
            "ssh://::1/a.luks",
            "ssh://host",
            "ssh://host/",
            "host:",
            "host:dir/",
            "host:dir/..",
            "host:../a.luks",
            "ssh://host/srv/../a.luks",
            "host:~root/a.luks",
            "ho st:a.luks",
            "$(x):a.luks",
            "u;x@host:a.luks",
            "/srv/",
            "/",
            ".",
            "..",
            "a\nb.luks",
            "sftp://host/a.luks",
        ];
        let seen: Vec<String> = cases
            .iter()
            .map(|case| format!("{case:?} -> {}", parse(case).expect_err(case)))
            .collect();
        insta::assert_snapshot!(seen.join("\n"), @r#"
        "" -> the target is empty
        "-oProxyCommand=x:a.luks" -> "-oProxyCommand=x" is not a host name
        "ssh://-oProxyCommand=x/a.luks" -> "-oProxyCommand=x" is not a host name
        "ssh://u@-oProxyCommand=x/a.luks" -> "-oProxyCommand=x" is not a host name
        "-l@host:a.luks" -> "-l" is not a user name
        "ssh:///a.luks" -> "" has no host name
        ":a.luks" -> "" has no host name
        "u@:a.luks" -> "" has no host name
        "ssh://host:0/a.luks" -> "0" is not a port (1 to 65535)
        "ssh://host:+2/a.luks" -> "+2" is not a port (1 to 65535)
        "ssh://host:99999/a.luks" -> "99999" is not a port (1 to 65535)
        "ssh://::1/a.luks" -> ":" is not a host name
        "ssh://host" -> "ssh://host" must end in the container's file name, such as /srv/backup/home.luks
        "ssh://host/" -> "/" must end in the container's file name, such as /srv/backup/home.luks
        "host:" -> "" must end in the container's file name, such as /srv/backup/home.luks
        "host:dir/" -> "dir/" must end in the container's file name, such as /srv/backup/home.luks
        "host:dir/.." -> ".." in a remote path is not accepted
        "host:../a.luks" -> ".." in a remote path is not accepted
        "ssh://host/srv/../a.luks" -> ".." in a remote path is not accepted
        "host:~root/a.luks" -> "~" in a remote path is not accepted
        "ho st:a.luks" -> "ho st" is not a host name
        "$(x):a.luks" -> "$(x)" is not a host name
        "u;x@host:a.luks" -> "u;x" is not a user name
        "/srv/" -> "/srv/" must end in the container's file name, such as /srv/backup/home.luks
        "/" -> "/" must end in the container's file name, such as /srv/backup/home.luks
        "." -> "." must end in the container's file name, such as /srv/backup/home.luks
        ".." -> ".." must end in the container's file name, such as /srv/backup/home.luks
        "a\nb.luks" -> the target has a control character in it
        "sftp://host/a.luks" -> "sftp://host/a.luks": the only supported URL scheme is ssh://
        "#);
    }

    #[test]
    fn printing_and_parsing_give_the_same_target() {
        for text in [
            "ssh://u@[::1]:22/s/x.luks",
            "host:a/x.luks",
            "host:x.luks",
            "/s/x.luks",
        ] {
            let target = Target::parse(text, Path::new("/cwd")).unwrap();
            let again = Target::parse(&target.to_string(), Path::new("/cwd")).unwrap();
            assert_eq!(target, again, "{text}");
        }
    }

    #[test]
    fn names_of_the_config_are_told_from_paths() {
        assert!(Target::is_config_name("home"));
        for text in ["home.luks", "a/b", "host:x", "-x", ".x", ""] {
            assert!(!Target::is_config_name(text), "{text}");
        }
    }
}
