//! Checks a job's exclude patterns before a run. rsync accepts any text as a pattern, and if one can
//! match nothing, files that the user wants to exclude are in the snapshot.

use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::error::SnapshotError;
use crate::spec::SnapshotSpec;
use crate::text::{escape_name, escape_path};

/// The largest accepted file. A larger one is not a list of patterns.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Some editors write it at the beginning of a file. rsync reads it as a part of the first pattern.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// Why a pattern is invalid, or can match no file.
#[must_use]
pub fn pattern_mistake(pattern: &str) -> Option<&'static str> {
    invalid(pattern).or_else(|| never_matches(pattern))
}

fn invalid(pattern: &str) -> Option<&'static str> {
    if pattern.is_empty() {
        Some("it is empty")
    } else if pattern == "!" {
        Some("it would clear the list of patterns")
    } else if pattern.contains(['\n', '\0']) {
        Some("it has a newline or NUL in it")
    } else {
        None
    }
}

/// Why a pattern can match no file. No shell expands it, and rsync compares it with the names as they
/// are (man page, PATTERN MATCHING RULES).
fn never_matches(pattern: &str) -> Option<&'static str> {
    if pattern.starts_with(BYTE_ORDER_MARK) {
        return Some("it begins with a byte order mark, so it matches nothing");
    }
    // rsync reads the old forms of a rule in a pattern, too.
    let pattern = pattern
        .strip_prefix("- ")
        .or_else(|| pattern.strip_prefix("+ "))
        .unwrap_or(pattern);
    if pattern == "~" || pattern.starts_with("~/") {
        return Some("'~' is not expanded here, so it matches nothing; write the full path");
    }
    if pattern.starts_with("$HOME") || pattern.starts_with("${") {
        return Some("variables are not expanded here, so it matches nothing; write the full path");
    }
    // A trailing "/." is such a name, too.
    if pattern.split('/').any(|name| name == "." || name == "..") {
        return Some("no file is named '.' or '..', so it matches nothing; omit that part");
    }
    None
}

/// All invalid patterns on the command line and in the config.
pub(crate) fn refused(spec: &SnapshotSpec) -> impl Iterator<Item = SnapshotError> {
    let refused = |pattern: &String, why| SnapshotError::PatternRefused {
        why,
        pattern: escape_name(pattern.as_bytes()),
    };
    let patterns = spec.excludes.iter();
    let patterns =
        patterns.filter_map(move |pattern| Some(refused(pattern, pattern_mistake(pattern)?)));
    let is_name = |name: &&String| {
        let special = matches!(name.as_str(), "" | "." | "..");
        !special && !name.contains(['/', '\0'])
    };
    let markers = spec.scan.if_present.iter();
    let markers = markers.filter(move |name| !is_name(name));
    let why = "it can't be the name of a file: exclude_if_present takes a name without a folder";
    patterns.chain(markers.map(move |name| refused(name, why)))
}

/// All invalid lines in files of patterns. Files that can't be read are skipped: their job reports them.
pub(crate) fn refused_lines(spec: &SnapshotSpec) -> impl Iterator<Item = SnapshotError> {
    spec.exclude_from
        .iter()
        .filter_map(|file| check_text(file, &read_plain(file).ok()?).err())
}

/// Checks all patterns of a job, including those in files.
pub(crate) fn check(spec: &SnapshotSpec) -> Result<(), SnapshotError> {
    if let Some(refused) = refused(spec).next() {
        return Err(refused);
    }
    spec.exclude_from
        .iter()
        .try_for_each(|file| check_file(file))
}

fn check_file(file: &Path) -> Result<(), SnapshotError> {
    let failed = |source| SnapshotError::PatternFile {
        path: escape_path(file),
        source,
    };
    if !file.is_absolute() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "the path must be absolute");
        return Err(failed(error));
    }
    check_text(file, &read_plain(file).map_err(failed)?)
}

fn check_text(file: &Path, text: &[u8]) -> Result<(), SnapshotError> {
    // rsync ends a pattern at either character (exclude.c, parse_filter_file).
    let lines = text.split(|byte| matches!(byte, b'\n' | b'\r'));
    for (index, line) in lines.enumerate() {
        let pattern = String::from_utf8_lossy(line);
        if line == b"!" {
            // It would clear sprat's own patterns, too, and the container file would be in its own
            // snapshot.
            return Err(SnapshotError::PatternRefused {
                pattern: format!("! in {}", escape_path(file)),
                why: "it would clear the list of patterns. Remove this line, and the patterns before it \
                      that you don't want",
            });
        }
        if pattern.starts_with(['#', ';']) {
            continue;
        }
        if let Some(why) = never_matches(&pattern) {
            return Err(SnapshotError::PatternLineRefused {
                path: escape_path(file),
                line: text_line(text, index),
                pattern: escape_name(line),
                why,
            });
        }
    }
    Ok(())
}

/// The line number, as an editor counts, of the pattern number `index`. Lines end with `\n`, `\r\n` or
/// `\r`.
fn text_line(text: &[u8], index: usize) -> usize {
    let mut ends = 0;
    let mut line = 1;
    for (at, byte) in text.iter().enumerate() {
        if ends == index {
            break;
        }
        if matches!(byte, b'\n' | b'\r') {
            ends += 1;
            let first_of_two = *byte == b'\r' && text.get(at + 1) == Some(&b'\n');
            line += usize::from(!first_of_two);
        }
    }
    line
}

/// The patterns in a file, one for each line that is no comment, as rsync reads them.
pub(crate) fn lines_of(file: &Path) -> Result<Vec<Vec<u8>>, SnapshotError> {
    let text = read_plain(file).map_err(|source| SnapshotError::PatternFile {
        path: escape_path(file),
        source,
    })?;
    let lines = text.split(|byte| matches!(byte, b'\n' | b'\r'));
    let patterns =
        lines.filter(|line| !line.is_empty() && !line.starts_with(b"#") && !line.starts_with(b";"));
    Ok(patterns.map(<[u8]>::to_vec).collect())
}

/// Reads a regular file. Never waits for the writer of a pipe: the run would hang, and rsync would find
/// the pipe empty afterwards.
fn read_plain(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // Checked first: opening a device may have side effects.
    let refused = || io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
    if !std::fs::metadata(path)?.is_file() {
        return Err(refused());
    }
    let file = std::fs::File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(refused());
    }
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)?;
    if u64::try_from(text.len()).is_ok_and(|length| length > FILE_BYTES_MAX) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is larger than 16 MiB, too large for a list of patterns",
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_that_match_nothing_are_refused() {
        for pattern in [
            "",
            "!",
            "a\nb",
            "~",
            "~/.cache",
            "- ~/.cache",
            "$HOME/x",
            "${HOME}/x",
            "./x",
            "a/./b",
            "a/..",
            "../a",
            "/a/.",
            "\u{feff}*.tmp",
        ] {
            assert!(pattern_mistake(pattern).is_some(), "{pattern}");
        }
        for pattern in [
            "*.tmp",
            "/home/*/.cache/",
            "~backup",
            "a~",
            "*~",
            ".cache/",
            "...",
            "$RECYCLE.BIN",
            "+ /a/***",
            "- b",
        ] {
            assert_eq!(pattern_mistake(pattern), None, "{pattern}");
        }
    }

    #[test]
    fn lines_are_counted_like_an_editor_does() {
        assert_eq!(text_line(b"a\r\nb\r\nc", 4), 3);
        assert_eq!(text_line(b"a\nb\nc", 2), 3);
        assert_eq!(text_line(b"a\nb", 0), 1);
    }
}
