//! The names of sprat's own files beside a container, which no container may bear.

use sprat_store::copy::CopyNote;
use sprat_store::{FileName, FileNameError, Store, StoreError, StoreErrorKind};

use crate::Failure;

/// What is put behind a container's name: the reserve, and half-made files of sprat up to 0.x.
const SUFFIXES: [&str; 3] = [".reserve", ".new", ".trim"];
/// A lock; its number follows.
const LOCK: &str = ".lock.";
/// A copy that has no name yet; its note's token follows.
const COPYING: &str = ".copying";
/// Each session and each reconnect counts a lease's number up by one, from 1,000,001 on; sprat up to
/// 0.x counted from 1. Eight digits last for a century of one a minute, and each length needs a
/// pattern of its own.
const LOCK_DIGITS_MAX: usize = 8;
/// A list of writes; a token follows.
const LATE: &str = ".late-";
/// The source of a move, about to be removed; the token of its note follows.
const MOVED: &str = ".moved-";
/// Marks that a token follows.
const WITH_TOKEN: [&str; 5] = [".copying-", LATE, MOVED, ".new-", ".trim-"];
/// As [`FileName`] has it.
const NAME_BYTES_MAX: usize = 255;
/// As [`CopyNote::is_token`] has it.
const TOKEN_DIGITS: usize = 16;

/// Refuses a name that sprat would take for a file of its own, and remove or write over, where a
/// container is made or copied.
pub fn check(name: &FileName) -> Result<(), Failure> {
    let text = name.as_str();
    let marks = WITH_TOKEN.map(|mark| mark.len() + TOKEN_DIGITS);
    let lock = LOCK.len() + LOCK_DIGITS_MAX;
    let longest = NAME_BYTES_MAX - marks.into_iter().fold(lock, usize::max);
    if text.len() > longest {
        return Err(Failure::usage(format!(
            "{text} is too long for a container's name: {} bytes, and at most {longest} are possible",
            text.len()
        ))
        .with_hint("nothing was changed. The files that sprat keeps beside a container have longer \
                    names"));
    }
    let own = SUFFIXES.iter().any(|suffix| text.ends_with(suffix))
        || text.ends_with(COPYING)
        || parted(text, LOCK).is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()))
        || WITH_TOKEN
            .iter()
            .any(|mark| parted(text, mark).is_some_and(CopyNote::is_token));
    if !own {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{text} can't be a container's name: files that sprat keeps beside a container have such names"
    ))
    .with_hint(
        "nothing was changed. Choose a name that doesn't end in .reserve, .new, .trim, .copying, \
         .lock.N, or one of .copying-, .new-, .trim-, .late-, .moved- and 16 digits; if a container has \
         such a name, rename its file first",
    ))
}

/// What follows the name of a container in the names of all of sprat's own files beside it, as rsync's
/// patterns have it; exact, since what matches is left out of every backup without a word.
pub fn endings() -> Vec<String> {
    let locks = (1..=LOCK_DIGITS_MAX).map(|digits| format!("{LOCK}{}", "[0-9]".repeat(digits)));
    let token = "[0-9a-f]".repeat(TOKEN_DIGITS);
    let plain = SUFFIXES.into_iter().chain([COPYING]).map(str::to_owned);
    plain
        .chain(locks)
        .chain(WITH_TOKEN.map(|mark| format!("{mark}{token}")))
        .collect()
}

/// A file that is to take a container's name. Its name has a token of its own: a rename that a server
/// carries out late must not give the container's name to what another session has begun since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HalfMade {
    /// What `init` makes.
    New,
    /// What a rewrite makes.
    Rewritten,
}

impl HalfMade {
    /// The whole suffix in sprat up to 0.x; a `-` and a token follow now.
    fn mark(self) -> &'static str {
        match self {
            Self::New => ".new",
            Self::Rewritten => ".trim",
        }
    }

    /// A name beside `container` that nobody has used.
    pub fn name(self, container: &FileName) -> Result<FileName, Failure> {
        let token = token()
            .map_err(|error| Failure::failed("can't choose a name by chance").caused_by(&error))?;
        let name = container.with_suffix(&format!("{}-{token}", self.mark()));
        name.map_err(|error| Failure::usage(error.to_string()))
    }

    /// Whether `name` is that of such a file of `container`, of whatever session and version.
    pub fn has_name(self, name: &FileName, container: &FileName) -> bool {
        let rest = name.as_str().strip_prefix(container.as_str());
        let Some(rest) = rest.and_then(|rest| rest.strip_prefix(self.mark())) else {
            return false;
        };
        rest.is_empty() || rest.strip_prefix('-').is_some_and(CopyNote::is_token)
    }

    /// Removes what dead sessions left. Only under the container's lease. Returns what was there.
    pub fn remove_all(
        self,
        store: &dyn Store,
        container: &FileName,
    ) -> Result<Vec<FileName>, StoreError> {
        let mut removed = Vec::new();
        for name in store.list()? {
            if self.has_name(&name, container) && store.remove_if_there(&name)? {
                removed.push(name);
            }
        }
        Ok(removed)
    }
}

fn token() -> Result<String, openssl::error::ErrorStack> {
    let mut random = [0; TOKEN_DIGITS / 2];
    openssl::rand::rand_bytes(&mut random)?;
    Ok(format!("{:016x}", u64::from_ne_bytes(random)))
}

/// The name that a copy bears until all of it was read back.
pub fn unfinished_copy(of: &FileName, token: &str) -> Result<FileName, FileNameError> {
    of.with_suffix(&format!("{COPYING}-{token}"))
}

/// The name that the source of a move bears between the last check of it and its removal.
pub fn set_aside(source: &FileName, token: &str) -> Result<FileName, FileNameError> {
    source.with_suffix(&format!("{MOVED}{token}"))
}

/// Whether `name` is that of `of`, set aside by a move, whoever made it.
pub fn is_set_aside(name: &FileName, of: &FileName) -> bool {
    let rest = name.as_str().strip_prefix(of.as_str());
    rest.and_then(|rest| rest.strip_prefix(MOVED))
        .is_some_and(CopyNote::is_token)
}

/// Whether `name` is that of an unfinished copy of `of`, whoever made it.
pub fn is_unfinished_copy(name: &FileName, of: &FileName) -> bool {
    let rest = name.as_str().strip_prefix(of.as_str());
    let rest = rest.and_then(|rest| rest.strip_prefix(COPYING));
    rest.and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(CopyNote::is_token)
}

/// Whether the server says that this account may not remove files (`sftp-server -P remove`). One that
/// forbids it only file by file is not found out.
pub fn may_not_remove(store: &dyn Store, container: &FileName) -> bool {
    nobodys(container).is_some_and(|name| refuses(store.remove(&name)))
}

/// A file that nobody has made: a server that would do what it is asked for says that it isn't there, and
/// nothing is changed.
pub fn nobodys(container: &FileName) -> Option<FileName> {
    unfinished_copy(container, &token().ok()?).ok()
}

fn refuses<T>(answer: Result<T, StoreError>) -> bool {
    matches!(
        answer.err().map(|error| error.kind()),
        Some(
            StoreErrorKind::PermissionDenied
                | StoreErrorKind::ReadOnly
                | StoreErrorKind::Unsupported
        )
    )
}

/// What an account that may not remove files can't do.
pub const WITHOUT_REMOVING: &str = "backups, restores, pruning and key changes work. `trim --rewrite`, \
                                    `copy --move` and the reserve file don't work, and released lock \
                                    files (4 KiB each) stay beside the container";

/// What follows the last `mark`, if anything does.
fn parted<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    let (_, rest) = text.rsplit_once(mark)?;
    (!rest.is_empty()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> FileName {
        FileName::new(text).unwrap()
    }

    #[test]
    fn names_of_our_own_files_are_refused_and_no_others() {
        for own in [
            "x.luks.reserve",
            "x.luks.new",
            "x.luks.trim",
            "x.luks.lock.1",
            "x.luks.lock.10",
            "x.luks.copying",
            "x.luks.copying-0123456789abcdef",
            "x.luks.late-0123456789abcdef",
            "x.luks.moved-0123456789abcdef",
            "x.luks.new-0123456789abcdef",
            "x.luks.trim-0123456789abcdef",
            "x.reserve",
        ] {
            let refused = check(&name(own)).unwrap_err();
            assert_eq!(refused.exit, crate::Exit::Usage, "{own}");
        }
        let long = |bytes: usize| format!("{}.luks", "x".repeat(bytes - 5));
        assert_eq!(
            check(&name(&long(231))).unwrap_err().exit,
            crate::Exit::Usage
        );
        check(&name(&long(230))).unwrap();
        for others in [
            "x.luks",
            "new",
            "reserve.luks",
            "x.lock.luks",
            "x.lock.",
            "x.copying-me",
            "x.new.luks",
            "x.new-luks",
            "x.trim-0123",
            "x.lock.1.luks",
        ] {
            check(&name(others)).unwrap();
        }
    }

    #[test]
    fn every_ending_stands_for_a_name_of_our_own() {
        let mut names = Vec::new();
        for ending in endings() {
            let one = ending.replace("[0-9a-f]", "f").replace("[0-9]", "7");
            assert!(!one.contains('['), "{ending}");
            check(&name(&format!("x.luks{one}"))).unwrap_err();
            names.push(one);
        }
        for expected in [
            ".reserve",
            ".new",
            ".trim",
            ".lock.7",
            ".lock.77777777",
            ".copying",
        ] {
            assert!(names.iter().any(|name| name == expected), "{expected}");
        }
        for mark in WITH_TOKEN {
            assert!(names.contains(&format!("{mark}{}", "f".repeat(16))));
        }
    }

    #[test]
    fn half_made_files_have_a_name_of_their_own_each_and_all_of_them_are_removed() {
        let of = name("x.luks");
        for (kind, other) in [
            (HalfMade::New, HalfMade::Rewritten),
            (HalfMade::Rewritten, HalfMade::New),
        ] {
            let made = kind.name(&of).unwrap();
            assert_ne!(made, kind.name(&of).unwrap());
            assert!(kind.has_name(&made, &of) && !other.has_name(&made, &of));
            check(&made).unwrap_err();
            let store = sprat_testkit::memory::MemoryStore::new();
            let old = name(&format!("x.luks{}", kind.mark()));
            let stays = [
                of.clone(),
                name("y.luks.new-0123456789abcdef"),
                name("x.luks.new-0123"),
                name("x.luks.trim-0123456789abcdef.luks"),
                other.name(&of).unwrap(),
            ];
            for name in stays.iter().chain([&made, &old]) {
                store.create_new(name).unwrap();
            }
            let mut removed = kind.remove_all(&store, &of).unwrap();
            removed.sort();
            let mut expected = vec![made, old];
            expected.sort();
            assert_eq!(removed, expected);
            for name in stays {
                store.stat(&name).unwrap();
            }
        }
    }

    #[test]
    fn an_unfinished_copy_is_known_by_its_name_and_is_no_containers() {
        let of = name("x.luks");
        let unfinished = unfinished_copy(&of, "0123456789abcdef").unwrap();
        assert!(is_unfinished_copy(&unfinished, &of));
        check(&unfinished).unwrap_err();
        for other in [
            "x.luks",
            "x.luks.copying",
            "x.luks.copying-0123",
            "y.luks.copying-0123456789abcdef",
            "x.luks.copying-0123456789abcdef.luks",
        ] {
            assert!(!is_unfinished_copy(&name(other), &of), "{other}");
        }
    }
}
