//! The first names of damaged files, in failures.

use sprat_session::{Failure, text};

/// Damaged files that are named; `sprat check` names all.
pub(super) const NAMES_SHOWN: usize = 5;

/// With some of these files, which are escaped.
pub(super) fn naming<'n>(failure: Failure, files: impl Iterator<Item = &'n String>) -> Failure {
    files.take(NAMES_SHOWN).fold(failure, |failure, name| {
        failure.because(text::harmless(name))
    })
}
