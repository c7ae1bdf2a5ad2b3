//! What a session reports while it runs and when it ends.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sprat_luks::Pins;

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reaching the server.
    Connecting,
    /// Taking the lock.
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
    /// The server has no room left: what was begun is ended in order.
    StoppingFull,
    /// Asking the file system what it does not need.
    Collecting,
    /// Making holes in the container file.
    Punching,
    /// Writing the container anew on the server.
    Rewriting,
    /// Growing the file system.
    Growing,
    /// Unmounting.
    Unmounting,
    /// Sending what is left and waiting for the server's fsync.
    Syncing,
    /// Reading a new container's header back and giving it its name.
    Publishing,
}

/// Something the user should know; none of them stops the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// One of the header's two copies is damaged; the other was used.
    HeaderCopyDamaged {
        /// Which one, in words.
        copy: String,
    },
    /// Nothing was pinned on this machine, so the header was believed as it is.
    TrustedOnce {
        /// To be compared with the recovery sheet.
        fingerprint: String,
    },
    /// A session that died on this machine held the lock; it was taken over.
    TookOverDeadSession,
    /// Bytes that a dead session had in flight; they are read back before success.
    Suspects {
        /// Their sum.
        bytes: u64,
    },
    /// A write session of this machine died; what it left is read through a local journal replay.
    DeadSessionLeftLock,
    /// Another host holds the lock, and the user insisted on reading all the same.
    LockIgnored {
        /// Whose it is.
        holder: String,
    },
    /// The container was written to since this machine last closed it; nothing that was kept of it
    /// here is used.
    CacheOutdated,
    /// The container was written to since this machine last left it, and not by this machine.
    WrittenElsewhere,
    /// The container is older than this machine knows it, and the user accepts that.
    OlderStateAccepted,
    /// What a session wrote, which may have been overwritten late, can't be compared.
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
    /// What is known of the container can't be noted in the state folder.
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
    /// Little space, or few inodes, are left in the volume.
    VolumeSpaceLow {
        /// For files' content.
        available_bytes: u64,
        /// For files.
        inodes: u64,
    },
    /// The server's disk is full; the reserve beside the container was given up to go on.
    ReserveGivenUp,
    /// The server can't fsync, and the user insisted.
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
    /// The lock could not be given back at the end, when everything was durable.
    LockLeft {
        /// Why.
        reason: String,
    },
    /// This machine could not keep a copy of a new container's header.
    HeaderNotKept {
        /// Why.
        reason: String,
    },
    /// The header that this machine had kept has key slots that the present one does not have, or
    /// has otherwise. Both are kept.
    SlotsDiffer {
        /// Slots that are gone, or of which the present header says something else.
        gone: Vec<u32>,
        /// Slots whose areas hold other bytes.
        slots: Vec<u32>,
        /// The file that they lie in as they were.
        kept: PathBuf,
        /// The file of the present header.
        newest: PathBuf,
    },
    /// Key slots whose areas hold other bytes than the header that this machine keeps has of them.
    SlotAreasDiffer {
        /// Their numbers.
        slots: Vec<u32>,
    },
    /// A way of giving space back does not exist here, and the next one is taken.
    TrimRoutePassed {
        /// Which one, and why not.
        reason: String,
    },
    /// So much of what a dead session had under way was read and written anew.
    Settling {
        /// Bytes that are done.
        done_bytes: u64,
        /// Bytes in all.
        whole_bytes: u64,
    },
    /// Blocks of a lost connection may still be carried out by its server: what replaces them, and the
    /// end of the run, waits for this long at most.
    LateWrites {
        /// Seconds.
        wait_s: u64,
    },
    /// The line was lost, or could not be made again for another reason; reconnecting.
    LineLost {
        /// Why.
        reason: String,
    },
    /// The line is back.
    LineBack {
        /// Seconds it was away.
        away_s: u64,
    },
}

/// The volume's figures at one moment.
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
    /// For how long the line has been away.
    pub reconnecting_ms: Option<u64>,
    /// Estimated round trip.
    pub round_trip_us: Option<u64>,
}

/// What is told while a session works.
#[derive(Debug, Clone, Default)]
pub struct SessionProgress {
    /// rsync's side, while it runs.
    pub rsync: Option<sprat_snapshot::Progress>,
    /// The wire's side.
    pub volume: VolumeStats,
}

/// Sees what a session does; called on the session's own thread and must not block.
pub trait Observer {
    /// A phase begins.
    fn phase(&mut self, phase: Phase);
    /// Newer figures.
    fn progress(&mut self, progress: &SessionProgress);
    /// Something to tell.
    fn notice(&mut self, notice: Notice);
}

/// The newest snapshot of each job: job, snapshot.
pub type Newest = BTreeMap<String, String>;

/// What the volume process found at the target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerFacts {
    /// The header's UUID.
    pub uuid: String,
    /// What to pin.
    pub pins: Pins,
    /// Length of the container file in bytes.
    pub file_bytes: u64,
    /// Length of the volume in bytes.
    pub volume_bytes: u64,
    /// The newest snapshot of each job that must be there: what this machine knows of the state
    /// that was found.
    pub newest_known: Newest,
    /// How many errors the file system has met since it was last repaired, if any.
    pub file_system_errors: Option<u32>,
    /// Blocks of the volume that were overwritten late, by a session that the container was taken
    /// over from; ascending.
    pub overwritten: Vec<u64>,
    /// Sessions whose writes may have been overwritten so, and can't be compared.
    pub not_compared: Vec<NotCompared>,
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

/// Room in the file system in the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRoom {
    /// For files' content, in all.
    pub total_bytes: u64,
    /// For files' content, unused.
    pub available_bytes: u64,
    /// How many files and folders it can hold.
    pub inodes: u64,
    /// How many more.
    pub free_inodes: u64,
}

/// Below this part of its blocks or inodes a volume is told to be nearly full.
const ROOM_LOW_PART: u64 = 20;

impl VolumeRoom {
    /// Whether somebody should do something before it is full.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.available_bytes < self.total_bytes / ROOM_LOW_PART
            || self.free_inodes < self.inodes / ROOM_LOW_PART
    }
}

/// A session that ended in order: everything is durable on the server, the lock is released.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct ClosedReport {
    /// The figures at the end.
    pub volume: VolumeStats,
    /// What was left in the volume when it was unmounted, if it was mounted.
    pub room: Option<VolumeRoom>,
    /// The server made everything durable; false only where the user insisted on a server that
    /// can't, and for a read-only session.
    pub durable: bool,
    /// Blocks that the server showed with other bytes than this machine had left there, in a
    /// session that compared.
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
