//! Where this machine moved a container, for a command that names its old target.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::address::Target;
use crate::files;
use crate::state::identity;
use crate::{Exit, Failure};

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

/// The failure of a command that finds no container.
pub fn no_container(state_dir: &Path, target: &Target) -> Failure {
    let failure = Failure::new(Exit::NoContainer, format!("there is no container {target}"));
    failure.with_hint(hint(state_dir, target))
}

/// What to do where there is no container.
pub fn hint(state_dir: &Path, target: &Target) -> String {
    let moved = files::read_json(&file(state_dir, target));
    match moved.filter(|moved: &Moved| moved.from == target.identity()) {
        Some(Moved { to, at, .. }) => format!(
            "this machine moved the container on {} to {to}: use that location. In the config, \
             write target = \"{to}\"",
            at.strftime("%Y-%m-%d")
        ),
        None => match identity::seen(state_dir, target) {
            Ok(Some(seen)) => format!(
                "{seen}. Mount its disk or its folder on the server, and run the command again"
            ),
            _ => "check the path, and whether its disk is mounted. To create a container, run `sprat init`"
                .to_owned(),
        },
    }
}

fn file(state_dir: &Path, target: &Target) -> PathBuf {
    state_dir
        .join("moved")
        .join(format!("{}.json", target.id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_place_says_where_the_container_went_until_there_is_one_again() {
        let state = tempfile::tempdir().unwrap();
        let target = |text: &str| Target::parse(text, Path::new("/")).unwrap();
        let (old, new) = (target("host:x.luks"), target("/mnt/usb/x.luks"));
        let asked = || no_container(state.path(), &old);
        let init = |failure: &Failure| failure.hint.clone().unwrap().contains("sprat init");
        assert!(init(&asked()));
        note(state.path(), &old, &new);
        let failure = asked();
        assert_eq!(failure.exit, Exit::NoContainer);
        let hint = failure.hint.clone().unwrap();
        assert!(
            hint.contains("to /mnt/usb/x.luks") && !init(&failure),
            "{hint}"
        );
        assert!(init(&no_container(state.path(), &new)));
        // A container is there again, and then its disk is away.
        let pins = identity::tests::pins();
        identity::store(state.path(), &old, &pins).unwrap();
        let hint = asked().hint.unwrap();
        assert!(
            hint.contains(&pins.uuid) && !hint.contains("sprat init"),
            "{hint}"
        );
        identity::forget(state.path(), &old).unwrap();
        assert!(init(&asked()));
    }
}
