//! What this machine's copies of the lists have of the files in a snapshot: size, time and content by path.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::merging::Merging;
use super::reading::ListLines;
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
    /// The run that read the content from the source, if that is known.
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
    let lists = chain(folder, newest)?;
    let open = || lists.iter().map(File::open).collect();
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
                read_by: line.read_by,
            });
        }
        Ok(())
    })?;
    Ok(())
}

/// The lists from the base, or from the last one that is there, to that of `newest`.
fn chain(folder: &Path, newest: SnapshotName) -> io::Result<Vec<PathBuf>> {
    let head = |list: &Path| Ok(ListLines::begin(File::open(list)?)?.head);
    let base = folder.join(BASE);
    let base_covers = head(&base)
        .ok()
        .and_then(|head: super::reading::ListHead| head.snapshot);
    let mut lists = Vec::new();
    let mut at = newest;
    loop {
        let list = folder.join(name_of(at));
        let since = match head(&list) {
            Ok(head) => head.since,
            Err(error) if lists.is_empty() => return Err(error),
            // What older runs changed is not known.
            Err(_) => break,
        };
        lists.push(list);
        match since {
            Some(since) if base_covers == Some(since) => {
                lists.push(base);
                break;
            }
            // A list that names a later one is not right.
            Some(since) if since < at => at = since,
            _ => break,
        }
    }
    lists.reverse();
    Ok(lists)
}
