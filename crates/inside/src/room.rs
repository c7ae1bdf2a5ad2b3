//! How large an answer may be.

use sprat_snapshot::seen::Found;

/// How many files and folders an answer describes. A path of several versions counts once for each.
pub const ANSWER_ENTRIES_MAX: usize = 200_000;
/// How long their paths and the targets of links may be together. The processes of a session exchange at
/// most 256 MiB at once.
const ANSWER_BYTES_MAX: usize = 32 << 20;

/// How much more an answer may describe.
#[derive(Debug)]
pub(crate) struct Room {
    entries: usize,
    bytes: usize,
}

impl Room {
    pub(crate) fn new() -> Self {
        Self {
            entries: ANSWER_ENTRIES_MAX,
            bytes: ANSWER_BYTES_MAX,
        }
    }

    /// Whether one more path fits, with all that is described of it.
    pub(crate) fn takes<'f>(
        &mut self,
        path: &str,
        described: impl IntoIterator<Item = &'f Found>,
    ) -> bool {
        let (mut entries, mut bytes) = (0, path.len());
        for found in described {
            entries += 1;
            bytes += found.link.as_ref().map_or(0, String::len);
        }
        let fits = self.entries >= entries && self.entries > 0 && self.bytes >= bytes;
        if fits {
            self.entries -= entries;
            self.bytes -= bytes;
        } else {
            // Nothing shorter may follow: a list with gaps would mislead.
            self.entries = 0;
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sprat_snapshot::seen::Kind;

    fn link(bytes: usize) -> Found {
        Found {
            kind: Kind::Link,
            bytes: 0,
            mode: 0o777,
            user: 0,
            group: 0,
            modified: jiff::Timestamp::UNIX_EPOCH,
            link: Some("x".repeat(bytes)),
            device: None,
        }
    }

    #[test]
    fn versions_and_targets_of_links_need_room() {
        let short = link(1);
        let mut room = Room::new();
        assert!(room.takes("/a", std::iter::repeat_n(&short, ANSWER_ENTRIES_MAX - 1)));
        assert!(!room.takes("/b", [&short, &short]));
        assert!(!room.takes("/c", [&short]), "a list with gaps");

        let long = link(ANSWER_BYTES_MAX / 2);
        let mut room = Room::new();
        assert!(room.takes("/a", [&long]));
        assert!(!room.takes("/b", [&long]));
    }
}
