//! Makes, lists and restores snapshots: dated folders that rsync fills on a mounted volume.
//!
//! Above: the worker process in `cli`, which has the volume mounted at a folder.
//! Below: the system's `rsync`, and the mounted folder through plain system calls.
//!
//! Always true:
//! - Nothing of an older snapshot, inodes included, is ever written to: rsync runs only into a new,
//!   empty `.inflight`, and links to older files only where every attribute is equal.
//! - A folder whose name is a plain date was whole and durable when it got that name.
//! - A `.partial` holds no regular file that was not covered by a `syncfs`, so its files may be
//!   trusted as link targets (`checkpoint`).
//! - What rsync prints, what lies on the volume and what the user names never panics, and every
//!   list made from it is bounded.
//! - Nothing is printed, and no environment variable is read.
#![forbid(unsafe_code)]

mod aside;
mod attempts;
mod automounts;
mod begun;
mod by_hand;
mod check;
mod checkpoint;
mod compare;
mod disks;
mod error;
mod file_system;
mod foreign;
mod in_the_way;
mod job;
mod keep;
mod list;
mod listing;
mod long_path;
mod mounts;
mod mounts_inside;
mod name;
mod own_places;
mod patterns;
mod prune;
mod recent;
mod record;
mod reread;
mod restore;
mod rsync;
mod scout;
mod sources;
mod spared;
mod spec;
mod split;
mod subvolumes;
mod suspects;
mod take;
mod text;
mod unfit;
mod unlinked;
mod walk;
mod wholeness;

pub use check::{CheckReport, CheckSpec, CheckWhat, FilesOn, begin_known_from, check, files_on};
pub use disks::GoneDisk;
pub use error::{ErrorReport, SnapshotError, SnapshotErrorKind, SpaceKind};
pub use file_system::FileSystem;
pub use keep::{Candidate, KeepReason, KeepRules, Verdict, decide};
pub use list::{list, missing, newest};
pub use name::{JobName, NameError, SnapshotName};
pub use patterns::pattern_mistake;
pub use prune::{Interrupted, PruneReport, PruneSpec, Pruned, prune};
pub use record::{
    EntryKind, LinkedFrom, NameList, RECORD_FORMAT, RunRecord, RunStats, SnapshotEntry, Warning,
};
pub use restore::restore;
pub use sources::{check_source, mistakes};
pub use spec::{
    Cancel, LocalContainer, Phase, Progress, RestoreReport, RestoreSpec, SnapshotReport,
    SnapshotSpec,
};
pub use take::take;
pub use text::{escape_name, unescape_name};
