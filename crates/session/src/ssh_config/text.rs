//! What ssh and `ssh-keygen` print, and what stands in ssh's configuration.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::ssh_config::KnownServer;

/// As one word of ssh's configuration (`argv_split` in OpenSSH's misc.c).
pub(super) fn config_word(word: &str) -> String {
    let plain = |c: char| !c.is_whitespace() && !matches!(c, '"' | '\'' | '\\' | '#');
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The lines of `ssh -G`: a name and a value.
pub(super) fn settings(said: &str) -> impl Iterator<Item = (&str, &str)> {
    said.lines()
        .map(|line| line.split_once(' ').unwrap_or((line, "")))
}

/// The words of `ssh … -W %h:%p …` without that option; `None` for any other command.
pub(super) fn jump_of_command(command: &str) -> Option<Vec<String>> {
    if command.contains(['|', '<', '>', ';', '&', '$', '`', '\n']) {
        return None;
    }
    let mut words = shlex::split(command)?;
    if words.first().is_some_and(|word| word == "exec") {
        words.remove(0);
    }
    if Path::new(words.first()?).file_name() != Some(OsStr::new("ssh")) {
        return None;
    }
    let is_pair = |word: &str| word == "%h:%p" || word == "[%h]:%p";
    let at = words.iter().position(|word| {
        word.strip_prefix("-W")
            .is_some_and(|rest| rest.is_empty() || is_pair(rest))
    })?;
    if words[at] == "-W" {
        is_pair(words.get(at + 1)?).then_some(())?;
        words.remove(at + 1);
    }
    words.remove(at);
    // Nothing else may hang on where the connection leads to.
    words
        .iter()
        .all(|word| !word.contains('%'))
        .then_some(words)
}

/// A path of ssh's configuration: `~`, the usual tokens, and a relative one as it is meant here.
pub(super) fn expanded(value: &str, server: &KnownServer) -> PathBuf {
    let home = home();
    let mut path = String::new();
    let mut rest = value;
    if let Some(after) = value.strip_prefix("~/") {
        path.push_str(&home);
        path.push('/');
        rest = after;
    }
    let mut characters = rest.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            path.push(c);
            continue;
        }
        match characters.next() {
            Some('%') => path.push('%'),
            Some('d') => path.push_str(&home),
            Some('h') => path.push_str(&server.host),
            Some('r') => path.push_str(&server.user),
            Some('p') => path.push_str(&server.port.to_string()),
            other => {
                path.push('%');
                path.extend(other);
            }
        }
    }
    // Relative to where ssh is started, which is here.
    std::path::absolute(&path).unwrap_or_else(|_| PathBuf::from(path))
}

/// The home folder of this user as ssh takes it: from the account, whatever HOME says.
pub(super) fn home() -> String {
    let me = rustix::process::geteuid().as_raw().to_string();
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    accounts
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&me.as_str()))
        .and_then(|fields| fields.get(5).map(|home| (*home).to_owned()))
        .unwrap_or_else(|| "/root".to_owned())
}

pub(super) fn is_default_known_hosts(value: &str) -> bool {
    let file = |name: &str| format!("{}/.ssh/{name}", home());
    let (one, two) = (file("known_hosts"), file("known_hosts2"));
    value == "~/.ssh/known_hosts ~/.ssh/known_hosts2"
        || value == one
        || value == format!("{one} {two}")
}

/// The command for a jump host: of all options ssh hands on only the configuration file
/// (`main` in OpenSSH's ssh.c).
pub(super) fn of_jumps(ssh: &[OsString]) -> Vec<OsString> {
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

/// The first file of ssh's list, which new keys are added to. It may not be there yet.
pub(super) fn new_known_hosts(list: &str) -> Option<PathBuf> {
    let first = paths(list).into_iter().next();
    // Of names with blanks only one that exists can be found in the list.
    let file = match first.filter(|file| list.starts_with(file.as_str())) {
        Some(file) => file,
        None => list.split(' ').next()?.to_owned(),
    };
    match file.strip_prefix("~/") {
        Some(rest) => Some(Path::new(&home()).join(rest)),
        None => (file.starts_with('/')).then(|| file.into()),
    }
}

/// The files in a list that is separated by blanks, which the names may hold, too.
pub(super) fn paths(list: &str) -> Vec<String> {
    let words: Vec<&str> = list.split(' ').collect();
    let mut files = Vec::new();
    let mut from = 0;
    while from < words.len() {
        let file = (from + 1..=words.len())
            .rev()
            .map(|to| (to, words[from..to].join(" ")))
            .map(|(to, path)| match path.strip_prefix("~/") {
                Some(rest) => (to, format!("{}/{rest}", home())),
                None => (to, path),
            })
            .find(|(_, path)| Path::new(path).is_file());
        from += 1;
        if let Some((to, path)) = file {
            files.push(path);
            from = to;
        }
    }
    files
}

/// The keys that `ssh-keygen -l -F` found: below a line `# Host NAME found: line N`, which ends in
/// `REVOKED` or `CA` for what is no key of the server's, a line `NAME KIND HASH`
/// (`known_hosts_find_delete` in OpenSSH's ssh-keygen.c).
pub(super) fn keys(found: &str) -> Vec<String> {
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
    use super::*;

    #[test]
    fn proxy_command_that_only_jumps_is_a_jump() {
        let words = |command: &str| jump_of_command(command).map(|words| words.join(" "));
        let found = words("ssh -F '/a b/config' -W %h:%p gate");
        assert_eq!(found.as_deref(), Some("ssh -F /a b/config gate"));
        assert_eq!(
            words("exec ssh gate -W[%h]:%p").as_deref(),
            Some("ssh gate")
        );
        for other in [
            "nc %h %p",
            "ssh gate nc %h %p",
            "ssh -W %h:22 gate",
            "ssh -W %h:%p gate-%p",
            "ssh -W %h:%p gate 2>/dev/null",
        ] {
            assert_eq!(words(other), None, "{other}");
        }
    }
}
