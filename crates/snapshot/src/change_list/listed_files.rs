//! What this machine's copies of the lists have of the files in a snapshot: size, time and content by path.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::merging::Merging;
use super::reading::{ListHead, ListLines};
use super::{BASE, name_of};
use crate::content::Content;
use crate::name::SnapshotName;
use crate::seen::Kind;
use crate::text::unescape_path;

/// A file of the snapshot whose content the lists have.
#[derive(Debug, Clone)]
pub(crate) struct ListedFile {
    /// Its path in the source.
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) modified: Timestamp,
    pub(crate) content: Content,
    /// The run that read the content from the source, if that is known, and if the clock was right then.
    pub(crate) read_by: Option<SnapshotName>,
}

/// Calls `each` with each file of the snapshot `newest`, in the order of the lists. `folder` has the copies of the
/// lists of its job. Files that were last changed by a run whose list is missing are left out. After an error, all
/// of them are void.
pub(crate) fn listed_files(
    folder: &Path,
    newest: SnapshotName,
    each: &mut dyn FnMut(ListedFile),
) -> io::Result<()> {
    let chain = chain(folder, newest)?;
    let open = || chain.lists.iter().map(File::open).collect();
    let now = Timestamp::now();
    let is_dated_rightly = |run: &SnapshotName| {
        let mut written = chain.written.iter();
        let ahead = written.any(|(name, written)| name >= run && *written < run.moment());
        !ahead && run.moment() <= now
    };
    Merging::begin(&open)?.run(&mut |line| {
        let (Some(path), Some(after), Some(content)) = (&line.path, &line.after, &line.content)
        else {
            return Ok(());
        };
        if after.kind == Kind::File {
            each(ListedFile {
                path: unescape_path(path),
                bytes: after.bytes,
                modified: after.modified,
                content: content.clone(),
                read_by: line.read_by.filter(is_dated_rightly),
            });
        }
        Ok(())
    })?;
    Ok(())
}

/// Lists that follow each other.
#[derive(Default)]
struct Chain {
    /// Oldest first.
    lists: Vec<PathBuf>,
    /// When a list was written, by the name of its run. The list of a run whose clock was ahead, or one after it, was
    /// written before the time in the run's name.
    written: Vec<(SnapshotName, Timestamp)>,
}

/// The lists from the base, or from the last one that is there, to that of `newest`.
fn chain(folder: &Path, newest: SnapshotName) -> io::Result<Chain> {
    let head = |list: &Path| Ok(ListLines::begin(File::open(list)?)?.head);
    let base = folder.join(BASE);
    let base_covers = head(&base).ok().and_then(|head: ListHead| head.snapshot);
    let mut chain = Chain::default();
    let mut at = newest;
    loop {
        let list = folder.join(name_of(at));
        let head = match head(&list) {
            Ok(head) => head,
            Err(error) if chain.lists.is_empty() => return Err(error),
            // What older runs changed is not known.
            Err(_) => break,
        };
        chain.lists.push(list);
        chain
            .written
            .extend(head.written.map(|written| (at, written)));
        match head.since {
            Some(since) if base_covers == Some(since) => {
                chain.lists.push(base);
                break;
            }
            // A list that names a later one is not right.
            Some(since) if since < at => at = since,
            _ => break,
        }
    }
    chain.lists.reverse();
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::super::{First, Last, Line, Lines};
    use super::*;
    use crate::content::Digest;

    /// Writes the list of a run that read the file `name`.
    fn write(folder: &Path, run: SnapshotName, since: Option<SnapshotName>, written: &str) {
        let mut file = File::create(folder.join(name_of(run))).unwrap();
        let mut lines = Lines::begin(&mut file).unwrap();
        let first = First {
            written: Some(written.parse().unwrap()),
            ..First::new("home", Some(run), since)
        };
        lines.write(&first).unwrap();
        let found = serde_json::json!({
            "kind": "file", "bytes": 1, "mode": "0644", "user": 0, "group": 0, "modified": "2026-01-01T00:00:00Z",
        });
        let line = Line {
            path: Some(format!("/{run}")),
            change: Some(crate::seen::Change::New),
            before: None,
            after: Some(serde_json::from_value(found).unwrap()),
            content: Some(Content {
                file: crate::check::Key::parse("0000000000000001").unwrap(),
                sha256: Some(Digest::try_from("07".repeat(32)).unwrap()),
                pieces: Vec::new(),
            }),
            read_by: Some(run),
        };
        lines.write(&line).unwrap();
        lines
            .write(&Last {
                finished: true,
                ..Last::default()
            })
            .unwrap();
        lines.end().unwrap();
    }

    #[test]
    fn run_whose_clock_was_ahead_does_not_date_what_it_read() {
        let folder = tempfile::tempdir().unwrap();
        let run = |text: &str| SnapshotName::parse(text).unwrap();
        let names = [
            "2026-01-01T01-00-00Z",
            "2026-01-03T01-00-00Z",
            "2026-01-03T01-00-01Z",
            "2026-01-04T01-00-00Z",
        ]
        .map(run);
        let read_by = || {
            let mut found = Vec::new();
            listed_files(folder.path(), names[3], &mut |file| {
                found.push(file.read_by.is_some());
            })
            .unwrap();
            found
        };
        let mut since = None;
        // The second run had a clock that was a day ahead. The third one had the right time, but no name before that.
        for (name, written) in names.into_iter().zip([
            "2026-01-01T01:05:00Z",
            "2026-01-03T01:05:00Z",
            "2026-01-02T02:05:00Z",
            "2026-01-04T01:05:00Z",
        ]) {
            write(folder.path(), name, since, written);
            since = Some(name);
        }
        assert_eq!(read_by(), [true, false, false, true]);
        write(
            folder.path(),
            names[2],
            Some(names[1]),
            "2026-01-03T02:05:00Z",
        );
        assert_eq!(read_by(), [true; 4]);
    }
}
