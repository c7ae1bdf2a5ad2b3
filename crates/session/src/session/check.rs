//! `sprat check`: checks a container in one read-only session, and changes nothing.

use sprat_luks::Secret;
use sprat_snapshot::{CheckReport, CheckSpec, NameList};

use crate::file_system::FileSystemCheck;
use crate::interrupt::Interrupt;
use crate::protocol::messages::WorkerOrder;
use crate::protocol::reports::{ContainerFacts, Notice, Observer, Phase, SessionProgress};
use crate::session::{MountFor, Session, mount_privately};
use crate::settings::SessionSettings;
use crate::supervisor::Watch;
use crate::{Exit, Failure};

/// What a check found.
#[derive(Debug)]
pub struct Checked {
    /// What the container is.
    pub facts: ContainerFacts,
    /// What is wrong with the header.
    pub header: HeaderDamage,
    /// Blocks that the server showed with other bytes than this machine had left there.
    pub differing_blocks: u64,
    /// The files in blocks that were overwritten late, where there are such blocks.
    pub overwritten: Option<NameList>,
    /// What e2fsck said after the journal's replay; `None`: it was not run.
    pub file_system: Option<FileSystemCheck>,
    /// What the files said, where they were asked for; with a file system that can't be mounted,
    /// the reason.
    pub files: Option<Result<CheckReport, Failure>>,
}

/// What is wrong with a container's header.
#[derive(Debug, Default)]
pub struct HeaderDamage {
    /// What is wrong with a copy of the header.
    pub copies: Vec<String>,
    /// Key slots whose areas differ from the header that this machine keeps.
    pub slots: Vec<u32>,
}

impl Checked {
    /// Whether anything is damaged.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        let files = match &self.files {
            None => false,
            Some(Ok(report)) => report.is_damaged(),
            Some(Err(_)) => true,
        };
        self.quick_is_damaged() || files
    }

    /// Whether something is damaged that is found without reading a file.
    #[must_use]
    pub fn quick_is_damaged(&self) -> bool {
        !self.header.copies.is_empty()
            || !self.header.slots.is_empty()
            || self.file_system.as_ref().is_some_and(|found| !found.clean)
            || self.facts.file_system_errors.is_some()
            || self.differing_blocks > 0
            || self.overwritten.is_some()
    }
}

/// Passes everything on, and keeps what is reported of the header.
struct HeaderObserver<'o> {
    observer: &'o mut dyn Observer,
    header: HeaderDamage,
    super_block_damaged: bool,
}

impl Observer for HeaderObserver<'_> {
    fn phase(&mut self, phase: Phase) {
        self.observer.phase(phase);
    }

    fn progress(&mut self, progress: &SessionProgress) {
        self.observer.progress(progress);
    }

    fn notice(&mut self, notice: Notice) {
        match &notice {
            Notice::HeaderCopyDamaged { copy } => self.header.copies.push(copy.clone()),
            Notice::SlotAreasDiffer { slots } => self.header.slots.extend(slots),
            Notice::SuperBlockRestored => self.super_block_damaged = true,
            _ => {}
        }
        self.observer.notice(notice);
    }
}

/// Opens the container for reading, replays its journal locally, runs e2fsck if `file_system`, and then
/// reads files as `spec` says, which is asked when their turn comes.
pub fn check(
    settings: SessionSettings,
    secret: &Secret,
    file_system: bool,
    spec: impl FnOnce(&ContainerFacts) -> Option<CheckSpec>,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Checked, Failure> {
    let mut observer = HeaderObserver {
        observer,
        header: HeaderDamage::default(),
        super_block_damaged: false,
    };
    let mut session = Session::attach(settings, secret, &mut observer, interrupt)?;
    let facts = session.facts.clone();
    let spec = || spec(&facts);
    let findings = check_in(&mut session, file_system, spec, &mut observer, interrupt);
    let closed = session.close(&mut observer, interrupt);
    let (mut file_system, overwritten, files) = findings?;
    if observer.super_block_damaged
        && let Some(found) = &mut file_system
    {
        found.clean = false;
        found
            .output
            .insert_str(0, "the super block is damaged, and its copy is right\n");
    }
    Ok(Checked {
        facts,
        header: observer.header,
        differing_blocks: closed?.differing_blocks,
        overwritten,
        file_system,
        files,
    })
}

type Findings = (
    Option<FileSystemCheck>,
    Option<NameList>,
    Option<Result<CheckReport, Failure>>,
);

fn check_in(
    session: &mut Session,
    file_system: bool,
    spec: impl FnOnce() -> Option<CheckSpec>,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Findings, Failure> {
    let file_system = match file_system {
        true => Some(session.check_attached(observer, interrupt)?),
        false => None,
    };
    let spec = spec().map(|mut spec| {
        spec.never_enter = super::never_backed_up(&session.settings);
        spec.containers = super::local_containers(&session.settings);
        spec
    });
    let overwritten = !session.facts.overwritten.is_empty();
    // The volume is mounted to search for the snapshots that this machine knows.
    let may_mount = file_system.as_ref().is_none_or(|found| found.clean);
    let searches = may_mount && !session.facts.newest_remembered.is_empty();
    if spec.is_none() && !overwritten && !searches {
        return Ok((file_system, None, None));
    }
    interrupt.check()?;
    match read_files(session, spec, observer, interrupt) {
        Ok((named, report)) => Ok((file_system, named, report.map(Ok))),
        // A damaged file system that doesn't mount is what the check found, not its failure.
        Err(failure)
            if file_system.as_ref().is_some_and(|found| !found.clean)
                && matches!(failure.exit, Exit::Failed | Exit::Damaged) =>
        {
            let named = overwritten.then(NameList::default);
            Ok((file_system, named, Some(Err(failure))))
        }
        Err(failure) => Err(failure),
    }
}

fn read_files(
    session: &mut Session,
    spec: Option<CheckSpec>,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<(Option<NameList>, Option<CheckReport>), Failure> {
    let mut watch = Watch::new(observer, interrupt);
    mount_privately(
        session.via.own()?,
        &session.settings,
        MountFor::Reading,
        &mut watch,
    )?;
    let named = session.name_overwritten(observer, interrupt)?;
    let Some(spec) = spec else {
        return Ok((named, None));
    };
    let report = session.ask(
        &WorkerOrder::CheckFiles(Box::new(spec)),
        observer,
        interrupt,
    )?;
    Ok((named, Some(report)))
}
