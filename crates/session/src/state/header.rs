//! Compares the header that a server shows with what this machine knows, and explains a missing header.

use std::collections::BTreeMap;
use std::path::Path;

use sprat_luks::{LuksError, LuksErrorKind};

use crate::address::Target;
use crate::state::paths::StatePaths;
use crate::state::{KnownState, headers};
use crate::{Exit, Failure, IdentityPolicy, text};

/// Compares the key slots with those that this machine knows.
pub fn check_slots(
    state_dir: &Path,
    target: &Target,
    uuid: &str,
    slots: &BTreeMap<u32, String>,
) -> Result<(), Failure> {
    let paths = StatePaths::new(state_dir, uuid, target);
    KnownState::load(&paths).check_slots(slots, &target.to_string())
}

/// Whether this machine knows in which state the container was left.
pub fn is_known(state_dir: &Path, target: &Target, uuid: &str) -> bool {
    KnownState::load(&StatePaths::new(state_dir, uuid, target)).has_stamp()
}

/// The key slot that opened the container on this machine the last time.
pub fn opened_last(state_dir: &Path, target: &Target, uuid: &str) -> Option<u32> {
    KnownState::load(&StatePaths::new(state_dir, uuid, target)).opened_by()
}

/// Why a header can't be read. If a header was pinned, and the file has none any more, it was destroyed.
/// That is damage and not a wrong path.
pub fn header_unreadable(
    state_dir: &Path,
    target: &Target,
    pins: &IdentityPolicy,
    error: &LuksError,
) -> Failure {
    let failure = Failure::from(error);
    let IdentityPolicy::Known(pins) = pins else {
        return failure;
    };
    let failure = match error.kind() {
        LuksErrorKind::NoContainer => Failure::new(
            Exit::Damaged,
            format!("the header of {target} is destroyed, or another file is at its place"),
        )
        .because(failure.what),
        LuksErrorKind::Damaged => failure,
        _ => return failure,
    };
    let (path, _) = headers::to_put_back(&StatePaths::new(state_dir, &pins.uuid, target));
    let kept = headers::open(&path).and_then(|file| headers::load(&file, &path));
    failure.with_hint(match kept {
        Ok(kept) => format!(
            "nothing was changed. This machine has a saved copy of the header, which opens with {}. Run \
             `sprat key header-restore` to restore it. If only the header was damaged, all data is then \
             available again",
            text::counted(kept.slots().len() as u64, "key", "keys")
        ),
        Err(_) => "nothing was changed, and this machine has no saved copy of the header. Each other \
                   machine that opens this container has one, and so has a file of `sprat key \
                   header-backup`. Restore such a copy with `sprat key header-restore`. Without a \
                   header nobody can decrypt the data"
            .to_owned(),
    })
}
