//! Orders and their replies: who gets an order, what an interrupt does meanwhile, and what a reply carries.

use serde::Serialize;
use sprat_attach::CryptMapping;
use sprat_inside::{AnalyzeReport, DiffReport, FindReport, FolderSize, Listing, VersionsReport};
use sprat_snapshot::{
    Census, CheckReport, DrillReport, ExportReport, NameList, PinReport, PruneReport, RemoveReport,
    RestoreReport, SnapshotEntry, SnapshotReport, StagedFile,
};

use crate::file_system::FileSystemCheck;
use crate::protocol::messages::{VolumeOrder, VolumeReply, WorkerOrder, WorkerReply};
use crate::protocol::reports::{
    ClosedReport, ContainerFacts, Finished, HeaderChanged, TrimReport, VolumeRoom,
};
use crate::protocol::spawn::Child;

/// What the first interrupt does while S waits for a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnInterrupt {
    /// Ends everything at once. No data is lost by that.
    GiveUp,
    /// Asks the worker to stop the order.
    Cancel,
    /// Asks V to stop, and accepts its reply: V may be past the point of return.
    Ask,
    /// Goes on: the order ends soon.
    Finish,
}

/// An order to V or to W.
pub(crate) trait Order: Serialize {
    /// The process that carries it out.
    fn recipient<'c>(volume: &'c Child, worker: Option<&'c Child>) -> Option<&'c Child>;

    /// What the first interrupt does until the reply is here.
    fn on_interrupt(&self) -> OnInterrupt;
}

impl Order for VolumeOrder {
    fn recipient<'c>(volume: &'c Child, _: Option<&'c Child>) -> Option<&'c Child> {
        Some(volume)
    }

    fn on_interrupt(&self) -> OnInterrupt {
        match self {
            Self::Start(start) if start.change.is_some() => OnInterrupt::Ask,
            // V itself sees an interrupt between two steps that belong together.
            Self::Start(_) | Self::Serve | Self::GiveKey | Self::Collect | Self::Trim(_) => {
                OnInterrupt::GiveUp
            }
            Self::Close(_)
            | Self::Cut { .. }
            | Self::Detach(_)
            | Self::MakeReserve
            | Self::MaySend { .. }
            | Self::Abort => OnInterrupt::Finish,
        }
    }
}

impl Order for WorkerOrder {
    fn recipient<'c>(_: &'c Child, worker: Option<&'c Child>) -> Option<&'c Child> {
        worker
    }

    fn on_interrupt(&self) -> OnInterrupt {
        match self {
            Self::Begin
            | Self::Attach
            | Self::Map(_)
            | Self::MakeFileSystem { .. }
            | Self::Shrink { .. }
            | Self::Trim => OnInterrupt::GiveUp,
            Self::StageFile { .. }
            | Self::Unstage(_)
            | Self::TakeSnapshot(_)
            | Self::Count(_)
            | Self::List
            | Self::Restore(..)
            | Self::Export(_)
            | Self::ListFolder(_)
            | Self::Find(_)
            | Self::Versions(_)
            | Self::Diff(_)
            | Self::DiffSource(_)
            | Self::Cat(_)
            | Self::Analyze(_)
            | Self::Size(_)
            | Self::Prune(_)
            | Self::Remove(_)
            | Self::Pin(_)
            | Self::CheckFileSystem { .. }
            | Self::CheckFiles(_)
            | Self::Drill(_)
            | Self::NameBlocks { .. } => OnInterrupt::Cancel,
            // To stop in the middle of a mount gains nothing: a mount is short.
            Self::Mount { .. }
            | Self::ServeReaders(_)
            | Self::Use { .. }
            | Self::Grow { .. }
            | Self::Unmount
            | Self::Keep(_) => OnInterrupt::Finish,
            Self::Cancel | Self::CancelCurrent => OnInterrupt::Finish,
        }
    }
}

/// A reply to an order, of either process.
pub(crate) enum Reply {
    Volume(VolumeReply),
    Worker(WorkerReply),
}

/// What a reply carries.
pub(crate) trait Answer: Sized {
    /// `None`: it is a reply of another kind.
    fn of(reply: Reply) -> Option<Self>;
}

impl Answer for Result<SnapshotReport, Box<Census>> {
    fn of(reply: Reply) -> Option<Self> {
        match reply {
            Reply::Worker(WorkerReply::SnapshotTaken(report)) => Some(Ok(*report)),
            Reply::Worker(WorkerReply::TooMuchNew(census)) => Some(Err(census)),
            _ => None,
        }
    }
}

macro_rules! answers {
    ($($answer:ty: $reply:pat => $value:expr;)+) => {
        $(impl Answer for $answer {
            fn of(reply: Reply) -> Option<Self> {
                match reply {
                    $reply => Some($value),
                    _ => None,
                }
            }
        })+
    };
}

answers! {
    (): Reply::Volume(VolumeReply::Done) | Reply::Worker(WorkerReply::Done) => ();
    ContainerFacts: Reply::Volume(VolumeReply::Ready(facts)) => facts;
    CryptMapping: Reply::Volume(VolumeReply::KeyGiven(mapping)) => mapping;
    HeaderChanged: Reply::Volume(VolumeReply::Changed(changed)) => *changed;
    TrimReport: Reply::Volume(VolumeReply::Trimmed(report)) => *report;
    (ClosedReport, bool): Reply::Volume(VolumeReply::Closed(report, reserve_missing)) => (report, reserve_missing);
    StagedFile: Reply::Worker(WorkerReply::FileStaged(file)) => file;
    Option<Census>: Reply::Worker(WorkerReply::Counted(census)) => census.map(|census| *census);
    Vec<SnapshotEntry>: Reply::Worker(WorkerReply::Listed(entries)) => entries;
    RestoreReport: Reply::Worker(WorkerReply::Restored(report)) => *report;
    ExportReport: Reply::Worker(WorkerReply::Exported(report)) => *report;
    Listing: Reply::Worker(WorkerReply::FolderListed(listing)) => *listing;
    FindReport: Reply::Worker(WorkerReply::Found(report)) => *report;
    VersionsReport: Reply::Worker(WorkerReply::VersionsFound(report)) => *report;
    DiffReport: Reply::Worker(WorkerReply::Differs(report)) => *report;
    FolderSize: Reply::Worker(WorkerReply::Sized(size)) => size;
    AnalyzeReport: Reply::Worker(WorkerReply::Analyzed(report)) => *report;
    u64: Reply::Worker(WorkerReply::Written(bytes)) => bytes;
    PruneReport: Reply::Worker(WorkerReply::Pruned(report)) => *report;
    RemoveReport: Reply::Worker(WorkerReply::Removed(report)) => *report;
    PinReport: Reply::Worker(WorkerReply::Pinned(report)) => *report;
    FileSystemCheck: Reply::Worker(WorkerReply::Checked(check)) => check;
    DrillReport: Reply::Worker(WorkerReply::Drilled(report)) => *report;
    CheckReport: Reply::Worker(WorkerReply::FilesChecked(report)) => *report;
    (NameList, Option<String>): Reply::Worker(WorkerReply::BlocksNamed(names, not_saved)) => (names, not_saved);
    (Option<VolumeRoom>, Option<Finished>): Reply::Worker(WorkerReply::Unmounted(room, finished)) => (room, finished);
}
