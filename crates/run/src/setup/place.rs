//! Where the backups go: the answer to the first question as a container's location.

use std::path::Path;

use sprat_session::Failure;
use sprat_session::address::{Location, SshLocation, Target, is_name};

use crate::config::Config;

/// Where the container file is, or is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The container's name in the config.
    pub(super) name: String,
    /// The container file.
    pub(super) target: Target,
    /// The config has it already.
    pub(super) configured: bool,
}

/// Finds the place that a person means: a container of the config by its name or its folder, else a new one.
/// `name` is the one of the command line; `host` is this machine's, the default.
pub(super) fn find(
    text: &str,
    name: Option<&str>,
    host: &str,
    config: &Config,
    current_dir: &Path,
) -> Result<Place, Failure> {
    let known = |named: &str| config.containers.iter().find(|one| one.name == named);
    let configured = |one: &crate::config::Container| Place {
        name: one.name.clone(),
        target: one.target.clone(),
        configured: true,
    };
    if Target::is_config_name(text)
        && let Some(one) = known(text)
    {
        return Ok(configured(one));
    }
    let wanted = wanted_name(name, host);
    if !is_name(&wanted) || wanted.ends_with(".luks") {
        return Err(Failure::usage(format!("{wanted:?} can't name a container"))
            .because("letters, digits, `.`, `_` and `-`, not ending in .luks".to_owned())
            .with_hint("nothing was changed. Give another one with --name"));
    }
    let target = target_of(text, &wanted, current_dir)?;
    // Without --name the folder alone says which one of the config is meant.
    let is_meant = |one: &&crate::config::Container| match name {
        Some(name) => one.name == name && one.target == target,
        None => one.target.location == target.location,
    };
    let mut meant = config.containers.iter().filter(is_meant);
    let by_default = meant.clone().find(|one| one.target == target);
    if let Some(one) = by_default.or_else(|| meant.next()) {
        return Ok(configured(one));
    }
    if let Some(other) = known(&wanted) {
        return Err(Failure::usage(format!(
            "the config has a container {wanted} with another target: {}",
            other.target
        ))
        .with_hint("nothing was changed. Name the new one with --name NAME"));
    }
    Ok(Place {
        name: wanted,
        target,
        configured: false,
    })
}

/// The container's name where nothing but `--name` or the host says it.
pub(super) fn wanted_name(name: Option<&str>, host: &str) -> String {
    name.map_or_else(|| name_of(host), str::to_owned)
}

/// A name of the config that is like the host's: `laptop` for `laptop.example.org`.
fn name_of(host: &str) -> String {
    let short = host.split('.').next().unwrap_or_default();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    let name: String = short.chars().filter(|c| is_plain(*c)).take(64).collect();
    let name = name.trim_start_matches('-').to_owned();
    match name.is_empty() {
        true => "backup".to_owned(),
        false => name,
    }
}

/// The container file `NAME.luks` in the folder that `text` names, or the file that it names.
fn target_of(text: &str, name: &str, current_dir: &Path) -> Result<Target, Failure> {
    let text = text.trim();
    let parse = |text: &str| {
        Target::parse(text, current_dir)
            .map_err(|error| refused(&error.to_string()))
            .and_then(|target| folder_is_there(target, text))
    };
    if text.ends_with(".luks") {
        return parse(text);
    }
    let file = format!("{name}.luks");
    let below = |folder: &str| match folder.trim_end_matches('/') {
        "" if folder.is_empty() => file.clone(),
        folder => format!("{folder}/{file}"),
    };
    if let Some(rest) = text.strip_prefix("ssh://") {
        let Some((authority, folder)) = rest.split_once('/') else {
            return Err(refused(&format!("{text:?} names no folder")));
        };
        return parse(&format!("ssh://{authority}/{}", below(folder)));
    }
    let first = text.split('/').next().unwrap_or_default();
    let after_brackets = first.rfind(']').map_or(0, |at| at + 1);
    if let Some(colon) = first[after_brackets..].find(':') {
        let (authority, folder) = text.split_at(after_brackets + colon);
        let folder = match &folder[1..] {
            "." | "~" | "~/" => "",
            other => other,
        };
        return parse(&format!("{authority}:{}", below(folder)));
    }
    if first.contains('@') && first == text {
        return parse(&format!("{text}:{file}"));
    }
    parse(&below(match text {
        "" => return Err(refused("nothing was given")),
        folder => folder,
    }))
}

/// A local folder must be there: where a disk is not mounted, the backup would fill this machine's own.
fn folder_is_there(target: Target, text: &str) -> Result<Target, Failure> {
    match &target.location {
        Location::Local(folder) if !folder.is_dir() => Err(Failure::usage(format!(
            "there is no folder {}",
            folder.display()
        ))
        .with_hint(match text.matches('/').count() {
            0 | 1 => FORMS,
            _ => "nothing was changed. Mount its disk, or make the folder",
        })),
        Location::Local(_) | Location::Ssh(_) => Ok(target),
    }
}

const FORMS: &str = "nothing was changed. Give user@host, user@host:folder, ssh://user@host:port/folder, \
                     or a folder of this machine";

fn refused(why: &str) -> Failure {
    Failure::usage("that is no place for backups")
        .because(why.to_owned())
        .with_hint(FORMS)
}

/// The account and server for a person.
pub(super) fn login(server: &SshLocation) -> String {
    match &server.user {
        Some(user) => format!("{user}@{}", server.host),
        None => server.host.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConfigPlaces, load};

    fn config(text: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sprat.toml");
        std::fs::write(&file, text).unwrap();
        let loaded = load(&[file], &ConfigPlaces::default());
        loaded.without_mistakes().unwrap()
    }

    #[test]
    fn each_form_of_the_answer_names_the_file_in_its_folder() {
        let none = config("");
        for (typed, target) in [
            ("bob@nas", "bob@nas:./laptop.luks"),
            ("bob@nas:", "bob@nas:./laptop.luks"),
            ("bob@nas:~", "bob@nas:./laptop.luks"),
            ("bob@nas:backup/", "bob@nas:backup/laptop.luks"),
            ("nas:", "nas:./laptop.luks"),
            ("bob@nas:/", "ssh://bob@nas/laptop.luks"),
            ("bob@nas:/srv", "ssh://bob@nas/srv/laptop.luks"),
            ("bob@[fe80::1]", "bob@[fe80::1]:./laptop.luks"),
            ("bob@[fe80::1]:srv", "bob@[fe80::1]:srv/laptop.luks"),
            ("ssh://bob@nas:23/home", "ssh://bob@nas:23/home/laptop.luks"),
            ("ssh://bob@nas:23/", "ssh://bob@nas:23/laptop.luks"),
            ("bob@nas:a/x.luks", "bob@nas:a/x.luks"),
            ("/", "/laptop.luks"),
            ("/tmp/", "/tmp/laptop.luks"),
            ("tmp", "/tmp/laptop.luks"),
        ] {
            let found = find(typed, None, "laptop.example.org", &none, Path::new("/"));
            let found = found.unwrap_or_else(|failure| panic!("{typed}: {failure:?}"));
            assert_eq!(found.target.to_string(), target, "{typed}");
            assert_eq!((found.name.as_str(), found.configured), ("laptop", false));
        }
        for wrong in [
            "",
            "nas",
            "bob@nas/backup",
            "ssh://bob@nas",
            "/not/there",
            "http://x/y",
        ] {
            let failure = find(wrong, None, "laptop", &none, Path::new("/")).unwrap_err();
            assert_eq!(
                failure.exit,
                sprat_session::Exit::Usage,
                "{wrong}: {failure:?}"
            );
            assert!(
                failure.hint.unwrap().contains("nothing was changed"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn container_of_the_config_is_found_by_name_and_by_folder() {
        let config = config(
            "[container.nas]\ntarget = \"bob@nas:backup/old.luks\"\n\
             [container.laptop]\ntarget = \"bob@other:laptop.luks\"\n",
        );
        let found =
            |typed: &str, name: Option<&str>| find(typed, name, "laptop", &config, Path::new("/"));
        for typed in ["nas", "bob@nas:backup", "bob@nas:backup/old.luks"] {
            let place = found(typed, None).unwrap();
            assert_eq!(
                (place.name.as_str(), place.configured),
                ("nas", true),
                "{typed}"
            );
            assert_eq!(place.target.to_string(), "bob@nas:backup/old.luks");
        }
        let place = found("bob@nas:backup", Some("second")).unwrap();
        assert_eq!(place.target.to_string(), "bob@nas:backup/second.luks");
        assert!(!place.configured);
        // The default name is taken by another target.
        let failure = found("bob@third", None).unwrap_err();
        assert!(
            failure.what.contains("bob@other:./laptop.luks"),
            "{failure:?}"
        );
        assert!(found("bob@third", Some("x.luks")).is_err());
    }
}
