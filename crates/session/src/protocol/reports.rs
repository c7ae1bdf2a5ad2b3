//! What a session reports while it runs and when it ends.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sprat_luks::Pins;
use sprat_snapshot::SnapshotName;

use crate::Exit;
use crate::file_system::FileSystemKind;
pub use crate::file_system::{VolumeRoom, free_text};

/// What a session does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Connecting to the server.
    Connecting,
    /// Acquiring the lease.
    Locking,
    /// Deriving the key and opening a key slot.
    Unlocking,
    /// Making the header and the file.
    Creating,
    /// Making the file system.
    MakingFileSystem,
    /// FUSE, loop device, ext4; replays the journal of a crashed session.
    Mounting,
    /// What the session was opened for.
    Working,
    /// Ended early on request: cleaning up in order.
    Stopping,
    /// The server has no space left. The session ends in order.
    StoppingFull,
    /// Asking the file system what it does not need.
    Collecting,
    /// Making holes in the container file.
    Punching,
    /// Rewriting the container on the server.
    Rewriting,
    /// Growing the file system.
    Growing,
    /// Shrinking the file system.
    Shrinking,
    /// Unmounting.
    Unmounting,
    /// Sending what is left and waiting for the server's fsync.
    Syncing,
    /// Reading a new container's header back and giving it its name.
    Publishing,
}

/// What the user should know. A notice does not stop the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// One of the header's two copies is damaged; the other was used.
    HeaderCopyDamaged {
        /// Which one, in words.
        copy: String,
    },
    /// This machine does not know the container, so the header was trusted as it is.
    TrustedOnce {
        /// To be compared with the recovery sheet.
        fingerprint: String,
    },
    /// The lease of a session that died on this machine was taken over.
    TookOverDeadSession,
    /// Bytes that a dead session had in flight; they are read back before success.
    Suspects {
        /// Their sum.
        bytes: u64,
    },
    /// A write session of this machine died; what it left is read through a local journal replay.
    DeadSessionLeftLock,
    /// Another host has the lease, and the user chose to read anyway.
    LockIgnored {
        /// The host with the lease.
        holder: String,
    },
    /// The container was written to since this machine last closed it. Nothing that this
    /// machine kept of it is used.
    CacheOutdated,
    /// Another machine wrote to the container since this machine last closed it.
    WrittenElsewhere,
    /// The newest snapshots that this machine saw are not in the container any more.
    SnapshotsGone {
        /// `JOB/SNAPSHOT`.
        snapshots: Vec<String>,
    },
    /// The container is older than this machine knows it, and the user accepts that.
    OlderStateAccepted,
    /// Writes of a session may have been overwritten late, and can't be compared.
    NotCompared(NotCompared),
    /// The list of what this session wrote can't be left beside the container.
    NotListed {
        /// Why.
        reason: String,
    },
    /// Blocks were overwritten late. Files that are known by name follow.
    Overwritten {
        /// How many.
        blocks: u64,
        /// `JOB/SNAPSHOT/path`, escaped.
        files: Vec<String>,
    },
    /// This machine's state about the container can't be saved in the state folder.
    NotNoted {
        /// Why.
        reason: String,
    },
    /// Little space is left on the server.
    ServerSpaceLow {
        /// What this account may still write.
        available_bytes: u64,
    },
    /// A container may become larger than what is free on the server.
    MoreThanServerHas {
        /// What this account may still write.
        available_bytes: u64,
        /// How large the container may become.
        size_bytes: u64,
    },
    /// The super block of the file system is damaged. Its copy was used.
    SuperBlockRestored,
    /// Little space, or few inodes, are left in the volume.
    VolumeSpaceLow {
        /// For files' content.
        available_bytes: u64,
        /// For files, if their number is limited.
        inodes: Option<u64>,
        /// For metadata, if it has space of its own.
        metadata_bytes: Option<u64>,
    },
    /// The server's disk is full. The reserve file beside the container was removed to continue.
    ReserveGivenUp,
    /// The server can't fsync, and the user allowed that.
    NoDurableFlush,
    /// The server can't make a rename or lock durable (no fsync of folders).
    NoFolderFlush,
    /// The account may not remove files.
    NothingRemoved,
    /// The server's file system has no sparse files: a new container takes its whole size at once.
    HolesFilled {
        /// That size.
        size_bytes: u64,
    },
    /// The process's memory could not be locked or marked as an I/O path.
    NotHardened {
        /// What and why.
        reason: String,
    },
    /// The lease could not be released at the end. All data is durable.
    LockLeft {
        /// Why.
        reason: String,
    },
    /// This machine could not keep a copy of a new container's header.
    HeaderNotKept {
        /// Why.
        reason: String,
    },
    /// The header that this machine had kept has key slots that the current header lacks, or that
    /// differ there. Both are kept.
    SlotsDiffer {
        /// Slots that are gone, or that the current header describes differently.
        gone: Vec<u32>,
        /// Slots whose areas have other bytes.
        slots: Vec<u32>,
        /// The file with the old slots.
        kept: PathBuf,
        /// The file of the current header.
        newest: PathBuf,
    },
    /// Key slots whose areas differ from the header that this machine keeps.
    SlotAreasDiffer {
        /// Their numbers.
        slots: Vec<u32>,
    },
    /// A method to free space does not work here, and the next one is tried.
    TrimRoutePassed {
        /// Which one, and why.
        reason: String,
    },
    /// How much of a dead session's in-doubt writes was read and written again.
    Settling {
        /// Bytes that are done.
        done_bytes: u64,
        /// Bytes in all.
        whole_bytes: u64,
    },
    /// The server may still carry out writes of a lost connection. Their replacements, and the end of
    /// the run, wait for this time at most.
    LateWrites {
        /// Seconds.
        wait_s: u64,
    },
    /// The connection was lost, or an attempt to reconnect failed. The session reconnects.
    LineLost {
        /// Why.
        reason: String,
    },
    /// The connection is back.
    LineBack {
        /// Seconds without a connection.
        away_s: u64,
    },
}

/// The volume's statistics at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStats {
    /// Bytes read from the store since the session began.
    pub read_bytes: u64,
    /// Bytes written to the store since the session began.
    pub written_bytes: u64,
    /// Read requests.
    pub read_requests: u64,
    /// Write requests.
    pub write_requests: u64,
    /// Bytes that wait to be sent.
    pub dirty_bytes: u64,
    /// Bytes sent or waiting that no fsync covers yet.
    pub unsynced_bytes: u64,
    /// Lost connections so far.
    pub losses: u64,
    /// How long the connection has been lost.
    pub reconnecting_ms: Option<u64>,
    /// Estimated round trip.
    pub round_trip_us: Option<u64>,
}

/// What is reported while a session works.
#[derive(Debug, Clone, Default)]
pub struct SessionProgress {
    /// rsync's side, while it runs.
    pub rsync: Option<sprat_snapshot::Progress>,
    /// The connection's side.
    pub volume: VolumeStats,
}

/// Receives what a session reports. Called on the session's own thread; must not block.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase);
    /// Newer statistics.
    fn progress(&mut self, progress: &SessionProgress);
    /// A notice for the user.
    fn notice(&mut self, notice: Notice);
    /// Whether each file is wanted that a backup copies.
    fn wants_files(&self) -> bool {
        false
    }
    /// A backup copies the content of this file: its path, escaped, relative to the snapshot.
    fn copied(&mut self, _path: &str) {}
}

/// The newest snapshot of each job: job, snapshot.
pub type Newest = BTreeMap<String, String>;

/// The finished snapshots of each job, oldest first.
pub type Finished = BTreeMap<String, Vec<SnapshotName>>;

/// What the volume process found at the target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerFacts {
    /// The kind of file system in the volume.
    pub file_system: FileSystemKind,
    /// The header's UUID.
    pub uuid: String,
    /// What to pin.
    pub pins: Pins,
    /// Length of the container file in bytes.
    pub file_bytes: u64,
    /// Length of the volume in bytes.
    pub volume_bytes: u64,
    /// The newest snapshot of each job that must be there, as far as this machine knows the state
    /// that was found.
    pub newest_known: Newest,
    /// The newest snapshot of each job in any state that this machine saw, if it may be gone in this one.
    #[serde(default)]
    pub newest_remembered: Newest,
    /// What `analyze` found in earlier sessions of this machine still holds.
    #[serde(default)]
    pub costs_hold: bool,
    /// How many errors the file system has met since it was last repaired, if any.
    pub file_system_errors: Option<u32>,
    /// Blocks of the volume that were overwritten late, by a session whose lease was taken over.
    /// Ascending.
    pub overwritten: Vec<u64>,
    /// Sessions whose writes may have been overwritten late, and can't be compared.
    pub not_compared: Vec<NotCompared>,
    /// What the account could still write on the server at the beginning of a session that writes, if the
    /// server reports it.
    pub available_bytes: Option<u64>,
    /// The clock of a server that is reached by ssh less this machine's, in seconds, in a session that
    /// writes. `None`: the server reports no times.
    pub server_ahead_s: Option<i64>,
}

/// A session that wrote while an earlier one could still overwrite it, and whose writes can't be
/// compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotCompared {
    /// The random id of its host; empty where several were joined.
    pub host: String,
    /// When the container was taken over, by the server's clock, seconds since the epoch.
    pub since_s: u64,
}

/// A session that ended in order: everything is durable on the server, the lock is released.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct ClosedReport {
    /// The figures at the end.
    pub volume: VolumeStats,
    /// What was left in the volume when it was unmounted, if it was mounted.
    pub room: Option<VolumeRoom>,
    /// The server made everything durable. False only if the user allowed a server that can't, and
    /// for a read-only session.
    pub durable: bool,
    /// Blocks on the server that differ from what this machine left there, if the session compared
    /// them.
    #[serde(default)]
    pub differing_blocks: u64,
}

/// A new container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Created {
    /// What it is.
    pub facts: ContainerFacts,
    /// Bytes sent to the server, header included.
    pub sent_bytes: u64,
}

/// A header that was changed, or needed no change.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HeaderChanged {
    /// What to pin now.
    pub facts: ContainerFacts,
    /// The slot that was added or removed; the one that the secret opens after a header was put
    /// back.
    pub slot: u32,
    /// Its mark (see [`sprat_luks::Slot`]).
    pub mark: String,
    /// It was like that before: an earlier run had come so far.
    pub as_before: bool,
    /// A copy of the header that an interrupted change had left behind was made good.
    pub repaired: bool,
    /// After a header was put back: where what lay there before is kept.
    pub replaced: Option<PathBuf>,
    /// Where this machine keeps a copy of the new header; else why it doesn't.
    pub kept: Result<PathBuf, String>,
    /// What to know of the past states that an agent on the server keeps.
    pub agent_note: Option<String>,
    /// Everything is done and durable, but the lock could not be given back, because of this.
    pub lock_left: Option<String>,
    /// Another session took the container over meanwhile: it may have changed the header, too.
    pub taken_over: Option<String>,
}

impl HeaderChanged {
    /// The exit code of the command. All is done, but [`Self::taken_over`] is no success.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self.taken_over {
            Some(_) => Exit::Locked,
            None => Exit::Done,
        }
    }
}

/// The way that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrimRoute {
    /// Holes made in a local file.
    LocalPunch,
    /// Holes that the agent on the server made.
    AgentPunch,
    /// Holes made by `fallocate` in a shell on the server.
    ShellPunch,
    /// A new file in the place of the old one, copied by the server.
    Rewrite,
    /// A new file in the place of the old one, copied through this machine.
    RewriteThroughClient,
    /// Nothing was done: it would have released too little.
    NotWorthwhile,
}

/// What the container took on the server's disk, before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measure {
    /// Bytes given back.
    pub given_back_bytes: u64,
    /// By what it was measured.
    pub by: String,
}

/// What a trim did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrimReport {
    /// The way that was taken.
    pub route: TrimRoute,
    /// Bytes that the file system does not need, most of them never written.
    pub unneeded_bytes: u64,
    /// In how many separate ranges.
    pub ranges: u64,
    /// Of the container itself; `None` where that can't be measured.
    pub measure: Option<Measure>,
    /// After a rewrite: what the new file takes at most, in bytes.
    pub kept_bytes: Option<u64>,
}
