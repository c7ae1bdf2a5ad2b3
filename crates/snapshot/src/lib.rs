//! Makes, lists, checks, prunes and restores snapshots: dated folders that rsync fills on a mounted volume.
//!
//! Above: the worker process in `session`, which has mounted the volume on a folder.
//! Below: the system's `rsync`, and plain system calls on the mounted folder.
//!
//! Always true:
//! - Nothing of an older snapshot is ever changed, not even an inode: rsync writes only into a new, empty
//!   `.inflight`, and links to older files only if all attributes are equal. On a btrfs volume, it writes
//!   only into the subvolume `work`, and finished snapshots are read-only.
//! - A folder whose name is a plain date was complete and durable when it got that name.
//! - Every regular file in a `.partial` was covered by a `syncfs`, so that its files can be linked to
//!   (`checkpoint`).
//! - No output of rsync, no content of the volume and no user input causes a panic, and every list made
//!   from them is bounded.
//! - Nothing is printed, and no environment variable is read but `TZ`, for the time zone `local`.
#![forbid(unsafe_code)]

mod adopted;
mod aside;
mod attempts;
mod automounts;
mod begun;
mod cancel;
mod census;
mod change_list;
mod check;
mod checkpoint;
mod choice;
mod chosen;
mod compare;
mod completeness;
mod conflicts;
mod content;
mod disks;
mod drill;
mod error;
mod export;
mod file_listener;
mod file_system;
mod file_times;
mod foreign;
mod found;
mod job;
mod keep;
mod keep_rules;
mod large_files;
mod list;
mod listed;
mod listing;
pub mod local_file;
mod long_path;
mod moment;
mod mounts;
mod mounts_inside;
mod name;
mod name_list;
mod old_content;
mod own_places;
mod owner_names;
mod page_cache;
mod paths;
mod patterns;
mod pin;
mod preview;
mod progress;
mod protected_paths;
mod prune;
mod pulled;
mod pulled_source;
mod recent;
mod record;
mod recover;
mod reflink;
mod remove;
mod reread;
mod restore;
mod rsync;
mod scan_rules;
mod scout;
pub mod seen;
mod severity;
mod shared_inodes;
mod snapshot_path;
mod source_check;
mod source_scan;
mod sources;
mod sources_ahead;
mod spec;
mod split;
mod staged;
mod staged_file;
mod sticky_acl;
mod subvolume_ops;
mod subvolumes;
mod suspects;
mod take;
mod text;
pub mod tree;
pub mod tree_changes;
mod unfit;
mod unlinked;
mod unresponsive;
mod walk;
mod without_place;
mod work;
mod wrong_dates;
mod zone;

pub use cancel::Cancel;
pub use census::{Census, CensusSpec, keep_list};
pub use change_list::chain::{ListChain, ListedChange, Lists, path_order};
pub use check::{CheckReport, CheckSpec, CheckWhat, FilesOn, begin_known_from, check, files_on};
pub use choice::SnapshotChoice;
pub use disks::JobSources;
pub use drill::{DrillReport, DrillSpec, DrilledSnapshot, drill};
pub use error::{SnapshotError, SnapshotErrorKind, SpaceKind};
pub use export::{ExportReport, ExportSpec, Exported, export};
pub use file_listener::FileListener;
pub use file_system::FileSystem;
pub use keep::{Candidate, KeepBy, KeepDecision, KeepReason, decide, is_held};
pub use keep_rules::{KeepCount, KeepPolicy, KeepRules};
pub use list::{finished, gone_without_trace, has_only_finished, list, missing, newest};
pub use moment::{MomentError, parse_moment};
pub use name::{JobName, NameError, SnapshotName};
pub use name_list::NameList;
pub use old_content::OldContent;
pub use own_places::LocalContainer;
pub use page_cache::PageCache;
pub use paths::path_mistake;
pub use patterns::pattern_mistake;
pub use pin::{PIN_REASON_BYTES_MAX, PinReport, PinSpec, check_pin_reason, pin};
pub use preview::{Preview, preview};
pub use progress::{Phase, Progress};
pub use prune::{
    Interrupted, PruneReport, PruneSpec, Pruned, finish_deletions, prune, prune_subvolumes,
};
pub use pulled::missing_on_hosts;
pub use pulled_source::{PulledPart, PulledSource};
pub use record::{
    EntryKind, GoneDisk, LinkedFrom, RECORD_FORMAT, RunRecord, RunStats, SnapshotEntry, Warning,
};
pub use remove::{Removal, RemoveReport, RemoveSpec, remove, remove_subvolumes};
pub use restore::restore;
pub use rsync::Excluded;
pub use scan_rules::ScanRules;
pub use snapshot_path::SnapshotPath;
pub use source_check::{
    FoundChange, SourceCheckReport, SourceCheckSpec, SourceCursor, check_sources, old_content_in,
};
pub use sources::{check_source, mistakes};
pub use sources_ahead::SourcesAhead;
pub use spec::{Existing, Planned, RestoreReport, RestoreSpec, SnapshotReport, SnapshotSpec};
pub use staged::{stage, unstage};
pub use staged_file::StagedFile;
pub use subvolume_ops::{InodeFacts, InodeVersion, Subvolumes};
pub use take::{count, take, take_into_subvolume};
pub use text::{escape_name, unescape_name};
pub use walk::Listed;
pub use zone::{LOCAL_ZONE, ZoneError, time_zone};
