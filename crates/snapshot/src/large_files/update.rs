//! Makes the file of the volume equal to what is read from a source file, and writes only the blocks that differ.
//!
//! The source may change meanwhile. The file then has what was read, as after a plain copy, and so has its index: both
//! come from the same bytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::index::{BLOCK_BYTES, Draft, Hash, Hasher, Hashes, Index, is_zero};
use crate::cancel::Cancel;

/// How much is read at once.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// After so many compared bytes, of which more than half differ, the old content is no longer read.
const COMPARED_BYTES_MIN: u64 = 32 << 20;

/// Where the old content of the file is known from.
#[derive(Debug)]
pub(super) enum Old {
    /// The index of this machine.
    Index(Box<Index>),
    /// The file on the volume is read.
    File,
    /// Nowhere: the file is new.
    New,
    /// An interrupted update has left these hashes of the beginning. The rest is known from elsewhere.
    Part(Hashes, Box<Old>),
}

impl Old {
    /// Whether the file has to be read.
    fn is_file(&self) -> bool {
        matches!(self, Self::File)
    }

    /// The hash of the next block, as far as it is known by one.
    fn next(&mut self) -> Option<Hash> {
        match self {
            Self::Index(index) => index.hashes.next(),
            Self::Part(hashes, rest) => {
                let beyond = rest.next();
                match hashes.is_over() {
                    true => beyond,
                    false => hashes.next(),
                }
            }
            Self::File | Self::New => None,
        }
    }
}

/// What an update did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Updated {
    /// Bytes that the file has now.
    pub(super) bytes: u64,
    /// Bytes that were written.
    pub(super) written: u64,
    /// Pieces that were written.
    pub(super) pieces: u64,
}

/// Why an update ended early.
#[derive(Debug)]
pub(super) enum Stopped {
    /// When so much was done.
    Cancelled(Updated),
    /// The source can't be read.
    Source(io::Error),
    /// The volume can't be written.
    Volume(io::Error),
}

/// The file of the volume.
pub(super) struct Update<'a> {
    pub(super) to: &'a File,
    pub(super) old: Old,
    /// With the key of the index, old or new.
    pub(super) hasher: Hasher,
    /// The new index. `None` if it can't be written.
    pub(super) draft: Option<Draft>,
}

/// What is done with a run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Todo {
    Keep,
    Write,
    /// All of them are zeros.
    Clear,
}

impl Update<'_> {
    /// Reads `from` to its end. `done_so_far` gets what is done, between two chunks, and the new index.
    pub(super) fn carry_out(
        &mut self,
        from: &mut dyn Read,
        done_so_far: &mut dyn FnMut(Updated, Option<&mut Draft>),
        cancel: &Cancel,
    ) -> Result<Updated, Stopped> {
        let old_bytes = self.to.metadata().map_err(Stopped::Volume)?.len();
        let mut done = Updated::default();
        let (mut chunk, mut old) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
        let mut differing = 0;
        loop {
            let length = match fill(from, &mut chunk) {
                // A read that waits ends then, too.
                _ if cancel.is_cancelled() => return Err(Stopped::Cancelled(done)),
                filled => filled.map_err(Stopped::Source)?,
            };
            if length == 0 {
                break;
            }
            let at = done.bytes;
            // A part ends with a chunk.
            if matches!(&self.old, Old::Part(hashes, _) if hashes.is_over())
                && let Old::Part(_, rest) = std::mem::replace(&mut self.old, Old::File)
            {
                self.old = *rest;
            }
            let old_length = match self.old.is_file() {
                true => read_old(self.to, at, &mut old[..length]),
                false => 0,
            };
            let blocks = chunk[..length].chunks(BLOCK_BYTES);
            let mut todo = Vec::with_capacity(CHUNK_BYTES / BLOCK_BYTES);
            for (index, block) in blocks.enumerate() {
                let begin = index * BLOCK_BYTES;
                let is_beyond = at + begin as u64 >= old_bytes;
                let same = self.is_same(block, old[..old_length].get(begin..begin + block.len()));
                todo.push(match (same, is_zero(block)) {
                    (true, _) => Todo::Keep,
                    // A hole.
                    (false, true) if is_beyond => Todo::Keep,
                    (false, true) if block.len() == BLOCK_BYTES => Todo::Clear,
                    (false, _) => Todo::Write,
                });
            }
            let differ = todo.iter().filter(|one| **one != Todo::Keep).count();
            differing += (differ * BLOCK_BYTES) as u64;
            self.apply(&chunk[..length], at, &todo, &mut done)
                .map_err(Stopped::Volume)?;
            done.bytes += length as u64;
            if self.old.is_file() && done.bytes >= COMPARED_BYTES_MIN && differing > done.bytes / 2
            {
                self.old = Old::New;
            }
            done_so_far(done, self.draft.as_mut());
        }
        if done.bytes != old_bytes {
            self.to.set_len(done.bytes).map_err(Stopped::Volume)?;
        }
        Ok(done)
    }

    /// Whether the next block of the old content is `block`. `old`: that block, as far as it was read.
    fn is_same(&mut self, block: &[u8], old: Option<&[u8]>) -> bool {
        let hash = self.hasher.hash(block);
        if let Some(draft) = &mut self.draft {
            let pushed = match &hash {
                Ok(hash) => draft.push(hash),
                Err(error) => Err(io::Error::other(error.to_string())),
            };
            if let Err(error) = pushed {
                tracing::warn!(%error, "this machine can't keep the hashes of a large file");
                self.draft = None;
            }
        }
        match self.old.is_file() {
            true => old == Some(block),
            false => {
                let before = self.old.next();
                hash.is_ok_and(|hash| before == Some(hash))
            }
        }
    }

    fn apply(&self, chunk: &[u8], at: u64, todo: &[Todo], done: &mut Updated) -> io::Result<()> {
        let mut begin = 0;
        for run in todo.chunk_by(|one, next| one == next) {
            let end = (begin + run.len() * BLOCK_BYTES).min(chunk.len());
            let (place, bytes) = (at + begin as u64, (end - begin) as u64);
            match run[0] {
                Todo::Keep => {}
                Todo::Clear => {
                    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(self.to, how, place, bytes)?;
                    done.pieces += 1;
                }
                Todo::Write => {
                    self.to.write_all_at(&chunk[begin..end], place)?;
                    done.written += bytes;
                    done.pieces += 1;
                }
            }
            begin = end;
        }
        Ok(())
    }
}

/// Reads until `chunk` is full or `from` ends.
fn fill(from: &mut dyn Read, chunk: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < chunk.len() {
        match from.read(&mut chunk[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// Reads old content, as far as that is possible. What can't be read counts as different.
fn read_old(file: &File, at: u64, old: &mut [u8]) -> usize {
    let mut length = 0;
    while length < old.len() {
        match file.read_at(&mut old[length..], at + length as u64) {
            Ok(0) | Err(_) => break,
            Ok(read) => length += read,
        }
    }
    length
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::super::index::{Identity, Key};
    use super::super::whole::Making;
    use super::*;

    /// A source that is written to while it is read. Keeps what was read.
    struct Changing {
        content: Vec<u8>,
        at: usize,
        /// What is written after each read: place and byte.
        writes: Vec<(usize, u8)>,
        read: Vec<u8>,
        most: usize,
    }

    impl Read for Changing {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let length = (self.content.len() - self.at).min(to.len()).min(self.most);
            let from = &self.content[self.at..self.at + length];
            to[..length].copy_from_slice(from);
            self.read.extend_from_slice(from);
            self.at += length;
            if let Some((place, byte)) = self.writes.pop() {
                let place = place % self.content.len().max(1);
                if let Some(there) = self.content.get_mut(place) {
                    *there = byte;
                }
            }
            Ok(length)
        }
    }

    /// Some blocks, each of one byte, and a rest.
    fn content() -> impl Strategy<Value = Vec<u8>> {
        let block = prop_oneof![3 => Just(0_u8), 3 => Just(1), 1 => any::<u8>()];
        (prop::collection::vec(block, 0..700), 0..BLOCK_BYTES).prop_map(|(blocks, rest)| {
            let mut all: Vec<u8> = blocks
                .iter()
                .flat_map(|byte| [*byte; BLOCK_BYTES])
                .collect();
            all.extend(vec![5; rest]);
            all
        })
    }

    fn update(folder: &Path, file: &Path, source: &mut Changing, with_index: bool) -> Updated {
        let to = File::options().read(true).write(true).open(file).unwrap();
        let path = Path::new("/vm.img");
        let index = Index::open(folder, path)
            .filter(|index| with_index && index.end.file == Identity::of(&to.metadata().unwrap()));
        let key = index.as_ref().map_or(Key::random().unwrap(), Index::key);
        let mut update = Update {
            to: &to,
            old: index.map_or(Old::File, |index| Old::Index(Box::new(index))),
            hasher: key.hasher().unwrap(),
            draft: Some(Draft::begin(folder.join("draft"), key).unwrap()),
        };
        let done = update
            .carry_out(source, &mut |_, _| {}, &Cancel::new())
            .unwrap();
        let identity = Identity::of(&to.metadata().unwrap());
        let draft = update.draft.unwrap();
        draft.finish(folder, path, identity, done.pieces).unwrap();
        done
    }

    /// The index of a file that rsync wrote, of which so much is read at once.
    fn index_of_whole(folder: &Path, file: &Path, at_once: usize) {
        let path = Path::new("/vm.img");
        let making = Making::new(folder.to_owned(), vec!["/".into()]);
        let open = File::open(file).unwrap();
        let mut new = making.begin(path, &open.metadata().unwrap()).unwrap();
        let mut at = 0;
        for content in std::fs::read(file).unwrap().chunks(at_once) {
            new.push(at, content);
            at += content.len() as u64;
        }
        making.end(new, &open);
        for made in making.made() {
            made.index.put(folder, path).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// The file has what was read, with and without an index, whatever is written to the source meanwhile. The
        /// next run relies on the index that this one left.
        #[test]
        fn file_has_what_was_read_from_a_source_that_changes(
            old in content(),
            at_once in prop::option::of(1000..200_000_usize),
            sources in prop::collection::vec(
                (content(), prop::collection::vec((any::<usize>(), any::<u8>()), 0..40), any::<bool>()),
                1..4,
            ),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("file");
            std::fs::write(&file, &old).unwrap();
            if let Some(at_once) = at_once {
                index_of_whole(folder.path(), &file, at_once);
            }
            for (content, writes, with_index) in sources {
                let mut source = Changing { content, at: 0, writes, read: Vec::new(), most: 100_000 };
                let done = update(folder.path(), &file, &mut source, with_index);
                prop_assert!(std::fs::read(&file).unwrap() == source.read);
                prop_assert_eq!(done.bytes, source.read.len() as u64);
            }
        }
    }

    #[test]
    fn only_blocks_that_differ_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let mut content: Vec<u8> = (0..600_u32)
            .flat_map(|block| [block.to_le_bytes()[0] | 1; BLOCK_BYTES])
            .collect();
        std::fs::write(&file, &content).unwrap();
        let of = |content: &[u8]| Changing {
            content: content.to_vec(),
            at: 0,
            writes: Vec::new(),
            read: Vec::new(),
            most: usize::MAX,
        };
        content[5] = 0;
        content[300 * BLOCK_BYTES] = 0;
        for changed in [2, 0] {
            let done = update(folder.path(), &file, &mut of(&content), true);
            assert_eq!(done.written, changed * BLOCK_BYTES as u64);
        }
        // The end changes, and the file becomes longer. Zeros become a hole.
        content.extend([0; 10 * BLOCK_BYTES]);
        content[..BLOCK_BYTES].fill(0);
        content.push(7);
        let done = update(folder.path(), &file, &mut of(&content), true);
        assert_eq!((done.written, done.pieces), (1, 2));
        assert!(std::fs::read(&file).unwrap() == content);
    }
}
