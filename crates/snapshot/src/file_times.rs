//! Times of files that ext4 can't store: those before 1901-12-13 20:45:52 and after 2446-05-10 22:38:54 UTC.
//!
//! The kernel replaces them by the nearest time that it can store, without an error. rsync then finds another time in
//! each run, and copies the file again.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// linux/fs/ext4/ext4.h: `EXT4_TIMESTAMP_MIN` and `EXT4_EXTRA_TIMESTAMP_MAX`.
const FIRST_S: i64 = i32::MIN as i64;
const LAST_S: i64 = (1 << 34) - 1 + FIRST_S;

/// Whether this may be a time that can't be stored: one in rsync's `%M`.
pub(crate) fn may_be_beyond(time: &str) -> bool {
    // The years of the limits, too. Later ones have five digits or more.
    time.find('/') != Some(4) || !("1902".."2446").contains(&time)
}

/// Whether it may be another time that could not be stored.
pub(crate) fn is_limit(kept: &Metadata) -> bool {
    matches!(kept.mtime(), FIRST_S | LAST_S) && kept.mtime_nsec() == 0
}

/// Whether a file of ext4 has the time of its source, or the nearest one that can be stored.
pub(crate) fn is_same(source: &Metadata, kept: &Metadata) -> bool {
    let (seconds, nanoseconds) = (source.mtime(), source.mtime_nsec());
    let stored = match seconds {
        ..=FIRST_S => (FIRST_S, 0),
        LAST_S.. => (LAST_S, 0),
        _ => (seconds, nanoseconds),
    };
    (kept.mtime(), kept.mtime_nsec()) == stored
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_may_not_fit_are_found_in_the_text_of_rsync() {
        for time in [
            "1601/01/01-00:00:00",
            "1901/12/13-20:45:51",
            "2446/05/10-22:38:55",
            "12000/01/01-00:00:00",
        ] {
            assert!(may_be_beyond(time), "{time}");
        }
        for time in [
            "1902/01/01-00:00:00",
            "1970/01/01-00:00:00",
            "2026/11/30-08:00:00",
            "2445/12/31-23:59:59",
        ] {
            assert!(!may_be_beyond(time), "{time}");
        }
    }
}
