//! Names a snapshot, or a part of it, in one argument.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::choice::SnapshotChoice;
use crate::name::JobName;

/// A snapshot, or a part of it.
#[derive(Debug, PartialEq)]
pub struct SnapshotPath {
    /// The job.
    pub job: JobName,
    /// The snapshot, if one is named.
    pub snapshot: Option<SnapshotChoice>,
    /// The path in the source, absolute; `None`: everything.
    pub path: Option<PathBuf>,
}

impl SnapshotPath {
    /// Parses `JOB/SNAPSHOT`: a whole snapshot, which must be named.
    ///
    /// # Errors
    /// Says what is wrong, in words.
    pub fn parse_snapshot(text: &OsStr) -> Result<(JobName, SnapshotChoice), String> {
        let found = Self::parse(text)?;
        match (found.snapshot, found.path) {
            (Some(snapshot), None) => Ok((found.job, snapshot)),
            (None, _) => Err(format!("{text:?} has no snapshot in it")),
            (Some(_), Some(_)) => Err(format!("{text:?} is a path in a snapshot; give a snapshot")),
        }
    }

    /// Parses `JOB[/SNAPSHOT][:PATH]`. The first colon begins the path, which may contain more colons and
    /// need not be UTF-8.
    ///
    /// # Errors
    /// Says what is wrong, in words.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let (name, path) = match bytes.iter().position(|byte| *byte == b':') {
            Some(colon) => (&bytes[..colon], Some(&bytes[colon + 1..])),
            None => (bytes, None),
        };
        if path == Some(b"") {
            return Err(format!("{text:?} has no path after the colon"));
        }
        let name = std::str::from_utf8(name).map_err(|_| format!("{text:?} is not UTF-8"))?;
        let (job, snapshot) = match name.split_once('/') {
            Some((job, snapshot)) => (job, Some(snapshot)),
            None => (name, None),
        };
        if let Some(snapshot) = snapshot
            && (snapshot.is_empty() || snapshot.contains('/'))
        {
            return Err(format!("{snapshot:?} is not the name of a snapshot"));
        }
        // Paths are those of the source, whole; the leading slash may be left out.
        let path = path.map(|path| {
            let begin = path
                .iter()
                .position(|byte| *byte != b'/')
                .unwrap_or(path.len());
            Path::new("/").join(OsStr::from_bytes(&path[begin..]))
        });
        Ok(Self {
            job: JobName::new(job).map_err(|error| error.to_string())?,
            snapshot: snapshot.map(SnapshotChoice::parse),
            path,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_snapshot_must_be_named() {
        let parse = |text: &str| SnapshotPath::parse_snapshot(text.as_ref());
        let (job, snapshot) = parse("home/2026-11").unwrap();
        assert_eq!(
            (job.as_str(), snapshot),
            ("home", SnapshotChoice::parse("2026-11"))
        );
        assert!(parse("home").unwrap_err().contains("has no snapshot in it"));
        assert!(
            parse("home/latest:/etc")
                .unwrap_err()
                .contains("is a path in a snapshot")
        );
        assert!(parse("home/").is_err());
    }

    #[test]
    fn job_snapshot_and_path_are_told_apart() {
        let parse = |text: &str| match SnapshotPath::parse(text.as_ref()) {
            Ok(found) => format!("{} {:?} {:?}", found.job, found.snapshot, found.path),
            Err(what) => what,
        };
        let not_a_job = |what: &str| {
            format!(
                "{what} (1 to 128 bytes, no '/', no control characters, no '.' or '-' in front)"
            )
        };
        let dated = "2026-11-23T13-21-01Z";
        for (text, expected) in [
            ("home", "home None None".to_owned()),
            ("home/latest", "home Some(Latest) None".to_owned()),
            (
                &format!("home/{dated}"),
                format!("home Some(Named({dated:?})) None"),
            ),
            (
                "home:/etc/fstab",
                "home None Some(\"/etc/fstab\")".to_owned(),
            ),
            ("home:etc/a:b", "home None Some(\"/etc/a:b\")".to_owned()),
            (
                &format!("home/{dated}:/x/y z"),
                format!("home Some(Named({dated:?})) Some(\"/x/y z\")"),
            ),
            ("", not_a_job("\"\" is not a job name: it is empty")),
            ("home/", "\"\" is not the name of a snapshot".to_owned()),
            (
                "home/a/b",
                "\"a/b\" is not the name of a snapshot".to_owned(),
            ),
            ("home:", "\"home:\" has no path after the colon".to_owned()),
            (
                "../x",
                not_a_job("\"..\" is not a job name: it begins with a dot"),
            ),
            (":x", not_a_job("\"\" is not a job name: it is empty")),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }
}
