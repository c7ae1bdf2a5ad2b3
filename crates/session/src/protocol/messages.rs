//! The messages between the session process (S), the volume process (V) and the worker (W).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sprat_attach::CryptMapping;
use sprat_inside::{
    AnalyzeReport, AnalyzeSpec, CatSpec, DiffReport, DiffSpec, FindReport, FindSpec, FolderSize,
    ListSpec, Listing, SizeSpec, SourceDiffSpec, VersionsReport, VersionsSpec,
};
use sprat_luks::SlotKind;
use sprat_snapshot::{
    Census, CheckReport, CheckSpec, DrillReport, DrillSpec, ExportReport, ExportSpec, JobName,
    PinReport, PinSpec, PruneReport, PruneSpec, RemoveReport, RemoveSpec, RestoreReport,
    RestoreSpec, SnapshotEntry, SnapshotReport, SnapshotSpec, StagedFile,
};

use crate::Failure;
use crate::file_system::{FileSystemCheck, FileSystemKind};
use crate::protocol::reports::{
    ClosedReport, ContainerFacts, Finished, HeaderChanged, Notice, Phase, TrimReport, VolumeRoom,
    VolumeStats,
};
use crate::settings::SessionSettings;

/// From when on a trim is worth it: both must be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worthwhile {
    /// So much is released.
    pub bytes: u64,
    /// So much of what the container takes.
    pub percent: u64,
}

impl Worthwhile {
    /// Whether it is worth it to make a container smaller.
    #[must_use]
    pub fn is_reached(self, allocated_bytes: u64, needed_bytes: u64) -> bool {
        let gain = allocated_bytes.saturating_sub(needed_bytes);
        let share = u128::from(allocated_bytes) * u128::from(self.percent);
        gain >= self.bytes && u128::from(gain) * 100 >= share
    }
}

/// Which ways of trimming may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrimHow {
    /// Holes are made in the file; nothing else will do.
    Punch,
    /// The same, but nothing is done where it releases less, or where that can't be found out.
    PunchIf(Worthwhile),
    /// The file is rewritten on the server, which copies by itself.
    Rewrite,
    /// The file is rewritten. All that is used of it is downloaded and uploaded.
    RewriteThroughClient,
}

/// S to V. The first is [`VolumeOrder::Start`], followed by one raw frame for each secret.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum VolumeOrder {
    /// What to open or make.
    Start(Box<VolumeStart>),
    /// A FUSE descriptor is on the descriptor socket; serve the volume on it.
    Serve,
    /// Kernel mode: give the volume key away.
    GiveKey,
    /// Nothing is mounted: make everything durable, and take note from now on of what a read-only
    /// mount says that it doesn't need.
    Collect,
    /// Nothing is mounted any more: give that space back.
    Trim(TrimHow),
    /// Nothing is mounted any more, and the file system was shrunk: cut the file to this length.
    Cut { file_bytes: u64 },
    /// Everything above is unmounted: close the volume, in creation give the container its name,
    /// release the lock. With the finished snapshots of each job, where they are known.
    Close(Option<Finished>),
    /// After a Closed that said that the reserve is missing: make it.
    MakeReserve,
    /// What is mounted is the container as this machine knows it: what was written may be sent.
    /// `gone`: the snapshots (`JOB/SNAPSHOT`) that were reported as gone; `None`: that could not be noted.
    MaySend { gone: Option<Vec<String>> },
    /// Give up: send nothing more; in creation remove what was made. Never waits for a lost line.
    Abort,
    /// From now on live without S (background mount): the end of the control socket means
    /// nothing any more, the end of the FUSE connection means [`VolumeOrder::Close`].
    Detach(BackgroundMount),
}

/// What V is started with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VolumeStart {
    pub settings: SessionSettings,
    /// The kernel decrypts: V serves ciphertext.
    pub kernel: bool,
    pub durable_flush: bool,
    /// The container file is to have this length.
    pub grow_to: Option<u64>,
    pub create: Option<CreateStart>,
    pub change: Option<ChangeStart>,
    /// One for opening; for creation one for each slot; for adding a key the present and the new.
    pub secrets: usize,
}

/// What is to be made.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CreateStart {
    pub file_system: FileSystemKind,
    pub size_bytes: u64,
    pub slots: Vec<SlotKind>,
    pub uuid: Option<String>,
    pub fast_kdf_for_tests: bool,
}

/// What is to be done with the keys.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ChangeStart {
    Add {
        kind: SlotKind,
        fast_kdf_for_tests: bool,
    },
    /// A second secret, where there is one, is what this machine's backups open it with.
    Remove { slot: u32, although_in_use: bool },
    Restore {
        kept: OsString,
        /// The sequence that was shown to the user; `None`: no header was readable.
        shown: Option<u64>,
    },
}

/// Where V reports the end of a background mount.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BackgroundMount {
    /// Where it is mounted.
    pub dir: OsString,
    /// Its record; V holds a flock on it for as long as it lives.
    pub record: OsString,
}

/// V to S.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum VolumeReply {
    Phase(Phase),
    Notice(Notice),
    Figures(VolumeStats),
    /// So little is left on the server that the session should end in order.
    RoomRunsOut {
        available_bytes: u64,
    },
    /// Store, lock, header and volume are open.
    Ready(ContainerFacts),
    /// In creation: the server is asked to give the container its name; `false`: it was not given.
    Naming(bool),
    /// Answers Serve, Collect, Detach, and MakeReserve, even if the reserve can't be made.
    Done,
    /// On the descriptor socket is a pipe with the volume key in it.
    KeyGiven(CryptMapping),
    /// The header is changed, durably; V ends.
    Changed(Box<HeaderChanged>),
    /// Answers Trim.
    Trimmed(Box<TrimReport>),
    /// The lock is released and everything is durable. With whether the reserve is missing: V then
    /// lives on, to make it when it is ordered to.
    Closed(ClosedReport, bool),
    /// Another session took the container over. Before V answers Abort it waits for the server's answers
    /// to what was sent, for [`DRAIN_MAX`] at most.
    Draining,
    /// Answers Abort.
    Aborted(AbortReport),
    /// It can't go on; only Abort is useful now.
    Failed(Failure),
}

/// For the answers to what was sent this long is waited after the lease was lost: as long as who took
/// over waits for the word that nothing can arrive any more.
pub(crate) const DRAIN_MAX: Duration = Duration::from_secs(30);

/// What an aborted V leaves behind.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct AbortReport {
    /// In creation: what had been made is removed.
    pub removed: bool,
    /// In creation: the container has its name, and is whole.
    pub made: bool,
    /// The lock is released.
    pub lock_released: bool,
}

/// S to W.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerOrder {
    /// Make the FUSE mount and send its descriptor up.
    Begin,
    /// V serves: attach the loop device.
    Attach,
    /// Kernel mode, after Attach: the pipe with the volume key is on the descriptor socket; have
    /// dm-crypt decrypt the loop device.
    Map(CryptMapping),
    MakeFileSystem {
        file_system: FileSystemKind,
        label: Option<String>,
        inodes: Option<u64>,
    },
    Mount {
        file_system: FileSystemKind,
        at: OsString,
        read_only: bool,
        /// People look around in it: no device nodes, no set-uid.
        browse: bool,
        /// See [`sprat_attach::MountOptions`].
        grow: bool,
        /// Snapshots, by job, that must be there.
        expected: BTreeMap<String, String>,
        /// Snapshots whose absence is reported.
        remembered: BTreeMap<String, String>,
    },
    /// Lets other commands of this machine read the mounted volume. The socket that they connect to is on the
    /// descriptor socket.
    ServeReaders(Box<ContainerFacts>),
    /// The volume is mounted there already, and stays mounted.
    Use {
        at: OsString,
        file_system: FileSystemKind,
    },
    /// Writes a file's content for the job's next snapshot, up to the end of the pipe whose end is on the
    /// descriptor socket. `first`: what waits there is of an earlier run.
    StageFile {
        job: JobName,
        path: OsString,
        first: bool,
    },
    /// Removes the content that waits for the job's next snapshot.
    Unstage(JobName),
    TakeSnapshot(Box<SnapshotSpec>),
    /// Counts what is new in the sources, and copies nothing.
    Count(Box<SnapshotSpec>),
    List,
    /// Restores. With patterns, only the paths that match.
    Restore(Box<RestoreSpec>, Vec<String>),
    /// Exports snapshots to a folder of this machine.
    Export(Box<ExportSpec>),
    ListFolder(Box<ListSpec>),
    Find(Box<FindSpec>),
    Versions(Box<VersionsSpec>),
    Diff(Box<DiffSpec>),
    /// Compares with the source. The list of its paths is on the descriptor socket.
    DiffSource(Box<SourceDiffSpec>),
    Analyze(Box<AnalyzeSpec>),
    Size(Box<SizeSpec>),
    /// Writes a file's content to the descriptor on the descriptor socket.
    Cat(Box<CatSpec>),
    Prune(Box<PruneSpec>),
    Remove(Box<RemoveSpec>),
    Pin(Box<PinSpec>),
    /// Checks the structures of the file system on the device; instead of Mount.
    CheckFileSystem {
        file_system: FileSystemKind,
        /// Where it may be mounted meanwhile.
        at: OsString,
    },
    /// Reads files of the mounted volume.
    CheckFiles(Box<CheckSpec>),
    /// Restores a sample of the mounted volume, and compares it.
    Drill(Box<DrillSpec>),
    /// Finds the files of the mounted volume that have content in these blocks, ascending, and notes
    /// them in the list of files whose content is wrong.
    NameBlocks {
        blocks: Vec<u64>,
        suspects: OsString,
    },
    /// Has the mounted file system tell the device what it doesn't need.
    Trim,
    /// Grows the mounted file system to the length of the device.
    Grow {
        volume_bytes: u64,
    },
    /// Shrinks the mounted file system to this length.
    Shrink {
        volume_bytes: u64,
    },
    /// Stops what runs, and all that follows; that order then answers with its own outcome.
    Cancel,
    /// Stops what runs. The orders that follow are carried out.
    CancelCurrent,
    /// Unmounts, gives the loop device back, and ends.
    Unmount,
    /// To the keeper of a background mount: V's control socket is on the descriptor socket; live
    /// without S from now on.
    Keep(BackgroundMount),
}

/// W to S.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerReply {
    /// Answers every order that has no answer of its own.
    Done,
    /// The first message to a reader, which may send orders now.
    ReaderAccepted(Box<ContainerFacts>),
    /// The second message to the reader of a session that only reads: it restores and exports nothing for others.
    OnlyReads,
    Progress(sprat_snapshot::Progress),
    /// The content of this file is copied: its path, escaped, relative to the snapshot.
    Copied(String),
    Notice(Notice),
    FileStaged(StagedFile),
    SnapshotTaken(Box<SnapshotReport>),
    /// No snapshot was taken: too much is new.
    TooMuchNew(Box<Census>),
    /// `None`: the sources can't be walked.
    Counted(Option<Box<Census>>),
    Listed(Vec<SnapshotEntry>),
    Restored(Box<RestoreReport>),
    Exported(Box<ExportReport>),
    FolderListed(Box<Listing>),
    Found(Box<FindReport>),
    VersionsFound(Box<VersionsReport>),
    Differs(Box<DiffReport>),
    Analyzed(Box<AnalyzeReport>),
    Sized(FolderSize),
    /// How many bytes.
    Written(u64),
    Pruned(Box<PruneReport>),
    Removed(Box<RemoveReport>),
    Pinned(Box<PinReport>),
    Checked(FileSystemCheck),
    FilesChecked(Box<CheckReport>),
    Drilled(Box<DrillReport>),
    /// The files' names, and why the list could not be written.
    BlocksNamed(sprat_snapshot::NameList, Option<String>),
    /// With what was left in the volume and, of one that was written to, the finished snapshots of
    /// each job.
    Unmounted(Option<VolumeRoom>, Option<Finished>),
    /// The last order failed.
    Failed(Failure),
}
