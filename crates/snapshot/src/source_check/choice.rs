//! Which files of a snapshot a slice reads: each belongs to a part by its path, and the parts are read in turn.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::PathBuf;

use super::SourceCheckSpec;
use crate::change_list::{ListedFile, order};
use crate::text::unescape_path;

/// The most files of a part that a slice reads. The next one goes on behind them.
const FILES_MAX: usize = 100_000;

/// What was chosen so far.
pub(super) struct Choice<'s> {
    spec: &'s SourceCheckSpec,
    begin: Option<PathBuf>,
    wanted: BTreeSet<PathBuf>,
    /// Files that earlier slices found changed.
    pub(super) again: Vec<ListedFile>,
    /// The files of each part.
    pub(super) parts: Vec<Part>,
}

/// Files that belong together, in the order of the lists.
#[derive(Default)]
pub(super) struct Part {
    pub(super) files: Vec<ListedFile>,
    /// Size of its files.
    bytes: u64,
    /// It has more files than a slice reads.
    pub(super) is_cut: bool,
}

impl<'s> Choice<'s> {
    pub(super) fn new(spec: &'s SourceCheckSpec) -> Self {
        let parts = spec.parts_now.clamp(1, spec.parts.max(1));
        Self {
            spec,
            begin: spec.from.file.as_deref().map(unescape_path),
            wanted: spec
                .again
                .iter()
                .map(|one| unescape_path(&one.old.path))
                .collect(),
            again: Vec::new(),
            parts: (0..parts).map(|_| Part::default()).collect(),
        }
    }

    pub(super) fn meet(&mut self, file: ListedFile) {
        let has_digest =
            file.content.sha256.is_some() || file.content.pieces.iter().any(Option::is_some);
        let is_here = self
            .spec
            .sources
            .iter()
            .any(|source| file.path.starts_with(source));
        if file.bytes == 0 || !has_digest || !is_here || file.read_by.is_none() {
            return;
        }
        if self.wanted.contains(&file.path) {
            self.again.push(file.clone());
        }
        let all = self.spec.parts.max(1);
        let behind = (part_of(&file, all) + all - self.spec.from.part % all) % all;
        let Some(part) = self.parts.get_mut(behind as usize) else {
            return;
        };
        let is_before = |begin: &PathBuf| match order(&file.path, begin) {
            Ordering::Less => true,
            Ordering::Equal => self.spec.from.piece.is_none(),
            Ordering::Greater => false,
        };
        if behind == 0 && self.begin.as_ref().is_some_and(is_before) {
            return;
        }
        // What is beyond the bytes of a slice is not needed.
        part.is_cut |= part.files.len() >= FILES_MAX || part.bytes > self.spec.bytes_max;
        if !part.is_cut {
            part.bytes = part.bytes.saturating_add(file.bytes);
            part.files.push(file);
        }
    }
}

/// The number of the part that a file belongs to.
fn part_of(file: &ListedFile, parts: u32) -> u32 {
    let hash = openssl::sha::sha256(file.path.as_os_str().as_encoded_bytes());
    let number = hash.first_chunk().copied().map_or(0, u32::from_le_bytes);
    number % parts
}
