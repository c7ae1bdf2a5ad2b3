//! What to do where there is no container.

use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::address::Target;
use crate::state::paths::{KNOWN, StatePaths};
use crate::state::{identity, moved};
use crate::{Exit, Failure};

/// The failure of a command that finds no container.
pub fn no_container(state_dir: &Path, target: &Target) -> Failure {
    let failure = Failure::new(Exit::NoContainer, format!("there is no container {target}"));
    failure.with_hint(hint(state_dir, target))
}

/// What to do where there is no container.
pub fn hint(state_dir: &Path, target: &Target) -> String {
    if let Some(moved) = moved::hint(state_dir, target) {
        return moved;
    }
    match seen(state_dir, target) {
        Ok(Some(seen)) => format!(
            "{seen}. Mount its disk or its folder on the server, and run the command again"
        ),
        _ => "check the path, and whether its disk is mounted. To create a container, run `sprat init`".to_owned(),
    }
}

/// Which container this machine knows at `target`, for a person. It may lie on a disk that is not mounted.
pub(crate) fn seen(state_dir: &Path, target: &Target) -> Result<Option<String>, Failure> {
    Ok(identity::read(state_dir, target)?.map(|remembered| {
        let paths = StatePaths::new(state_dir, &remembered.pins.uuid, target);
        let known = paths.all(KNOWN).unwrap_or_default();
        let changed = |(path, _): &(PathBuf, String)| path.metadata()?.modified();
        let times = known.iter().flat_map(changed);
        let times = times.flat_map(Timestamp::try_from);
        let last = times.fold(remembered.pinned_at, Timestamp::max);
        format!(
            "this machine last saw a container there on {}, with the UUID {}",
            last.strftime("%Y-%m-%d"),
            remembered.pins.uuid
        )
    }))
}

/// Refuses to make a container at a place where this machine knows one that is not there now. A mount point
/// without its disk looks like that, and then there would be two containers at one place.
pub fn refuse_second(state_dir: &Path, target: &Target) -> Result<(), Failure> {
    let Some(seen) = seen(state_dir, target)? else {
        return Ok(());
    };
    Err(
        Failure::failed(format!("the container {target} is not there now"))
            .because(seen)
            .with_hint(format!(
                "nothing was changed. If its disk or its folder on the server is not mounted, mount it: the \
                 container and its snapshots are there. If that container is gone for good, remove {} \
                 and run `sprat init` again",
                identity::file(state_dir, target).display()
            )),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::moved::note;

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

    #[test]
    fn no_second_container_is_made_where_one_is_known_until_its_identity_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let target = Target::parse("/mnt/usb/x.luks", Path::new("/")).unwrap();
        let asked = || refuse_second(folder.path(), &target);
        asked().unwrap();
        identity::store(folder.path(), &target, &identity::tests::pins()).unwrap();
        let paths = StatePaths::new(folder.path(), &identity::tests::pins().uuid, &target);
        let known = paths.file(KNOWN, ".json");
        std::fs::create_dir(known.parent().unwrap()).unwrap();
        let seen = std::time::UNIX_EPOCH + std::time::Duration::from_secs(4_102_444_800);
        let file_of_state = std::fs::File::create(&known).unwrap();
        file_of_state.set_modified(seen).unwrap();
        let refused = asked().unwrap_err();
        assert_eq!(refused.exit, Exit::Failed);
        let said = format!("{refused:?}");
        assert!(
            said.contains("on 2100-01-01") && said.contains(&identity::tests::pins().uuid),
            "{said}"
        );
        let file = identity::file(folder.path(), &target);
        let hint = refused.hint.unwrap();
        assert!(hint.contains(&file.display().to_string()), "{hint}");
        // What can't be read may be a known container.
        std::fs::write(&file, "{").unwrap();
        asked().unwrap_err();
        std::fs::remove_file(&file).unwrap();
        asked().unwrap();
    }
}
