//! The digests in the lists of changes of all jobs: what the content of each file was when it was backed up.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::path::Path;

use crate::change_list::chain::forget_copy;
use crate::change_list::read_list;
use crate::check::Key;
use crate::content::{Content, Digest, MaybeContent, Sums};
use crate::job::{LIST_SUFFIX, STATE_FOLDER};
use crate::long_path;

/// All of them. Of each digest eight bytes are kept: enough to find damage.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    files: HashMap<Key, u64>,
    /// Those of the pieces of large files.
    pieces: HashMap<Key, Vec<Option<u64>>>,
}

impl Listed {
    /// Reads the lists of the volume mounted at `root`. If this machine has a copy of a list in `local`, in a folder
    /// for each job, the copy is read. A list that is torn or missing counts as empty.
    pub(crate) fn load(root: &Path, local: Option<&Path>) -> Self {
        let mut listed = Self::default();
        for job in long_path::names(root).unwrap_or_default() {
            let state = root.join(&job).join(STATE_FOLDER);
            let local = local.map(|local| local.join(&job));
            let folders = local
                .iter()
                .map(std::path::PathBuf::as_path)
                .chain([&*state]);
            let names = folders
                .clone()
                .flat_map(|folder| long_path::names(folder).unwrap_or_default());
            let is_list = |name: &std::ffi::OsString| {
                name.as_encoded_bytes().ends_with(LIST_SUFFIX.as_bytes())
            };
            for name in names.filter(is_list).collect::<BTreeSet<_>>() {
                let mut places = folders.clone().map(|folder| folder.join(&name));
                let read = places.find_map(|place| {
                    let read = contents(&place);
                    if let (Err(error), Some(local)) = (&read, &local)
                        && place.starts_with(local)
                    {
                        forget_copy(&place, error);
                    }
                    read.ok()
                });
                if read.is_none() {
                    tracing::warn!(list = %name.display(), "a list of changes can't be used");
                }
                read.into_iter().flatten().for_each(|one| listed.add(&one));
            }
        }
        listed
    }

    /// The first digest stays.
    fn add(&mut self, content: &Content) {
        let short = |digest: Digest| digest.short();
        if let Some(digest) = content.sha256 {
            self.files
                .entry(content.file)
                .or_insert_with(|| short(digest));
        }
        if !content.pieces.is_empty() {
            let pieces = content.pieces.iter().map(|piece| piece.map(short));
            let pieces = pieces.collect::<Vec<_>>();
            let known = self
                .pieces
                .entry(content.file)
                .or_insert_with(|| vec![None; pieces.len()]);
            for (known, piece) in known.iter_mut().zip(pieces) {
                *known = known.or(piece);
            }
        }
    }

    /// Whether the content of a file is what was backed up. `None`: that is not known.
    pub(crate) fn compare(&self, file: Key, sums: &Sums) -> Option<bool> {
        if let Some(whole) = self.files.get(&file) {
            return Some(*whole == sums.whole.short());
        }
        let known = self.pieces.get(&file)?;
        let pieces = known.iter().zip(&sums.pieces);
        let mut differs = pieces.filter_map(|(known, piece)| Some((*known)? != piece.short()));
        differs.any(|differs| differs).then_some(false)
    }

    /// Whether any list has a digest of the file, or of pieces of it.
    pub(crate) fn knows(&self, file: Key) -> bool {
        self.files.contains_key(&file) || self.pieces.contains_key(&file)
    }

    /// Whether no list has a digest of the whole file.
    pub(crate) fn lacks(&self, file: Key) -> bool {
        !self.files.contains_key(&file)
    }

    /// The number of a piece of a large file whose digest is known, if there is any: `wanted` or the next one.
    pub(crate) fn piece(&self, file: Key, wanted: u64) -> Option<(u64, u64)> {
        let pieces = self.pieces.get(&file)?;
        let first = usize::try_from(wanted).ok()?.checked_rem(pieces.len())?;
        let mut numbers = (first..pieces.len()).chain(0..first);
        numbers.find_map(|number| Some((number as u64, pieces[number]?)))
    }
}

/// What a list has about contents.
fn contents(list: &Path) -> io::Result<Vec<Content>> {
    let mut contents = Vec::new();
    read_list(File::open(list)?, &mut |line: MaybeContent| {
        contents.extend(line.content());
    })?;
    Ok(contents)
}
