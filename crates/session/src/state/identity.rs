//! What this machine remembers of each container: its pins, in the state folder.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sprat_luks::{Header, LuksError, Pins};

use crate::address::Target;
use crate::files;
use crate::state::moved;
use crate::{ContainerFacts, Exit, Failure, IdentityPolicy};

/// As [`Pins::fingerprint`] has them.
const FINGERPRINT_DIGITS: usize = 20;

/// One container, as remembered: the content of `containers/<16 hex>.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Remembered {
    /// For people who read the file, and to find the target of a file that is named by the target's id.
    target: String,
    pub(super) pins: Pins,
    fingerprint: String,
    pub(super) pinned_at: Timestamp,
}

/// What the session compares the header with: the fingerprint that the user gave, else the pins, else
/// nothing.
pub fn policy(
    state_dir: &Path,
    target: &Target,
    fingerprint: Option<&str>,
) -> Result<IdentityPolicy, Failure> {
    let known = load(state_dir, target)?;
    Ok(match (known, fingerprint) {
        // The pins also know the newest sequence.
        (Some(pins), Some(typed)) if pins.matches_fingerprint(typed) => IdentityPolicy::Known(pins),
        (_, Some(typed)) => IdentityPolicy::Expect(typed.to_owned()),
        (Some(pins), None) => IdentityPolicy::Known(pins),
        (None, None) => IdentityPolicy::TrustOnce,
    })
}

/// Whether a header is the one that is pinned here, whatever fingerprint was typed.
pub fn is_known(state_dir: &Path, target: &Target, header: &Header) -> bool {
    load(state_dir, target)
        .is_ok_and(|known| known.is_some_and(|pins| header.check_pins(&pins).is_ok()))
}

/// Refuses what is no fingerprint before anything starts. Else it would be reported as another container.
pub fn check_form(typed: &str) -> Result<(), Failure> {
    let digits = typed.chars().filter(|c| !c.is_whitespace() && *c != '-');
    let (count, hex) = digits.fold((0, true), |(count, hex), c| {
        (count + 1, hex && c.is_ascii_hexdigit())
    });
    if count == FINGERPRINT_DIGITS && hex {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "--fingerprint {typed:?} is not a fingerprint: a fingerprint has {FINGERPRINT_DIGITS} \
         hexadecimal digits"
    ))
    .with_hint(
        "nothing was started. The fingerprint is on the recovery sheet, in groups with dashes",
    ))
}

/// Pins what a session found, if it is new.
pub fn remember(
    state_dir: &Path,
    target: &Target,
    policy: &IdentityPolicy,
    facts: &ContainerFacts,
) -> Result<(), Failure> {
    match policy {
        IdentityPolicy::Known(pins) if *pins == facts.pins => Ok(()),
        _ => store(state_dir, target, &facts.pins),
    }
}

/// Pins a container.
pub fn store(state_dir: &Path, target: &Target, pins: &Pins) -> Result<(), Failure> {
    let path = file(state_dir, target);
    let remembered = Remembered {
        target: target.identity(),
        pins: pins.clone(),
        fingerprint: pins.fingerprint(),
        pinned_at: Timestamp::now(),
    };
    moved::forget(state_dir, target);
    files::write_json(&path, &remembered).map_err(|error| {
        Failure::failed(format!(
            "can't save the container's identity in {}",
            path.display()
        ))
        .caused_by(&error)
        .with_hint("the container itself is undamaged")
    })
}

/// Forgets a container that is no longer there.
pub fn forget(state_dir: &Path, target: &Target) -> Result<(), Failure> {
    let path = file(state_dir, target);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!(
                "the saved identity of {target} can't be removed: {}",
                path.display()
            ))
            .caused_by(&error))
        }
        _ => Ok(()),
    }
}

fn load(state_dir: &Path, target: &Target) -> Result<Option<Pins>, Failure> {
    Ok(read(state_dir, target)?.map(|remembered| remembered.pins))
}

/// What is saved of the container at `target`.
pub(super) fn read(state_dir: &Path, target: &Target) -> Result<Option<Remembered>, Failure> {
    let path = file(state_dir, target);
    let unusable =
        |error: &dyn std::error::Error| {
            Failure::new(
            Exit::Failed,
            format!("the saved identity of the container can't be read: {}", path.display()),
        )
        .caused_by(error)
        .with_hint(
            "remove that file and give --fingerprint from the recovery sheet: sprat then saves the \
             identity again",
        )
        };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        // To remove the file would remove the protection against a changed header.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(Failure::failed(format!(
                "this user may not read the saved identity of the container: {}",
                path.display()
            ))
            .caused_by(&error)
            .with_hint(
                "nothing was changed. Run the command as root, or set SPRAT_STATE_DIR to a folder of \
                 your own",
            ));
        }
        Err(error) => return Err(unusable(&error)),
    };
    let remembered = serde_json::from_slice(&text).map_err(|error| unusable(&error))?;
    Ok(Some(remembered))
}

/// The target whose [`Target::id`] is `id`, as text, where something is pinned of it.
pub fn target_of(state_dir: &Path, id: &str) -> Option<String> {
    files::read_json(&named(state_dir, id)).map(|remembered: Remembered| remembered.target)
}

/// The containers on this machine that are pinned here, as long as they are there. What else may lie
/// at such a path by now is no container: a backup must not leave it out.
pub fn local_containers(state_dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(state_dir.join("containers"));
    let files = files.into_iter().flatten().flatten();
    let target = |file: std::fs::DirEntry| {
        let remembered: Remembered = files::read_json(&file.path())?;
        Target::parse(&remembered.target, Path::new("/")).ok()
    };
    let paths = files.filter_map(target);
    let paths = paths.filter_map(|target| target.local_path());
    paths.filter(|path| may_be_container(path)).collect()
}

/// Whether there is a file with a LUKS header, also a damaged one, or one that this user may not read.
fn may_be_container(path: &Path) -> bool {
    if !path.is_file() {
        return false;
    }
    let Ok(file) = std::fs::File::open(path) else {
        return true;
    };
    !matches!(Header::load(&file), Err(LuksError::NotLuks))
}

pub(super) fn file(state_dir: &Path, target: &Target) -> PathBuf {
    named(state_dir, &target.id())
}

fn named(state_dir: &Path, id: &str) -> PathBuf {
    state_dir.join("containers").join(format!("{id}.json"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Some container's pins.
    pub(crate) fn pins() -> Pins {
        Pins {
            cipher: "aes-xts-plain64".to_owned(),
            key_bits: 512,
            sector_bytes: 4096,
            payload_offset_bytes: 16 << 20,
            iv_tweak: 0,
            volume_key_digest: "00".repeat(32),
            uuid: "8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46".to_owned(),
            sequence_id: 3,
        }
    }

    #[test]
    fn pins_are_kept_a_target_and_compared_with_a_fingerprint() {
        let folder = tempfile::tempdir().unwrap();
        let target = Target::parse("host:x.luks", Path::new("/")).unwrap();
        let other = Target::parse("host:y.luks", Path::new("/")).unwrap();
        let policy = |target: &Target, typed| policy(folder.path(), target, typed).unwrap();
        assert!(matches!(policy(&target, None), IdentityPolicy::TrustOnce));
        store(folder.path(), &target, &pins()).unwrap();
        assert!(matches!(policy(&target, None), IdentityPolicy::Known(found) if found == pins()));
        assert!(matches!(policy(&other, None), IdentityPolicy::TrustOnce));
        let fingerprint = pins().fingerprint().to_lowercase();
        assert!(matches!(
            policy(&target, Some(&fingerprint)),
            IdentityPolicy::Known(_)
        ));
        assert!(matches!(
            policy(&target, Some("0000")),
            IdentityPolicy::Expect(_)
        ));
        std::fs::write(file(folder.path(), &target), "{").unwrap();
        assert!(super::policy(folder.path(), &target, None).is_err());
    }

    #[test]
    fn pinned_containers_on_this_machine_are_listed_while_they_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let [container, damaged, other] =
            ["x.luks", "damaged.luks", "other"].map(|name| folder.path().join(name));
        crate::volume_process::tests::make_container(&container);
        std::fs::write(&damaged, b"LUKS\xba\xbe").unwrap();
        std::fs::write(&other, "somebody's").unwrap();
        let gone = folder.path().join("gone");
        let paths = [&container, &damaged, &other, &gone].map(|path| path.display().to_string());
        for target in paths.iter().map(String::as_str).chain(["host:y.luks"]) {
            let target = Target::parse(target, Path::new("/")).unwrap();
            store(folder.path(), &target, &pins()).unwrap();
        }
        let mut found = local_containers(folder.path());
        found.sort();
        assert_eq!(found, [damaged, container]);
    }
}
