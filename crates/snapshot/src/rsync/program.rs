//! Finds rsync and checks its version.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::SnapshotError;
use crate::text::{escape_name, escape_path};

/// The folders that are searched for a plain program name. A caller that wants to search its own `PATH`
/// passes an absolute path.
const FOLDERS: [&str; 8] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/run/current-system/sw/bin",
    "/opt/local/bin",
];
/// 3.1.3 introduced the comparison of times to the nanosecond (`--modify-window=-1`, rsync's NEWS).
const OLDEST: (u32, u32, u32) = (3, 1, 3);

/// A usable rsync.
#[derive(Debug, Clone)]
pub(crate) struct Rsync {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
    pub(super) numbers: (u32, u32, u32),
}

impl Rsync {
    /// Finds `program` and asks it for its version.
    pub(crate) fn find(program: &Path) -> Result<Self, SnapshotError> {
        let missing = || SnapshotError::RsyncMissing {
            program: escape_path(program),
        };
        let path = if program.is_absolute() {
            program.to_owned()
        } else if program.components().count() == 1 {
            FOLDERS
                .iter()
                .map(|folder| Path::new(folder).join(program))
                .find(|path| is_executable(path))
                .ok_or_else(missing)?
        } else {
            return Err(missing());
        };
        let unusable = |why: String| SnapshotError::RsyncUnusable {
            program: escape_path(&path),
            why,
        };
        let output = clean(&mut Command::new(&path))
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => missing(),
                _ => unusable(format!("can't be started: {e}")),
            })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = parse_version(&text).ok_or_else(|| {
            let first = text.lines().next().unwrap_or_default();
            let first: String = escape_name(first.as_bytes()).chars().take(100).collect();
            unusable(format!("printed {first:?} instead of rsync's version"))
        })?;
        if version.numbers < OLDEST {
            return Err(unusable(format!(
                "is version {}; sprat needs {}.{}.{} or newer",
                version.text, OLDEST.0, OLDEST.1, OLDEST.2
            )));
        }
        Ok(Self {
            path,
            version: version.text,
            numbers: version.numbers,
        })
    }

    /// Whether it escapes its arguments for the login shell of another host (rsync's NEWS, 3.2.4).
    pub(crate) fn escapes_arguments(&self) -> bool {
        self.numbers >= (3, 2, 4)
    }

    /// Whether it knows an option.
    pub(super) fn accepts(&self, option: &str) -> bool {
        let mut command = self.command();
        command.args([option, "--version"]).stdin(Stdio::null());
        command.output().is_ok_and(|output| output.status.success())
    }

    /// A command that is independent of the caller's environment: neither `RSYNC_*` nor popt's aliases
    /// in `HOME` have an effect, and the messages are not translated.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        clean(&mut command);
        command
    }
}

fn clean(command: &mut Command) -> &mut Command {
    command
        .env_clear()
        .env("LC_ALL", "C")
        // For the times in rsync's output.
        .env("TZ", "UTC0")
        .env("PATH", FOLDERS[..6].join(":"))
}

fn is_executable(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

struct Version {
    numbers: (u32, u32, u32),
    text: String,
}

/// Parses `rsync  version 3.2.7  protocol version 31` (since 3.0; git builds print `v3.5.0dev`).
fn parse_version(text: &str) -> Option<Version> {
    let rest = text.lines().next()?.strip_prefix("rsync")?.trim_start();
    let word = rest.strip_prefix("version")?.split_whitespace().next()?;
    // Only the digits at the beginning of a part such as `1pre1` count. A missing part is 0.
    let mut parts = word.trim_start_matches('v').split('.').map(|part| {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        part[..digits].parse::<u32>().ok()
    });
    let (major, minor) = (parts.next()??, parts.next()??);
    Some(Version {
        numbers: (major, minor, parts.next().flatten().unwrap_or(0)),
        text: word.chars().take(40).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_distributions_are_parsed() {
        for (text, numbers) in [
            ("rsync  version 3.2.7  protocol version 31", Some((3, 2, 7))),
            (
                "rsync  version v3.5.0dev  protocol version 32\n",
                Some((3, 5, 0)),
            ),
            ("rsync  version 2.6.9  protocol version 29", Some((2, 6, 9))),
            (
                "rsync  version 3.1pre1  protocol version 31",
                Some((3, 1, 0)),
            ),
            ("openrsync: protocol version 29", None),
            ("rsync  version x.y", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text).map(|v| v.numbers), numbers, "{text}");
        }
    }

    #[test]
    fn a_missing_rsync_and_another_program_are_distinguished() {
        let missing = Rsync::find(Path::new("/nowhere/rsync")).unwrap_err();
        assert!(
            matches!(missing, SnapshotError::RsyncMissing { .. }),
            "{missing}"
        );
        let missing = Rsync::find(Path::new("no-such-program-here")).unwrap_err();
        assert!(
            matches!(missing, SnapshotError::RsyncMissing { .. }),
            "{missing}"
        );
        let other = Rsync::find(Path::new("echo")).unwrap_err();
        assert!(
            matches!(other, SnapshotError::RsyncUnusable { .. }),
            "{other}"
        );
    }
}
