//! A session: one container, open, from a lock to a durable end; and what this machine knows of it.
//!
//! Above: `cli`. Below: `snapshot`, `attach`, `luks`, `volume`, `store`.
//!
//! Three processes share a session. S is the command itself; V (`volume_process`) holds the connection,
//! the lease, the key and the volume, and serves it over FUSE; W (`worker`) holds the mounts in
//! namespaces of its own and runs rsync. Whichever dies, the other two end.
//!
//! Always true:
//! - The key and the plaintext stay in V, the mounts in W, and S starts both.
//! - Success is returned only after everything is durable on the server.
//! - Whatever goes wrong ends as one [`Failure`] with one of the exit codes of [`Exit`].
#![forbid(unsafe_code)]

pub mod address;
mod beside;
pub mod child_tree;
pub mod closed_container;
pub mod connect;
pub mod copy;
pub mod day_part;
pub mod diagnosis;
pub mod failure;
mod file_system;
pub mod files;
pub mod generations;
pub mod interrupt;
pub mod json;
mod limits;
pub mod message_bus;
pub mod mount_point;
pub mod progress;
mod protocol;
mod server_probe;
mod session;
mod settings;
pub mod ssh_config;
pub mod state;
pub mod status;
mod supervisor;
pub mod survey;
pub mod text;
pub mod trusted_file;
pub mod upload_rates;
pub mod volume_process;
pub mod worker;

pub use failure::{Exit, Failure};
pub use file_system::inodes::file_room_texts;
pub use file_system::{
    FileSystemCheck, FileSystemKind, FileSystemState, file_system_bytes, read_stamp_block,
};
pub use limits::check_limits;
pub use protocol::messages::{TrimHow, Worthwhile};
pub use protocol::reports::{
    ClosedReport, ContainerFacts, Created, HeaderChanged, Measure, NotCompared, Notice, Observer,
    Phase, SessionProgress, TrimReport, TrimRoute, VolumeRoom, VolumeStats, free_text,
};
pub use session::inside::Stopper;
pub use session::preview::preview;
pub use session::{Session, check, check_file_system, drill};
pub use settings::{
    Access, CONNECTIONS, CreateOptions, IdentityPolicy, Mode, SIZE_BYTES_MIN, SessionSettings,
    SshOptions, TAKEOVER_QUIET_TIMES,
};
pub use sprat_attach::{ChildIdentity, clock_is_synchronised, idle_io, set_child_identity};
pub use supervisor::background::{MountRecord, explain_lock, mounted_at};
pub use supervisor::create::{NotCreated, Show, create, create_and_show};
pub use supervisor::keys::{HeaderChange, change_header};
pub use supervisor::make_reserves;
pub use supervisor::mount::{mount, unmount};
pub use supervisor::resize::{Resized, grow, shrink};
pub use supervisor::trim::trim;
pub use supervisor::unlock::{DoorWay, UnlockWish, Unlocked, unlock};
