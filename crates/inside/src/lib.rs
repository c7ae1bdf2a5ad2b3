//! Reads the snapshots of a mounted volume: lists folders, finds paths, compares, and reads files.
//!
//! Above: the worker process in `session`, which has mounted the volume; `run` shows the answers as text.
//! Below: `snapshot`, which opens a snapshot's folders.
//!
//! Always true:
//! - Nothing is written to the volume, and no symbolic link in it is followed.
//! - A file that two snapshots share is not examined twice: the number of its inode shows that it is one
//!   file. The content of a file is read by [`cat()`] only.
//! - Every answer is bounded. What does not fit is counted.
#![forbid(unsafe_code)]

mod analyze;
mod answer;
mod cat;
mod diff;
mod find;
mod list;
mod matching;
mod offline;
mod pattern;
mod room;
mod size;
mod source;
mod versions;

pub use analyze::{
    AnalyzeReport, AnalyzeSpec, FolderCost, PathCost, Removal, SharedSpace, SnapshotCost, SpaceTop,
    analyze,
};
pub use answer::Place;
pub use cat::{CatSpec, cat};
pub use diff::{DiffReport, DiffSpec, Difference, Side, Sum, Sums, diff};
pub use find::{FindReport, FindSpec, PathHistory, SearchedJob, find};
pub use list::{ListSpec, Listing, ListingEntry, list};
pub use matching::matching;
pub use offline::{diff_in_lists, find_in_lists, versions_in_lists};
pub use pattern::{Pattern, PatternError};
pub use room::ANSWER_ENTRIES_MAX;
pub use size::{FolderSize, SizeSpec, size};
pub use source::{SourceDiffSpec, diff_source};
pub use sprat_snapshot::seen::{Change, Found, Kind};
pub use versions::{Gone, Version, VersionsReport, VersionsSpec, versions};
