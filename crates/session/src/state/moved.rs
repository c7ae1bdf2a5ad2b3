//! Where this machine moved a container, for a command that names its old target.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::address::Target;
use crate::files;

/// A move that came to its end.
#[derive(Debug, Serialize, Deserialize)]
struct Moved {
    from: String,
    to: String,
    at: Timestamp,
}

/// Notes a move. What it helps with is a hint, so nothing depends on it.
pub fn note(state_dir: &Path, from: &Target, to: &Target) {
    let moved = Moved {
        from: from.identity(),
        to: to.identity(),
        at: Timestamp::now(),
    };
    let _ = files::write_json(&file(state_dir, from), &moved);
}

/// A container is at `target` again, or for the first time.
pub fn forget(state_dir: &Path, target: &Target) {
    let _ = std::fs::remove_file(file(state_dir, target));
}

/// Where this machine moved the container at `target`, and when: words for a hint.
pub(crate) fn hint(state_dir: &Path, target: &Target) -> Option<String> {
    let moved = files::read_json(&file(state_dir, target));
    let Moved { to, at, .. } = moved.filter(|moved: &Moved| moved.from == target.identity())?;
    Some(format!(
        "this machine moved the container on {} to {to}: use that location. In the config, \
         write target = \"{to}\"",
        at.strftime("%Y-%m-%d")
    ))
}

fn file(state_dir: &Path, target: &Target) -> PathBuf {
    state_dir
        .join("moved")
        .join(format!("{}.json", target.id()))
}
