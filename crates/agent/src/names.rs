//! Which names the folder of a client may have, and what a path leads to.
//!
//! The client sees a tree of two levels: its files, and `.generations/NAME.luks/` with past states.

use std::path::Path;

/// The folder of past states, as the client sees it.
pub const PAST: &str = ".generations";
/// The first lease's number of the numbered leases; sprat up to 0.x counts from 1.
const FIRST_LEASE: u64 = 1_000_001;
/// Eight digits last for a century of one lease a minute.
const LEASE_DIGITS_MAX: usize = 8;
const STEM_BYTES_MAX: usize = 64;
const TOKEN_DIGITS: usize = 16;

/// What a file in the client's folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `STEM.luks`: never removed, renamed, replaced or made shorter.
    Container,
    /// A half-made container that may get the container's name.
    HalfMade,
    /// A half-made container that may not: `.trim` would replace the container.
    Rewrite,
    /// Free space for the case of a full disk.
    Reserve,
    /// A lease, with its number.
    Lease(u64),
    /// A list of writes of a session that lost its lease.
    LateList,
}

/// A name that the folder may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    pub text: String,
    /// The container's name, `STEM.luks`.
    pub container: String,
    pub kind: Kind,
}

impl Name {
    /// Checks a name. `None`: there is no such file, whatever lies on the disk.
    pub fn parse(text: &str) -> Option<Self> {
        let (stem, rest) = text.split_once(".luks")?;
        let first = stem.bytes().next()?;
        let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if stem.len() > STEM_BYTES_MAX
            || !first.is_ascii_alphanumeric()
            || !stem.bytes().all(is_allowed)
        {
            return None;
        }
        let kind = match rest {
            "" => Kind::Container,
            ".reserve" => Kind::Reserve,
            ".new" => Kind::HalfMade,
            ".trim" => Kind::Rewrite,
            _ => {
                if let Some(number) = rest.strip_prefix(".lock.") {
                    Kind::Lease(lease_number(number)?)
                } else {
                    let (mark, token) = rest.split_once('-')?;
                    let is_hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
                    if token.len() != TOKEN_DIGITS || !token.bytes().all(is_hex) {
                        return None;
                    }
                    match mark {
                        ".new" | ".copying" => Kind::HalfMade,
                        ".trim" => Kind::Rewrite,
                        ".late" => Kind::LateList,
                        _ => return None,
                    }
                }
            }
        };
        Some(Self {
            text: text.to_owned(),
            container: format!("{stem}.luks"),
            kind,
        })
    }
}

fn lease_number(digits: &str) -> Option<u64> {
    let number: u64 = digits.parse().ok()?;
    let plain = digits.len() <= LEASE_DIGITS_MAX && digits == number.to_string();
    (plain && number > 0).then_some(number)
}

/// The number that a new lease must have, `highest` being the highest there is. A number far above
/// would leave none for those that follow.
pub fn next_lease(highest: Option<u64>) -> [u64; 2] {
    match highest {
        // sprat up to 0.x begins at 1.
        None => [FIRST_LEASE, 1],
        Some(highest) if highest < FIRST_LEASE => [FIRST_LEASE, highest + 1],
        Some(highest) => [highest + 1; 2],
    }
}

/// Whether this lease decides who may write, so that it has to stay.
pub fn lease_must_stay(number: u64, highest: Option<u64>) -> bool {
    number >= FIRST_LEASE && highest == Some(number)
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Folder,
    File(Name),
    PastFolder,
    /// The past states of a container.
    PastOf(String),
    /// One past state of a container, by its name.
    PastFile(String, String),
}

/// Finds what a client's path means. `root` is the folder's real path: a path below it is accepted,
/// so that a client's configuration stays as it was without the agent.
pub fn resolve(path: &[u8], root: &Path) -> Option<Node> {
    let path = std::str::from_utf8(path).ok()?;
    if path.contains('\0') {
        return None;
    }
    let mut parts: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    if path.starts_with('/') {
        let own: Vec<&str> = root
            .to_str()?
            .split('/')
            .filter(|part| !part.is_empty())
            .collect();
        if parts.starts_with(&own) {
            parts.drain(..own.len());
        }
    }
    match parts.as_slice() {
        [] => Some(Node::Folder),
        [PAST] => Some(Node::PastFolder),
        [PAST, container] => is_container(container).then(|| Node::PastOf((*container).to_owned())),
        [PAST, container, state] => is_container(container)
            .then(|| Node::PastFile((*container).to_owned(), (*state).to_owned())),
        [name] => Name::parse(name).map(Node::File),
        _ => None,
    }
}

/// Whether `name` is a container's.
pub fn is_container(name: &str) -> bool {
    Name::parse(name).is_some_and(|name| name.kind == Kind::Container)
}

/// The path that REALPATH answers.
pub fn shown(node: &Node) -> String {
    match node {
        Node::Folder => "/".to_owned(),
        Node::File(name) => format!("/{}", name.text),
        Node::PastFolder => format!("/{PAST}"),
        Node::PastOf(container) => format!("/{PAST}/{container}"),
        Node::PastFile(container, state) => format!("/{PAST}/{container}/{state}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_names_of_containers_and_of_their_companions_exist() {
        for name in [
            "a.luks",
            "A-b_c.d.luks",
            "a.luks.reserve",
            "a.luks.new",
            "a.luks.trim",
            "a.luks.lock.1",
            "a.luks.lock.1000001",
            "a.luks.new-0123456789abcdef",
            "a.luks.copying-0123456789abcdef",
            "a.luks.trim-0123456789abcdef",
            "a.luks.late-0123456789abcdef",
        ] {
            assert!(Name::parse(name).is_some(), "{name}");
        }
        for name in [
            "",
            ".luks",
            "a",
            ".sprat-agent",
            ".ssh",
            "authorized_keys",
            "..",
            "-a.luks",
            ".a.luks",
            "a.luks.luks",
            "a.luksx",
            "a b.luks",
            "a.luks.lock.0",
            "a.luks.lock.01",
            "a.luks.lock.",
            "a.luks.lock.99999999999999999999999",
            "a.luks.lock.123456789",
            "a.luks.moved-0123456789abcdef",
            "a.luks.new-0123456789ABCDEF",
            "a.luks.new-0123",
            "ä.luks",
            "a.luks.late",
        ] {
            assert!(Name::parse(name).is_none(), "{name}");
        }
        assert!(Name::parse(&format!("{}.luks", "x".repeat(65))).is_none());
    }

    #[test]
    fn paths_lead_into_the_folder_and_nowhere_else() {
        let root = Path::new("/srv/sprat/lap");
        let file = |path: &str| resolve(path.as_bytes(), root);
        let name = Node::File(Name::parse("x.luks").unwrap());
        for path in [
            "x.luks",
            "./x.luks",
            "/x.luks",
            "/srv/sprat/lap/x.luks",
            "//srv/sprat//lap/./x.luks",
        ] {
            assert_eq!(file(path), Some(name.clone()), "{path}");
        }
        for path in ["", ".", "/", "/srv/sprat/lap", "/srv/sprat/lap/"] {
            assert_eq!(file(path), Some(Node::Folder), "{path}");
        }
        // The root's path is removed as whole components: `lap` is no beginning of `laptop.luks`.
        for path in [
            "/srv/sprat/laptop.luks",
            "../x.luks",
            "/srv/sprat/lap/../x.luks",
            "/etc/passwd",
            "a/x.luks",
            ".sprat-agent/format",
            "/srv/sprat/lap/.sprat-agent",
            "x.luks\0",
            ".generations/..",
            "/srv",
        ] {
            assert_eq!(file(path), None, "{path}");
        }
        assert_eq!(resolve(b"\xff.luks", root), None);
    }

    #[test]
    fn a_lease_is_one_above_the_highest() {
        assert_eq!(next_lease(None), [1_000_001, 1]);
        assert_eq!(next_lease(Some(4)), [1_000_001, 5]);
        assert_eq!(next_lease(Some(1_000_007)), [1_000_008; 2]);
        assert!(
            lease_must_stay(1_000_007, Some(1_000_007))
                && !lease_must_stay(1_000_006, Some(1_000_007))
        );
        assert!(!lease_must_stay(1, Some(1)));
    }

    proptest! {
        #[test]
        fn a_path_never_leads_above_the_folder(path in "[./a-z]{0,40}") {
            if let Some(node) = resolve(path.as_bytes(), Path::new("/srv/a")) {
                prop_assert!(!shown(&node).contains(".."));
            }
        }
    }
}
