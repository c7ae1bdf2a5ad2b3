//! The indexes of large files that rsync sent whole, so that the first change of such a file is not compared with the
//! file on the volume.
//!
//! The hashes are made of the file in `work`, of which the snapshot is made, and never of the source, which may have
//! changed. Otherwise a block that changed while rsync read it could be missing in all snapshots.

use std::cell::RefCell;
use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use super::index::{
    BLOCK_BYTES, Draft, Hasher, Identity, Key, Ready, WHOLE_BYTES_MAX, index_bytes,
};
use super::{PIECE_BYTES_OF_NEW, part};

/// Where the indexes of a run's files are made.
pub(super) struct Making {
    /// On this machine.
    indexes: PathBuf,
    /// The sources of this machine. No other file is ever compared.
    sources: Vec<PathBuf>,
    made: RefCell<Vec<Made>>,
}

/// An index that belongs to the file until somebody changes that.
pub(super) struct Made {
    pub(super) path: PathBuf,
    pub(super) file: Identity,
    pub(super) index: Ready,
}

impl Making {
    pub(super) fn new(indexes: PathBuf, sources: Vec<PathBuf>) -> Self {
        Self {
            indexes,
            sources,
            made: RefCell::default(),
        }
    }

    /// Begins the index of the large file whose source is `path`. `None`: it needs none.
    pub(super) fn begin(&self, path: &Path, about: &Metadata) -> Option<NewIndex> {
        let is_wanted = self.sources.iter().any(|one| path.starts_with(one));
        let made = self.made.borrow();
        let bytes = made
            .iter()
            .map(|made| index_bytes(made.file.bytes))
            .sum::<u64>();
        drop(made);
        if !is_wanted || bytes + index_bytes(about.len()) > WHOLE_BYTES_MAX {
            return None;
        }
        let begin = || {
            let key = Key::random()?;
            let draft = Draft::begin(part::draft_path(&self.indexes, path, 0), key)?;
            Ok((draft, key.hasher()?))
        };
        let begun: io::Result<_> = begin();
        let (draft, hasher) = kept(begun)?;
        Some(NewIndex {
            path: path.to_owned(),
            file: Identity::of(about),
            draft: Some(draft),
            hasher,
            bytes: 0,
            block: Vec::with_capacity(BLOCK_BYTES),
        })
    }

    /// Ends the index of the open file, if it has got all content.
    pub(super) fn end(&self, mut new: NewIndex, file: &File) {
        if !new.block.is_empty() {
            new.push_block(&new.block.clone());
        }
        let is_same = |about: Metadata| Identity::of(&about) == new.file;
        let Some(draft) = new.draft.take() else {
            return;
        };
        if new.bytes != new.file.bytes || !file.metadata().is_ok_and(is_same) {
            return;
        }
        let pieces = new.bytes / PIECE_BYTES_OF_NEW;
        let ready = draft.end_of_whole(&new.path, new.file.clone(), pieces);
        if let Some(index) = kept(ready) {
            self.made.borrow_mut().push(Made {
                path: new.path,
                file: new.file,
                index,
            });
        }
    }

    pub(super) fn made(self) -> Vec<Made> {
        self.made.into_inner()
    }
}

/// The index of one file.
pub(crate) struct NewIndex {
    path: PathBuf,
    file: Identity,
    /// `None`: it can't be made.
    draft: Option<Draft>,
    hasher: Hasher,
    bytes: u64,
    /// The beginning of the next block.
    block: Vec<u8>,
}

impl NewIndex {
    /// Adds content from this place on.
    pub(crate) fn push(&mut self, at: u64, mut content: &[u8]) {
        if at != self.bytes {
            // Some is missing.
            self.draft = None;
        }
        self.bytes += content.len() as u64;
        if !self.block.is_empty() {
            let (begin, rest) = content.split_at(content.len().min(BLOCK_BYTES - self.block.len()));
            self.block.extend_from_slice(begin);
            content = rest;
            if self.block.len() < BLOCK_BYTES {
                return;
            }
            let block = std::mem::take(&mut self.block);
            self.push_block(&block);
        }
        let (blocks, rest) = content.as_chunks::<BLOCK_BYTES>();
        for block in blocks {
            self.push_block(block);
        }
        self.block.extend_from_slice(rest);
    }

    fn push_block(&mut self, block: &[u8]) {
        let Some(draft) = &mut self.draft else { return };
        let pushed = self.hasher.hash(block).and_then(|hash| draft.push(&hash));
        if kept(pushed).is_none() {
            self.draft = None;
        }
    }
}

/// Warns of a failure.
fn kept<T>(done: io::Result<T>) -> Option<T> {
    if let Err(error) = &done {
        tracing::warn!(%error, "this machine can't keep the hashes of a large file");
    }
    done.ok()
}

#[cfg(test)]
mod tests {
    use super::super::index::Index;
    use super::*;

    const BYTES: usize = (1 << 20) + 777;

    fn content() -> Vec<u8> {
        let content = (0..=250).cycle().flat_map(|byte| [byte; 1000]);
        content.take(BYTES).collect()
    }

    /// The index that these parts of the content make. `None`: there is none.
    fn index_of(parts: &[(usize, usize)], change: impl FnOnce(&Path)) -> Option<Index> {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = folder.path().join("vm.img");
        let content = content();
        std::fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        let making = Making::new(folder.path().join("blocks"), vec![folder.path().to_owned()]);
        let mut new = making.begin(&path, &file.metadata().unwrap()).unwrap();
        for (begin, end) in parts {
            new.push(*begin as u64, &content[*begin..*end]);
        }
        change(&path);
        making.end(new, &file);
        let made = making.made().pop()?;
        made.index
            .put(&folder.path().join("blocks"), &path)
            .unwrap();
        Index::open(&folder.path().join("blocks"), &path)
    }

    #[test]
    fn the_index_has_a_hash_of_each_block_whatever_is_read_at_once() {
        let cuts = [0, 5, 4096, 4100, 20_000, 1 << 19, BYTES - 1, BYTES];
        let parts: Vec<_> = cuts.windows(2).map(|cut| (cut[0], cut[1])).collect();
        let mut index = index_of(&parts, |_| {}).unwrap();
        let mut hasher = index.key().hasher().unwrap();
        for block in content().chunks(BLOCK_BYTES) {
            assert_eq!(index.hashes.next(), Some(hasher.hash(block).unwrap()));
        }
        assert!(index.hashes.is_over());
    }

    #[test]
    fn there_is_no_index_of_a_part_or_of_a_file_that_changed() {
        assert!(index_of(&[(0, BYTES)], |_| {}).is_some());
        assert!(index_of(&[(0, BYTES - 1)], |_| {}).is_none());
        assert!(index_of(&[(1, BYTES)], |_| {}).is_none());
        assert!(index_of(&[(0, 4096), (8192, BYTES)], |_| {}).is_none());
        let touch = |path: &Path| {
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
        };
        assert!(index_of(&[(0, BYTES)], touch).is_none());
    }
}
