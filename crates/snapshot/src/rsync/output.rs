//! Parses rsync's stdout: progress lines, the counts at its end, and itemized changes.

use crate::progress::{Phase, Progress};
use crate::record::RunStats;

/// Parses a progress line of `--info=progress2 --no-human-readable`, such as `   20971520  99%
/// 868.21MB/s    0:00:00 (xfr#3, to-chk=7/18)`. The part in parentheses is present only when a file is
/// finished.
pub(crate) fn parse_progress(line: &str, before: &Progress) -> Option<Progress> {
    let mut words = line.split_whitespace();
    let bytes_done = words.next()?.parse().ok()?;
    let percent = words
        .next()?
        .strip_suffix('%')?
        .parse::<u8>()
        .ok()?
        .min(100);
    let bytes_per_s = parse_rate(words.next()?)?;
    words.next().filter(|time| time.contains(':'))?;
    let mut now = Progress {
        phase: Phase::Copying,
        bytes_done,
        percent: Some(percent),
        bytes_per_s: Some(bytes_per_s),
        ..*before
    };
    for word in words {
        let word = word.trim_matches(|c| c == '(' || c == ')' || c == ',');
        let Some((what, counts)) = word.split_once('=') else {
            continue;
        };
        let counts = counts
            .split_once('/')
            .and_then(|(left, all)| Some((left.parse::<u64>().ok()?, all.parse::<u64>().ok()?)));
        if let Some((left, all)) = counts.filter(|_| matches!(what, "to-chk" | "ir-chk")) {
            now.files_found = all;
            now.files_done = all.saturating_sub(left);
            now.all_found = what == "to-chk";
        }
    }
    Some(now)
}

/// Parses `868.21MB/s`. rsync uses powers of 1024 here, whatever its options.
fn parse_rate(word: &str) -> Option<u64> {
    let word = word.strip_suffix("B/s")?;
    let (number, unit) = match word.as_bytes().last()? {
        b'k' | b'K' => (&word[..word.len() - 1], 10),
        b'M' => (&word[..word.len() - 1], 20),
        b'G' => (&word[..word.len() - 1], 30),
        b'T' => (&word[..word.len() - 1], 40),
        _ => (word, 0),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let whole: u64 = whole.parse().ok()?;
    let hundredths: u64 = part.get(..2).unwrap_or(part).parse().ok()?;
    let scale = 1u64 << unit;
    whole
        .checked_mul(scale)?
        .checked_add(hundredths.checked_mul(scale)? / 100)
}

/// Parses one line of the counts of `--info=stats2`. Returns whether it was one.
pub(crate) fn take_stat(line: &str, stats: &mut RunStats) -> bool {
    let Some((what, value)) = line.split_once(": ") else {
        return false;
    };
    let number = |text: &str| -> Option<u64> {
        let digits: String = text
            .trim_start()
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == ',')
            .filter(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    };
    let Some(count) = number(value) else {
        return false;
    };
    // `18 (reg: 6, dir: 11, link: 1)`
    let regular = value.split_once("reg: ").and_then(|(_, rest)| number(rest));
    let field = match what {
        "Number of files" => {
            stats.regular_files = regular.unwrap_or(0);
            &mut stats.files
        }
        "Number of created files" => {
            stats.created_regular = regular.unwrap_or(0);
            &mut stats.created
        }
        "Number of deleted files" => &mut stats.deleted,
        "Number of regular files transferred" => &mut stats.transferred,
        "Total file size" => &mut stats.bytes_total,
        "Total transferred file size" => &mut stats.bytes_transferred,
        "Literal data" => &mut stats.bytes_literal,
        "Matched data" => &mut stats.bytes_matched,
        _ => return false,
    };
    *field = count;
    true
}

/// Whether a line of `--out-format='%i %n%L'` reports a change.
pub(crate) fn is_change(line: &str) -> bool {
    let mut flags = line.bytes();
    match flags.next() {
        Some(b'*') => line.starts_with("*deleting"),
        Some(b'<' | b'>' | b'c' | b'h' | b'.') => {
            matches!(flags.next(), Some(b'f' | b'd' | b'L' | b'D' | b'S'))
                && line.split(' ').next().is_some_and(|flags| flags.len() >= 9)
        }
        _ => false,
    }
}

/// The format that [`parse_item`] parses: what was done, the file's time in UTC, its length in bytes,
/// its name.
pub(crate) const ITEM_FORMAT: &str = "--out-format=%i %M %l %n";

/// A file in a line of [`ITEM_FORMAT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named<'l> {
    /// `2026/11/28-15:28:34`.
    pub(crate) modified: &'l str,
    /// Its length.
    pub(crate) bytes: u64,
    /// The name relative to the root, escaped by rsync.
    pub(crate) name: &'l str,
}

/// The meaning of a line of [`ITEM_FORMAT`] about a regular file that is new in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Item<'l> {
    /// Its content came from the source.
    Written(Named<'l>),
    /// Its content came from an older snapshot, because only attributes changed.
    CopiedFromOlder {
        /// The name relative to the root, escaped by rsync.
        name: &'l str,
    },
    /// Another name of a file that was listed before. After this run it may be the only name left.
    Linked(Named<'l>),
    /// A folder, a symbolic link, or another kind of file.
    Other,
}

/// Splits a line of [`ITEM_FORMAT`] into flags and file.
fn parts(line: &str) -> Option<(&str, Named<'_>)> {
    let (flags, rest) = line.split_once(' ')?;
    if !is_change(flags) {
        return None;
    }
    let (modified, rest) = rest.split_once(' ')?;
    let is_time = modified.len() == "2026/11/28-15:28:34".len() && modified.contains('/');
    let (bytes, name) = rest.split_once(' ').filter(|_| is_time)?;
    let named = Named {
        modified,
        bytes: bytes.parse().ok()?,
        // The sending side prints the name as it was given, with a leading slash.
        name: name.trim_start_matches('/'),
    };
    Some((flags, named))
}

/// An object of any kind in a line of [`ITEM_FORMAT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'l> {
    /// It is a regular file.
    pub(crate) is_file: bool,
    /// The name of a folder ends with a slash.
    pub(crate) named: Named<'l>,
}

/// Parses a line of [`ITEM_FORMAT`] about an object that the destination lacks.
pub(crate) fn parse_entry(line: &str) -> Option<Entry<'_>> {
    let (flags, named) = parts(line)?;
    let is_file = flags.as_bytes().get(1) == Some(&b'f');
    Some(Entry { is_file, named })
}

/// The name in a line of [`ITEM_FORMAT`], relative to the root, escaped by rsync.
pub(crate) fn item_name(line: &str) -> Option<&str> {
    parts(line).map(|(_, named)| named.name)
}

/// The difference between an object of the source and what a snapshot has at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Difference<'l> {
    /// The snapshot has nothing of this kind there. The name is relative to the root, escaped by rsync.
    Missing(&'l str),
    /// It is a symbolic link with another target, or another device.
    Other(&'l str),
}

/// Parses a line of [`ITEM_FORMAT`] from a dry run that compared two trees. `None` for files and folders
/// that exist in both: rsync has compared no content.
pub(crate) fn parse_difference(line: &str) -> Option<Difference<'_>> {
    let (flags, named) = parts(line)?;
    match flags.as_bytes() {
        [_, _, marks @ ..] if marks.contains(&b'+') => Some(Difference::Missing(named.name)),
        [b'c', b'L' | b'D' | b'S', ..] => Some(Difference::Other(named.name)),
        _ => None,
    }
}

/// Parses a line of [`ITEM_FORMAT`].
pub(crate) fn parse_item(line: &str) -> Option<Item<'_>> {
    let (flags, named) = parts(line)?;
    Some(match flags.as_bytes() {
        [b'<' | b'>', b'f', ..] => Item::Written(named),
        [b'h', b'f', ..] => Item::Linked(named),
        // With `+` rsync created an empty file.
        [b'c', b'f', marks @ ..] if !marks.contains(&b'+') => {
            Item::CopiedFromOlder { name: named.name }
        }
        _ => Item::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn progress_lines_are_parsed() {
        let start = Progress::begin(Phase::Copying);
        let line = "       20971520  99%  868.21MB/s    0:00:00 (xfr#3, ir-chk=7/18) ";
        let now = parse_progress(line, &start).unwrap();
        assert_eq!(now.bytes_done, 20_971_520);
        assert_eq!(now.percent, Some(99));
        assert_eq!(now.bytes_per_s, Some(868 * (1 << 20) + (21 << 20) / 100));
        assert_eq!(
            (now.files_done, now.files_found, now.all_found),
            (11, 18, false)
        );
        let next = parse_progress("      32768   0%    0.00kB/s    0:00:00  ", &now).unwrap();
        assert_eq!((next.bytes_done, next.files_found), (32768, 18));
        assert!(parse_progress("Number of files: 18 (reg: 6)", &start).is_none());
    }

    #[test]
    fn counts_are_parsed_with_and_without_separators() {
        let mut stats = RunStats::default();
        assert!(take_stat(
            "Number of files: 1,018 (reg: 1,006, dir: 11, link: 1)",
            &mut stats
        ));
        assert!(take_stat("Total file size: 20971534 bytes", &mut stats));
        assert!(!take_stat("sent 1 bytes  received 2 bytes", &mut stats));
        assert_eq!((stats.files, stats.regular_files), (1018, 1006));
        assert_eq!(stats.bytes_total, 20_971_534);
    }

    #[test]
    fn itemized_changes_are_distinguished_from_other_lines() {
        for line in [
            ">f+++++++++ a",
            "cd+++++++++ d/",
            "*deleting   x",
            ".d..t...... d/",
            "cS+++++++++ s",
        ] {
            assert!(is_change(line), "{line}");
        }
        for line in ["", "Number of files: 1", "sent 1 bytes", "*x"] {
            assert!(!is_change(line), "{line}");
        }
    }

    #[test]
    fn items_are_parsed() {
        let name = "home/a b";
        let modified = "2026/11/28-15:28:34";
        let line = |flags: &str| format!("{flags} {modified} 9663676416 /{name}");
        let named = Named {
            modified,
            bytes: 9 << 30,
            name,
        };
        assert_eq!(parse_item(&line(">f+++++++++")), Some(Item::Written(named)));
        assert_eq!(
            parse_item(&line("cf...p.....")),
            Some(Item::CopiedFromOlder { name })
        );
        assert_eq!(parse_item(&line("hf+++++++++")), Some(Item::Linked(named)));
        for other in ["cd+++++++++", "cL+++++++++"] {
            assert_eq!(parse_item(&line(other)), Some(Item::Other), "{other}");
        }
        let differs = |flags: &str| parse_difference(&line(flags)).map(|it| format!("{it:?}"));
        for (flags, wanted) in [
            (">f+++++++++", Some("Missing")),
            ("hf+++++++++", Some("Missing")),
            ("cd+++++++++", Some("Missing")),
            ("cLc.T......", Some("Other")),
            (">f.sT......", None),
            (".d..t......", None),
            ("*deleting  ", None),
        ] {
            let wanted = wanted.map(|what| format!("{what}({name:?})"));
            assert_eq!(differs(flags), wanted, "{flags}");
        }
        for none in [
            "Number of files: 1",
            "",
            ">f+++++++++ name",
            ">f+++++++++ 2026/11/28-15:28:34 x /n",
            "sent 1 bytes",
        ] {
            assert_eq!(parse_item(none), None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_the_readers_panic(line in "[ -~é%:()/=,.kMB]{0,60}") {
            let _ = parse_progress(&line, &Progress::begin(Phase::Copying));
            let _ = take_stat(&line, &mut RunStats::default());
            let _ = is_change(&line);
            let _ = parse_item(&line);
            let _ = parse_difference(&line);
        }
    }
}
