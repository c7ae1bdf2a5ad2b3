//! Sources on other hosts, which rsync pulls over ssh.
//!
//! What is pulled from `HOST` is below `@HOST` in the snapshot. Nothing is ever written to the host.
//!
//! Always true: each host is pulled by runs of its own, into a folder that only these runs write to. So no
//! name that a host sends leads out of its folder.

mod patterns;
mod reach;
mod scan;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::SnapshotError;
use crate::file_listener::FileListener;
use crate::found::Found;
use crate::name_list::NameList;
use crate::pulled_source::{PulledSource, host_folder, within};
use crate::record::ONE_FILE_SYSTEM;
use crate::rsync::{Invocation, Rsync, Side};
use crate::spec::SnapshotSpec;
use crate::text::{escape_path, unescape_path};

pub(crate) use patterns::KERNEL;
pub use reach::missing_on_hosts;
pub(crate) use reach::{Reached, reach, why_failed};

/// The sources of one host.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) sources: Vec<PulledSource>,
    /// What the rules of [`SnapshotSpec::scan`] exclude. Paths of the host.
    pub(crate) found: Found,
}

/// The hosts of a job, each with its sources.
pub(crate) fn hosts(spec: &SnapshotSpec) -> Vec<Host> {
    let mut hosts: BTreeMap<&str, Vec<PulledSource>> = BTreeMap::new();
    for source in &spec.pulled {
        let sources = hosts.entry(&source.host).or_default();
        if !sources.contains(source) {
            sources.push(source.clone());
        }
    }
    let hosts = hosts.into_iter().map(|(name, sources)| Host {
        name: name.to_owned(),
        sources,
        found: Found::default(),
    });
    hosts.collect()
}

impl Host {
    /// Its folder in a snapshot.
    pub(crate) fn folder(&self) -> PathBuf {
        host_folder(&self.name)
    }

    /// The error of a source here whose place is the host's.
    pub(crate) fn refuse_place(&self) -> SnapshotError {
        SnapshotError::SourceRefused {
            path: escape_path(&Path::new("/").join(self.folder())),
            why: "is where the snapshot has what is pulled from another host. Exclude or rename it"
                .to_owned(),
        }
    }

    /// A path of the host as the snapshot has it, absolute.
    pub(crate) fn in_snapshot(&self, path: &Path) -> PathBuf {
        within(Path::new("/").join(self.folder()), path)
    }

    /// Escaped paths of the host, or relative to its root, as the snapshot has them. `relative`: without
    /// the slash at the beginning.
    pub(crate) fn names_in_snapshot(&self, names: &NameList, relative: bool) -> NameList {
        names.map(|name| {
            let path = self.in_snapshot(&unescape_path(name));
            match relative {
                true => escape_path(path.strip_prefix("/").unwrap_or(&path)),
                false => escape_path(&path),
            }
        })
    }

    /// A listener for names relative to the root of the host.
    pub(crate) fn listener(&self, listener: &FileListener) -> FileListener {
        let host = self.clone();
        listener.named(move |name| {
            let path = host.in_snapshot(&unescape_path(name));
            escape_path(path.strip_prefix("/").unwrap_or(&path))
        })
    }

    /// An invocation that runs in `folder` and writes to its `to`. `sources`: the host's paths;
    /// `None`: names come from the input.
    pub(crate) fn invocation(
        &self,
        rsync: &Rsync,
        spec: &SnapshotSpec,
        options: Vec<OsString>,
        (folder, to): (&Path, &str),
    ) -> Invocation {
        let mut arguments = options;
        arguments.extend(remote_shell(spec));
        if spec.one_file_system {
            arguments.push(ONE_FILE_SYSTEM.into());
        }
        arguments.push("--".into());
        arguments.extend(self.paths(rsync));
        arguments.push(to.into());
        let mut invocation = Invocation::new(arguments, folder, folder, Side::IntoVolume);
        invocation.remote = true;
        invocation
    }

    /// An invocation for the names in its input, relative to the host's root.
    pub(crate) fn invocation_of<'p>(
        &self,
        spec: &SnapshotSpec,
        options: Vec<OsString>,
        names: impl Iterator<Item = &'p Path>,
        (folder, to): (&Path, &str),
    ) -> Invocation {
        let mut arguments = options;
        arguments.extend(["--relative", "--from0", "--files-from=-"].map(OsString::from));
        arguments.extend(remote_shell(spec));
        arguments.push("--".into());
        arguments.push(format!("{}:/", self.login()).into());
        arguments.push(to.into());
        let mut invocation = Invocation::new(arguments, folder, folder, Side::IntoVolume);
        invocation.remote = true;
        invocation.names_from(names);
        invocation
    }

    fn login(&self) -> String {
        let user = self.sources.iter().find_map(|source| source.user.as_ref());
        match user {
            Some(user) => format!("{user}@{}", self.name),
            None => self.name.clone(),
        }
    }

    /// rsync's arguments for the sources.
    fn paths(&self, rsync: &Rsync) -> impl Iterator<Item = OsString> {
        let escapes = rsync.escapes_arguments();
        let login = self.login();
        let sources = self.sources.iter().enumerate();
        sources.map(move |(number, source)| {
            // All further ones are of the first one's host.
            let mut argument = match number {
                0 => OsString::from(format!("{login}:")),
                _ => OsString::from(":"),
            };
            argument.push(remote_path(&source.path, escapes));
            argument
        })
    }
}

/// A path that the login shell of a host reads as it is. `rsync_escapes`: rsync escapes everything for that
/// shell but wildcards (options.c, `safe_arg`).
fn remote_path(path: &Path, rsync_escapes: bool) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    let mut escaped = Vec::new();
    for byte in bytes {
        let special = match rsync_escapes {
            true => b"*?[]".contains(byte),
            false => !byte.is_ascii_alphanumeric() && !b"/._-+,=@%:".contains(byte) && *byte < 128,
        };
        if special {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    OsString::from_vec(escaped)
}

/// The options that say how the host is reached.
fn remote_shell(spec: &SnapshotSpec) -> [OsString; 2] {
    let words: Vec<String> = spec.ssh_command.iter().map(|word| rsh_word(word)).collect();
    [
        format!("--rsh={}", words.join(" ")).into(),
        format!("--rsync-path={}", spec.rsync_path).into(),
    ]
}

/// A word as rsync splits the value of `--rsh` (main.c, `do_cmd`): a quote is doubled within quotes.
fn rsh_word(word: &str) -> String {
    match word.is_empty() || word.contains([' ', '\'', '"']) {
        true => format!("'{}'", word.replace('\'', "''")),
        false => word.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_paths_arrive_as_they_are() {
        for (word, expected) in [
            ("ssh", "ssh"),
            ("a b", "'a b'"),
            ("it's", "'it''s'"),
            ("", "''"),
        ] {
            assert_eq!(rsh_word(word), expected);
        }
        let path = Path::new("/srv/a b*[x]");
        assert_eq!(remote_path(path, true), "/srv/a b\\*\\[x\\]");
        assert_eq!(remote_path(path, false), "/srv/a\\ b\\*\\[x\\]");
        let source = PulledSource {
            user: Some("root".into()),
            host: "web".into(),
            path: "/srv/www".into(),
        };
        assert_eq!(source.to_string(), "root@web:/srv/www");
        assert_eq!(source.place(), Path::new("@web/srv/www"));
        let whole = PulledSource {
            path: "/".into(),
            ..source
        };
        assert_eq!(escape_path(&whole.place()), "@web");
    }
}
