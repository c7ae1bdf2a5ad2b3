//! The programs that backups need, and the command that installs those that are missing.

use std::ffi::OsStr;

use sprat_session::Failure;
use sprat_session::diagnosis::{self, State};

use crate::program::start;

/// A program, and whether only a server needs it.
const PROGRAMS: [(&str, bool); 5] = [
    ("rsync", false),
    ("mkfs.ext4", false),
    ("ssh", true),
    ("ssh-keygen", true),
    ("ssh-keyscan", true),
];

/// How a system installs packages, and how it calls OpenSSH's client.
const INSTALLERS: [(&str, &str, &str); 6] = [
    ("apt-get", "apt-get install", "openssh-client"),
    ("dnf", "dnf install", "openssh-clients"),
    ("yum", "yum install", "openssh-clients"),
    ("zypper", "zypper install", "openssh-clients"),
    ("pacman", "pacman -S", "openssh"),
    ("apk", "apk add", "openssh-client"),
];

/// Fails if something is missing that a backup needs. Installs nothing.
pub(super) fn check(with_server: bool) -> Result<(), Failure> {
    missing(with_server, |program| {
        start::find(OsStr::new(program)).is_some()
    })?;
    let own = |what: &str| PROGRAMS.iter().any(|(program, _)| *program == what);
    let lacks = |found: &diagnosis::Finding| found.state == State::Missing && !own(&found.what);
    let found: Vec<_> = diagnosis::host().into_iter().filter(lacks).collect();
    let Some(first) = found.first() else {
        return Ok(());
    };
    let hint = first.hint.clone().unwrap_or_default();
    let failure = Failure::failed("this machine can't open a container yet").with_hint(format!(
        "nothing was changed. {hint}. `sprat doctor` shows all"
    ));
    let causes = found
        .iter()
        .map(|found| format!("{}: {}", found.what, found.detail));
    Err(causes.fold(failure, Failure::because))
}

fn missing(with_server: bool, is_there: impl Fn(&str) -> bool) -> Result<(), Failure> {
    let needed = PROGRAMS.iter().filter(|(_, server)| with_server || !server);
    let missing: Vec<&str> = needed
        .map(|(name, _)| *name)
        .filter(|name| !is_there(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let installer = INSTALLERS.iter().find(|(program, ..)| is_there(program));
    let mut packages: Vec<&str> = Vec::new();
    for program in &missing {
        let package = match *program {
            "rsync" => "rsync",
            "mkfs.ext4" => "e2fsprogs",
            _ => installer.map_or("the client of OpenSSH", |(.., ssh)| ssh),
        };
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    let how = match installer {
        Some((_, install, _)) => format!("{install} {}", packages.join(" ")),
        None => format!("install {}", packages.join(", ")),
    };
    Err(
        Failure::failed(format!("missing programs: {}", missing.join(", "))).with_hint(format!(
            "nothing was changed. Run `{how}`, then the same command again"
        )),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_programs_are_named_with_one_command() {
        let with = |there: &'static [&'static str]| move |name: &str| there.contains(&name);
        let all = &["rsync", "mkfs.ext4", "ssh", "ssh-keygen", "ssh-keyscan"];
        assert!(missing(true, with(all)).is_ok());
        assert!(missing(false, with(&["rsync", "mkfs.ext4"])).is_ok());
        let failure = missing(true, with(&["apt-get", "mkfs.ext4"])).unwrap_err();
        assert_eq!(
            failure.what,
            "missing programs: rsync, ssh, ssh-keygen, ssh-keyscan"
        );
        let hint = failure.hint.unwrap();
        assert!(
            hint.contains("`apt-get install rsync openssh-client`"),
            "{hint}"
        );
        let hint = missing(true, with(&["dnf"])).unwrap_err().hint.unwrap();
        assert!(
            hint.contains("`dnf install rsync e2fsprogs openssh-clients`"),
            "{hint}"
        );
    }
}
