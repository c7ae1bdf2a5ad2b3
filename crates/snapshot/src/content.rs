//! The SHA-256 of the content of a file in a snapshot, in the lists of changes.
//!
//! A file is named by its [`Key`], so that it is the same one under each of its names, in each snapshot that
//! shares it. A file of more than 1 GiB also has a SHA-256 for each 64 MiB: a part of it can be verified.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use openssl::sha::Sha256;
use serde::{Deserialize, Serialize};

use crate::check::Key;
use crate::page_cache::{PageCache, Part, parts};

/// The length of the pieces of a large file.
pub(crate) const PIECE_BYTES: u64 = 64 << 20;
/// The holes of a file are hashed as zeros. If they are longer, that takes too much time.
const HOLES_BYTES_MAX: u64 = 64 << 30;
/// A longer file is a large one.
const WHOLE_BYTES_MAX: u64 = 1 << 30;
const BUFFER_BYTES: usize = 1 << 20;
/// The content of a hole.
static ZEROS: [u8; BUFFER_BYTES] = [0; BUFFER_BYTES];

/// A SHA-256. In JSON as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest([u8; 32]);

/// What is known about the content of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Content {
    /// Which file it is.
    #[serde(with = "crate::check::key_text")]
    pub(crate) file: Key,
    /// `None`: not known.
    pub(crate) sha256: Option<Digest>,
    /// Of a large file, those of its pieces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) pieces: Vec<Option<Digest>>,
}

/// A line of a list, which may have the content of a file.
#[derive(Debug, Deserialize)]
pub(crate) struct MaybeContent {
    file: Option<String>,
    sha256: Option<Digest>,
    #[serde(default)]
    pieces: Vec<Option<Digest>>,
}

impl MaybeContent {
    pub(crate) fn content(self) -> Option<Content> {
        Some(Content {
            file: Key::parse(&self.file?)?,
            sha256: self.sha256,
            pieces: self.pieces,
        })
    }
}

/// Computes the digests of a file from all of its bytes.
pub(crate) struct ContentHash {
    whole: Sha256,
    /// `None`: the file is not large.
    piece: Option<Piece>,
    pieces: Vec<Digest>,
}

/// The present piece.
struct Piece {
    hash: Sha256,
    bytes: u64,
}

/// The digests of a file that was read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) whole: Digest,
    pub(crate) pieces: Vec<Digest>,
}

impl Digest {
    /// The first eight bytes: enough to find damage.
    pub(crate) fn short(self) -> u64 {
        self.0.first_chunk().copied().map_or(0, u64::from_le_bytes)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut bytes = [0; 32];
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let is_right = pairs.len() == bytes.len() && rest.is_empty();
        for (byte, pair) in bytes.iter_mut().zip(pairs) {
            let digits = std::str::from_utf8(pair).ok();
            let number = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
            *byte = number.ok_or_else(|| format!("{text:?} is no SHA-256"))?;
        }
        is_right.then_some(Self(bytes)).ok_or(text)
    }
}

impl Content {
    /// The digests of a file of which all was read.
    pub(crate) fn read(file: Key, sums: &Sums) -> Self {
        Self {
            file,
            sha256: Some(sums.whole),
            pieces: sums.pieces.iter().copied().map(Some).collect(),
        }
    }

    /// The digests of an open file, as far as `cache` has its content. `is_over`: no further piece is read. `each` gets
    /// what is read, and its place in the file. Of a file whose content is not all there, that can be some of it.
    ///
    /// # Errors
    /// The file can't be read.
    pub(crate) fn cached(
        file: &File,
        about: &Metadata,
        cache: PageCache,
        is_over: &dyn Fn() -> bool,
        each: &mut dyn FnMut(u64, &[u8]),
    ) -> io::Result<Self> {
        let len = about.len();
        let has_small_holes = len.saturating_sub(about.blocks() * 512) <= HOLES_BYTES_MAX;
        let is_large = len > WHOLE_BYTES_MAX;
        let mut content = Self {
            file: Key::of(about),
            sha256: None,
            pieces: Vec::new(),
        };
        let mut whole = Some(Sha256::new());
        let mut buffer = Vec::new();
        let mut at = 0;
        while at < len {
            let end = len.min(at + PIECE_BYTES);
            let is_there = has_small_holes && !is_over() && cache.has(file, at..end);
            let piece = match is_there {
                true => hash_cached(file, at..end, is_large, &mut whole, &mut buffer, each)?,
                false => None,
            };
            if piece.is_none() {
                whole = None;
            }
            match is_large {
                true => content.pieces.push(piece),
                false if whole.is_none() => break,
                false => {}
            }
            at = end;
        }
        content.sha256 = whole.map(|whole| Digest(whole.finish()));
        Ok(content)
    }
}

/// Hashes a range of a file into `whole`: content from the page cache, holes without reading them. The digest of the
/// range; of a file that is not large, any digest. `None`: some of it is no longer there.
fn hash_cached(
    file: &File,
    range: std::ops::Range<u64>,
    is_large: bool,
    whole: &mut Option<Sha256>,
    buffer: &mut Vec<u8>,
    each: &mut dyn FnMut(u64, &[u8]),
) -> io::Result<Option<Digest>> {
    let mut piece = Sha256::new();
    let mut hash = |at: u64, bytes: &[u8], in_piece: bool| {
        each(at, bytes);
        if let Some(whole) = whole {
            whole.update(bytes);
        }
        if in_piece {
            piece.update(bytes);
        }
    };
    let mut only_hole = false;
    for part in parts(file, range.clone()) {
        match part {
            Part::Hole(hole) => {
                only_hole = hole == (range.start..range.start + PIECE_BYTES);
                for at in hole.clone().step_by(BUFFER_BYTES) {
                    let most = usize::try_from(hole.end - at).unwrap_or(BUFFER_BYTES);
                    let zeros = &ZEROS[..most.min(BUFFER_BYTES)];
                    hash(at, zeros, is_large && !only_hole);
                }
            }
            Part::Content(content) => {
                let mut at = content.start;
                while at < content.end {
                    let most = usize::try_from(content.end - at).unwrap_or(BUFFER_BYTES);
                    let most = most.min(BUFFER_BYTES);
                    if buffer.len() < most {
                        buffer.resize(most, 0);
                    }
                    let Some(some) = PageCache::read(file, at, &mut buffer[..most])? else {
                        return Ok(None);
                    };
                    hash(at, &buffer[..some], is_large);
                    at += some as u64;
                }
            }
        }
    }
    match only_hole {
        true => Ok(Some(*PIECE_OF_ZEROS)),
        false => Ok(Some(Digest(piece.finish()))),
    }
}

/// The digest of a piece that is a hole.
static PIECE_OF_ZEROS: LazyLock<Digest> = LazyLock::new(|| {
    let mut hash = Sha256::new();
    for _ in 0..PIECE_BYTES / BUFFER_BYTES as u64 {
        hash.update(&ZEROS);
    }
    Digest(hash.finish())
});

impl Piece {
    fn begin() -> Self {
        Self {
            hash: Sha256::new(),
            bytes: 0,
        }
    }
}

impl ContentHash {
    /// For a file of this length.
    pub(crate) fn new(len: u64) -> Self {
        Self {
            whole: Sha256::new(),
            piece: (len > WHOLE_BYTES_MAX).then(Piece::begin),
            pieces: Vec::new(),
        }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        let Some(piece) = &mut self.piece else {
            return;
        };
        while !bytes.is_empty() {
            let missing = usize::try_from(PIECE_BYTES - piece.bytes).unwrap_or(usize::MAX);
            let (some, rest) = bytes.split_at(bytes.len().min(missing));
            piece.hash.update(some);
            piece.bytes += some.len() as u64;
            bytes = rest;
            if piece.bytes == PIECE_BYTES {
                let full = std::mem::replace(piece, Piece::begin());
                self.pieces.push(Digest(full.hash.finish()));
            }
        }
    }

    pub(crate) fn finish(mut self) -> Sums {
        if let Some(last) = self.piece.filter(|piece| piece.bytes > 0) {
            self.pieces.push(Digest(last.hash.finish()));
        }
        Sums {
            whole: Digest(self.whole.finish()),
            pieces: self.pieces,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    #[test]
    fn digest_in_a_list_is_that_of_sha256sum() {
        let mut hash = ContentHash::new(3);
        hash.update(b"ab");
        hash.update(b"c");
        let sums = hash.finish();
        assert!(sums.pieces.is_empty());
        let text = String::from(sums.whole);
        assert_eq!(
            text,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(Digest::try_from(text.clone()), Ok(sums.whole));
        for wrong in [&text[1..], &format!("{text}0"), &text.replace('b', "x")] {
            assert!(Digest::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_the_page_cache_lacks_has_no_digest() {
        fn all(_: &File, _: std::ops::Range<u64>) -> io::Result<bool> {
            Ok(true)
        }
        fn none_of_the_second_piece(_: &File, range: std::ops::Range<u64>) -> io::Result<bool> {
            Ok(!(PIECE_BYTES..2 * PIECE_BYTES).contains(&range.start))
        }
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        let text = vec![7; 3_000_000];
        file.write_all_at(&text, 0).unwrap();
        let about = file.metadata().unwrap();
        let mut cache = PageCache::default();
        let none = Content::cached(&file, &about, cache, &|| false, &mut |_, _| {}).unwrap();
        assert_eq!(none.sha256, None);
        cache.ask(all);
        let mut hash = ContentHash::new(about.len());
        hash.update(&text);
        let found = Content::cached(&file, &about, cache, &|| false, &mut |_, _| {}).unwrap();
        assert_eq!(found, Content::read(found.file, &hash.finish()));
        // The time is over.
        let late = Content::cached(&file, &about, cache, &|| true, &mut |_, _| {}).unwrap();
        assert_eq!(late.sha256, None);

        let large = tempfile::tempfile_in("/var/tmp").unwrap();
        large.set_len(WHOLE_BYTES_MAX + 5).unwrap();
        large.write_all_at(&text, 0).unwrap();
        large.write_all_at(&text, PIECE_BYTES + 4096).unwrap();
        let about = large.metadata().unwrap();
        cache.ask(none_of_the_second_piece);
        let found = Content::cached(&large, &about, cache, &|| false, &mut |_, _| {}).unwrap();
        assert_eq!((found.sha256, found.pieces.len()), (None, 17));
        let len = usize::try_from(PIECE_BYTES).unwrap();
        let sum = |content: &[u8], zeros: usize| {
            let mut hash = Sha256::new();
            hash.update(content);
            hash.update(&vec![0; zeros]);
            Some(Digest(hash.finish()))
        };
        assert_eq!(found.pieces[0], sum(&text, len - text.len()));
        assert_eq!(found.pieces[1], None);
        let zeros = sum(&[], len);
        assert!(found.pieces[2..16].iter().all(|piece| *piece == zeros));
        assert_eq!(found.pieces[16], sum(&[], 5));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// The digest is that of all bytes, wherever content and holes are, and `each` gets all of them in order.
        #[test]
        fn digest_of_a_sparse_file_is_that_of_all_its_bytes(
            len in 0..5_000_000_u64,
            written in prop::collection::vec((0..5_000_000_u64, 0..300_000_usize), 0..6),
        ) {
            let file = tempfile::tempfile_in("/var/tmp").unwrap();
            for (at, bytes) in written {
                file.write_all_at(&vec![3; bytes], at).unwrap();
            }
            file.set_len(len).unwrap();
            let about = file.metadata().unwrap();
            let mut cache = PageCache::default();
            cache.ask(|_, _| Ok(true));
            let mut got = Vec::new();
            let mut each = |at: u64, bytes: &[u8]| {
                assert_eq!(at, got.len() as u64);
                got.extend_from_slice(bytes);
            };
            let found = Content::cached(&file, &about, cache, &|| false, &mut each).unwrap();
            let mut all = vec![1; usize::try_from(len).unwrap()];
            file.read_exact_at(&mut all, 0).unwrap();
            let mut hash = ContentHash::new(len);
            hash.update(&all);
            prop_assert_eq!(found, Content::read(Key::of(&about), &hash.finish()));
            prop_assert!(got == all);
        }
    }

    #[test]
    fn pieces_are_those_of_64_mib_whatever_is_read_at_once() {
        let len = usize::try_from(PIECE_BYTES).unwrap();
        let text: Vec<u8> = (0..=len)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        let mut hash = ContentHash::new(WHOLE_BYTES_MAX + 1);
        text.chunks(1_000_003).for_each(|some| hash.update(some));
        let sums = hash.finish();
        let sum = |bytes: &[u8]| {
            let mut hash = ContentHash::new(0);
            hash.update(bytes);
            hash.finish().whole
        };
        assert_eq!(sums.pieces, [sum(&text[..len]), sum(&text[len..])]);
        assert_eq!(sums.whole, sum(&text));
    }
}
