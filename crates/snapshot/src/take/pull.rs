//! Pulls the sources on other hosts into the new tree, after those of this machine.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Run;
use crate::cancel::Cancel;
use crate::completeness::source_of;
use crate::error::SnapshotError;
use crate::job::{Folder, on_volume};
use crate::long_path::lstat;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::pulled::{Host, why_failed};
use crate::pulled_source::PulledPart;
use crate::recent::{self, Recent};
use crate::record::{RunRecord, Warning};
use crate::rsync::{Ended, Guard, ITEMS_MAX, Invocation, Obstacle, Outcome, TRANSFER_OPTIONS};
use crate::scout::Scout;
use crate::sources::has_no_file;
use crate::suspects::Suspects;
use crate::text::{escape_path, unescape_path};
use crate::walk::{each_file, open_folder_at, regular_file, remove_content, remove_name};
use crate::work::Work;

/// How many files of a host may be refused by the volume.
const REFUSED_MAX: usize = 32;
/// How many folders are asked for after files have vanished.
const ASKED_FOR_MAX: usize = 1000;

/// What was pulled.
#[derive(Debug, Default)]
pub(super) struct Pulled {
    parts: Vec<PulledPart>,
    warnings: Vec<Warning>,
    healed: NameList,
}

impl Pulled {
    pub(super) fn add_to_record(self, record: &mut RunRecord) {
        record.pulled = self.parts;
        record.warnings.extend(self.warnings);
        if !self.healed.is_empty() {
            record.healed.append(&self.healed);
            record.warnings.push(Warning::DamageHealed {
                files: self.healed.count,
            });
        }
    }
}

/// One host that is being pulled.
struct Pull<'p> {
    run: &'p Run<'p>,
    host: &'p Host,
    /// Its folder in the new tree, absolute.
    at: PathBuf,
    /// The same relative to the job's folder, as rsync's destination.
    to: String,
    /// The subvolume that the run writes to. `None`: it is a new tree.
    work: Option<&'p Work<'p>>,
    /// The folder has content of an earlier run.
    has_older: bool,
    /// Older trees of it, relative to `at`.
    link_dests: Vec<OsString>,
    /// Files of it to compare with the host, relative to the host's root.
    recent: Recent,
    outcome: Outcome,
    warnings: Vec<Warning>,
    healed: NameList,
}

impl Run<'_> {
    /// Pulls from each host into the tree, and adds to `outcome`, which is that of the sources here.
    pub(super) fn pull_all(
        &self,
        outcome: &mut Outcome,
        inflight: Folder,
        work: Option<&Work<'_>>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Pulled, SnapshotError> {
        let mut pulled = Pulled::default();
        for host in &self.sources.pulled.hosts {
            if !matches!(outcome.ended, Ended::Whole | Ended::WithUnread) {
                break;
            }
            let mut pull = Pull::begin(self, host, inflight, work)?;
            let before = outcome.stats.files;
            let mut further = |now: Progress| {
                progress(Progress {
                    files_done: now.files_done + before,
                    files_found: now.files_found + before,
                    ..now.expecting(self.disks.files_before)
                });
            };
            pull.carry_out(&mut further, cancel)?;
            pull.judge(&mut further, cancel)?;
            pulled.parts.extend(pull.parts());
            pulled.warnings.append(&mut pull.warnings);
            pulled.healed.append(&pull.healed);
            add_host(outcome, host, pull.outcome);
        }
        Ok(pulled)
    }
}

/// Adds what a host's run did to the outcome of the whole run.
fn add_host(outcome: &mut Outcome, host: &Host, theirs: Outcome) {
    outcome.stats.files += theirs.stats.files;
    outcome.stats.regular_files += theirs.stats.regular_files;
    outcome.stats.bytes_total += theirs.stats.bytes_total;
    // The names are those of the host so far.
    let theirs = Outcome {
        unread: host.names_in_snapshot(&theirs.unread, false),
        vanished: host.names_in_snapshot(&theirs.vanished, false),
        recent: host.names_in_snapshot(&theirs.recent, true),
        // An interrupted run has not counted what it wrote.
        counts_unknown: true,
        ..theirs
    };
    outcome.add(theirs);
}

impl<'p> Pull<'p> {
    fn begin(
        run: &'p Run<'p>,
        host: &'p Host,
        inflight: Folder,
        work: Option<&'p Work<'p>>,
    ) -> Result<Self, SnapshotError> {
        let folder = host.folder();
        let job = &run.folder.job.path;
        let at = job.join(inflight.to_string()).join(&folder);
        let is_there = lstat(&at).is_ok();
        if is_there && work.is_none() {
            return Err(host.refuse_place());
        }
        if !is_there {
            std::fs::create_dir(&at).map_err(on_volume("create", &host.name))?;
        }
        let mut recent = match work.is_some() {
            true => run.recent.clone(),
            false => Recent::default(),
        };
        let mut link_dests = Vec::new();
        let trees = match work.is_some() {
            true => Vec::new(),
            false => run.trees_with(host),
        };
        for from in trees {
            recent.read(&run.folder.state, from.name());
            let older = Path::new("../..").join(from.to_string()).join(&folder);
            link_dests.push(crate::sources::argument("--link-dest=", older.as_os_str()));
        }
        let of_host = |path: PathBuf| path.strip_prefix(&folder).map(Path::to_owned).ok();
        recent.paths = recent.paths.into_iter().filter_map(of_host).collect();
        Ok(Self {
            run,
            host,
            to: format!("./{inflight}/{}/", folder.display()),
            work,
            has_older: is_there && std::fs::read_dir(&at).is_ok_and(|mut all| all.next().is_some()),
            at,
            link_dests,
            recent,
            outcome: Outcome::default(),
            warnings: Vec::new(),
            healed: NameList::default(),
        })
    }

    fn carry_out(
        &mut self,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let run = self.run;
        let tree = self.at.parent().unwrap_or(&self.at).to_owned();
        let by_content = self.recent.all || run.recent.all || run.spec.checksum;
        let guard = (!by_content && self.work.is_none())
            .then(|| Guard::begin(run.volume_root, &tree))
            .flatten();
        let mut options = TRANSFER_OPTIONS.map(OsString::from).to_vec();
        options.extend(by_content.then(|| "--checksum".into()));
        // Otherwise rsync would read the older file for its delta transfer, and fail.
        options.extend(guard.is_some().then(|| "--whole-file".into()));
        options.extend(self.link_dests.iter().cloned());
        if self.work.is_some() {
            let deletes = ["--delete", "--delete-excluded", "--ignore-errors"];
            options.extend(deletes.map(OsString::from));
        }
        options.extend(run.attribute_filters());
        let (filters, input) = self.host.filters(run.spec)?;
        options.extend(filters);
        let place = (&*run.folder.job.path, &*self.to);
        let mut invocation = self.host.invocation(&run.rsync, run.spec, options, place);
        invocation.input = Some(input);
        invocation.guarded = guard.is_some();
        self.note_recent_in(&mut invocation);
        let scout = self.scout();
        let mut followed = |now: Progress| {
            if let Some(scout) = &scout {
                scout.follow(now.files_done);
            }
            progress(now);
        };
        self.outcome = self.attempts(&mut invocation, &tree, &mut followed, cancel)?;
        drop(scout);
        drop(guard);
        if self.is_going_on() {
            self.pull_again(by_content, progress, cancel)?;
        }
        Ok(())
    }

    fn is_going_on(&self) -> bool {
        matches!(self.outcome.ended, Ended::Whole | Ended::WithUnread)
    }

    fn note_recent_in(&self, invocation: &mut Invocation) {
        invocation.recent_from = Some(recent::from_text_on_hosts(self.run.started));
        invocation.listener = self.host.listener(&self.run.spec.listener);
    }

    /// Runs rsync, and again without a file that the volume refuses. In a new tree each run begins with an empty
    /// folder: a file in it may be that of an older snapshot, and no run may change that one.
    fn attempts(
        &self,
        invocation: &mut Invocation,
        tree: &Path,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Outcome, SnapshotError> {
        let mut refused: Vec<PathBuf> = Vec::new();
        loop {
            let mut outcome = self.run.rsync.run(invocation, progress, cancel)?;
            let Ended::Because(Obstacle::WriteRefused(written)) = &outcome.ended else {
                for path in &refused {
                    outcome.unread.push_within(escape_path(path), ITEMS_MAX);
                }
                if !refused.is_empty() && outcome.ended == Ended::Whole {
                    outcome.ended = Ended::WithUnread;
                }
                return Ok(outcome);
            };
            let source = source_of(tree, &unescape_path(written));
            let of_host = source.strip_prefix(Path::new("/").join(self.host.folder()));
            if refused.len() >= REFUSED_MAX {
                return Ok(outcome);
            }
            let Ok(of_host) = of_host else {
                return Ok(outcome);
            };
            let path = Path::new("/").join(of_host);
            invocation.leave_out(&path);
            refused.push(path);
            if self.work.is_none() {
                self.empty(&Cancel::new())?;
            }
        }
    }

    fn empty(&self, cancel: &Cancel) -> Result<(), SnapshotError> {
        use std::os::fd::AsFd;

        let failed = || on_volume("remove", &self.host.name);
        let root = open_folder_at(&self.at).map_err(failed())?;
        remove_content(root.as_fd(), cancel).map_err(failed())?;
        Ok(())
    }

    fn scout(&self) -> Option<Scout> {
        let root = open_folder_at(&self.run.folder.job.path).ok()?;
        let in_tree = |from: Folder| PathBuf::from(from.to_string()).join(self.host.folder());
        let trees: Vec<PathBuf> = match self.work.is_some() {
            true => vec![in_tree(Folder::Work(self.run.name))],
            false => {
                let trees = self.run.trees_with(self.host).into_iter();
                trees.map(in_tree).collect()
            }
        };
        (!trees.is_empty()).then(|| Scout::begin(root, trees, None))
    }

    /// Reads those files from the host again whose content must not come from an older snapshot, as
    /// [`crate::reread`] does. `by_content`: rsync has compared the content of all files already.
    fn pull_again(
        &mut self,
        by_content: bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let failed = || on_volume("check", &self.host.name);
        let linked = |path: &PathBuf| {
            let may_be_older = |links| links > 1 || self.work.is_some();
            lstat(&self.at.join(path))
                .is_ok_and(|about| about.is_file() && may_be_older(about.nlink()))
        };
        if !by_content {
            let recent = self.recent.paths.iter().filter(|path| linked(path));
            let recent = self
                .with_all_names(recent.cloned().collect())
                .map_err(failed())?;
            let options = ["--checksum".into()].into_iter();
            let options = options.chain(self.link_dests.iter().cloned());
            let options = options.collect();
            self.note_still_recent(&recent);
            self.pull_names(recent, options, self.work.is_none(), progress, cancel)?;
        }
        let mut whole: BTreeSet<PathBuf> = BTreeSet::new();
        let from_older = self.outcome.copied_from_older.names.iter();
        whole.extend(from_older.map(|name| below(&unescape_path(name))));
        // A name that is pulled alone would become a file of its own.
        whole = self.with_all_names(whole).map_err(failed())?;
        let from_older = whole.clone();
        let suspects = self.run.spec.suspects.as_deref().map(Suspects::load);
        let suspects = suspects.unwrap_or_default();
        if !suspects.files.is_empty() {
            let inodes = suspects.files.values().map(|suspect| suspect.inode);
            let inodes: BTreeSet<u64> = inodes.collect();
            let root = open_folder_at(&self.at).map_err(failed())?;
            each_file(&root, &mut |path, stat| {
                if inodes.contains(&stat.st_ino) {
                    whole.insert(path.to_owned());
                }
            })
            .map_err(failed())?;
            let is_suspect = |path: &Path| {
                let about = lstat(&self.at.join(path)).ok()?;
                suspects.find(&about).map(|suspect| suspect.damaged)
            };
            whole.retain(|path| {
                let damaged = is_suspect(path);
                if damaged == Some(true) {
                    let path = self.host.in_snapshot(path);
                    self.healed.push(escape_path(&path));
                }
                damaged.is_some() || from_older.contains(path)
            });
        }
        self.pull_names(whole, Vec::new(), true, progress, cancel)
    }

    /// In `work` rsync does not report a file again that it compares and finds unchanged.
    fn note_still_recent(&mut self, compared: &BTreeSet<PathBuf>) {
        let from_s = recent::from_s_on_hosts(self.run.started);
        for path in compared.iter().filter(|_| self.work.is_some()) {
            if lstat(&self.at.join(path)).is_ok_and(|about| about.mtime() >= from_s) {
                let name = escape_path(path);
                self.outcome.recent.push_within(name, ITEMS_MAX);
            }
        }
    }

    /// Adds the other names in the tree of files with several ones: all of them must change together.
    fn with_all_names(&self, paths: BTreeSet<PathBuf>) -> std::io::Result<BTreeSet<PathBuf>> {
        if paths.is_empty() {
            return Ok(paths);
        }
        let inode = |path: &PathBuf| Some(lstat(&self.at.join(path)).ok()?.ino());
        let inodes: BTreeSet<u64> = paths.iter().filter_map(inode).collect();
        let mut all = paths;
        each_file(&open_folder_at(&self.at)?, &mut |path, stat| {
            if inodes.contains(&stat.st_ino) {
                all.insert(path.to_owned());
            }
        })?;
        Ok(all)
    }

    /// Pulls these names again. `remove`: removes them from the tree first. Otherwise `more` makes rsync compare
    /// their content.
    fn pull_names(
        &mut self,
        names: BTreeSet<PathBuf>,
        more: Vec<OsString>,
        remove: bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let failed = || on_volume("remove", &self.host.name);
        let root = open_folder_at(&self.at).map_err(failed())?;
        let mut names = names;
        // The host can have any name reported here, also one below a symbolic link that it sent.
        names.retain(|name| regular_file(root.as_fd(), name).is_some());
        if names.is_empty() || !self.is_going_on() {
            return Ok(());
        }
        for name in names.iter().filter(|_| remove) {
            remove_name(root.as_fd(), name).map_err(failed())?;
        }
        let run = self.run;
        let mut options = TRANSFER_OPTIONS.map(OsString::from).to_vec();
        options.extend(more);
        options.extend(run.attribute_filters());
        let place = (&*run.folder.job.path, &*self.to);
        let paths = names.iter().map(PathBuf::as_path);
        let mut invocation = self.host.invocation_of(run.spec, options, paths, place);
        self.note_recent_in(&mut invocation);
        let second = run.rsync.run(&invocation, progress, cancel)?;
        let unread = second.unread.clone();
        self.outcome.add(second);
        for name in names {
            let path = escape_path(&Path::new("/").join(&name));
            if lstat(&self.at.join(&name)).is_err() && !unread.names.contains(&path) {
                self.outcome.unread.push_within(path, ITEMS_MAX);
            }
        }
        if !self.outcome.unread.is_empty() && self.outcome.ended == Ended::Whole {
            self.outcome.ended = Ended::WithUnread;
        }
        Ok(())
    }

    /// What of the host the snapshot lacks. A host that fails in the middle makes the snapshot incomplete;
    /// a volume that fails ends the run.
    fn judge(
        &mut self,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        match &self.outcome.ended {
            Ended::Whole | Ended::WithUnread if self.has_older && !self.all_named() => {
                let why = "more of its files vanished or could not be read than can be listed";
                self.lack_all(why, cancel)?;
            }
            Ended::Whole | Ended::WithUnread => {
                self.drop_unread(cancel)?;
                self.ask_for_vanished(progress, cancel)?;
                for source in &self.host.sources {
                    self.missing_in_tree(&source.path);
                }
            }
            Ended::Cancelled | Ended::Full(_) => return Ok(()),
            Ended::Failed { message, .. } if is_of_this_side(message) => return Ok(()),
            Ended::Because(obstacle) => {
                let why = match obstacle {
                    Obstacle::WriteRefused(_) => "the volume refuses too many of its files",
                    _ => "the volume's file system refuses a hard link",
                };
                self.lack_all(why, cancel)?;
            }
            Ended::Conflict(_) | Ended::Failed { .. } => {
                let why = why_failed(&self.outcome);
                self.lack_all(&why, cancel)?;
            }
        }
        if !self.outcome.unread.is_empty() {
            self.outcome.ended = Ended::WithUnread;
        }
        Ok(())
    }

    /// The files of which rsync reported that it could not read or write them.
    fn not_copied(&self) -> [&NameList; 3] {
        let outcome = &self.outcome;
        [&outcome.unread, &outcome.vanished, &outcome.unwritten]
    }

    fn all_named(&self) -> bool {
        let lists = self.not_copied();
        lists
            .iter()
            .all(|list| list.count == list.names.len() as u64)
    }

    /// Removes from `work` what it has of files that were not copied: that is their older content.
    fn drop_unread(&self, cancel: &Cancel) -> Result<(), SnapshotError> {
        let Some(work) = self.work else { return Ok(()) };
        let [unread, vanished, unwritten] = self.not_copied();
        let names = unread.names.iter().chain(&vanished.names);
        let names: Vec<PathBuf> = names.map(|name| unescape_path(name)).collect();
        let in_snapshot = names.iter().map(|path| self.host.in_snapshot(path));
        let tree = self.at.parent().unwrap_or(&self.at);
        let unwritten = unwritten.names.iter();
        let unwritten = unwritten.map(|name| source_of(tree, &unescape_path(name)));
        work.drop_files(&in_snapshot.chain(unwritten).collect::<Vec<_>>())?;
        let messages = &self.outcome.messages;
        // rsync leaves the folder of a source that it did not find as it is.
        let of_argument =
            |line: &String| line.contains("link_stat \"") || line.contains("change_dir \"");
        if messages.count == messages.names.len() as u64 && !messages.names.iter().any(of_argument)
        {
            return Ok(());
        }
        for source in &self.host.sources {
            if names.iter().any(|name| source.path.starts_with(name)) {
                work.empty(&source.place(), cancel)?;
            }
        }
        Ok(())
    }

    /// Notes that the snapshot has not all of the host. Older content is never in it.
    fn lack_all(&mut self, why: &str, cancel: &Cancel) -> Result<(), SnapshotError> {
        if let Some(work) = self.work.filter(|_| self.has_older) {
            work.hold_back(&self.host.folder(), cancel)?;
        }
        for source in &self.host.sources {
            self.outcome.unread.push(escape_path(&source.path));
            self.warnings.push(Warning::SourceLeftOut {
                path: source.to_string(),
                why: format!("not pulled in full: {why}"),
            });
        }
        self.outcome.ended = Ended::WithUnread;
        Ok(())
    }

    /// Notes a source that has no file in the tree: its disk may not be mounted on the host.
    fn missing_in_tree(&mut self, path: &Path) {
        let at = self.at.join(below(path));
        let why = match lstat(&at) {
            Ok(about) if about.is_dir() && !self.run.spec.allow_empty && has_no_file(&at) => {
                "is empty, or the job's patterns exclude all of it. Its disk may not be mounted"
            }
            Ok(_) => return,
            Err(_) => "nothing of it was pulled: the job's patterns exclude it, or it vanished",
        };
        let name = escape_path(path);
        let known = self.outcome.unread.names.iter();
        let is_known = known
            .clone()
            .any(|one| unescape_path(one).starts_with(path));
        if is_known {
            // Why, rsync's messages say.
            return;
        }
        self.outcome.unread.push(name);
        let source = self.host.sources.iter().find(|source| source.path == path);
        self.warnings
            .extend(source.map(|source| Warning::SourceLeftOut {
                path: source.to_string(),
                why: why.to_owned(),
            }));
    }

    /// A folder that vanished was most often moved, and then the snapshot may lack its files. Only the
    /// host can tell whether a folder is still there.
    fn ask_for_vanished(
        &mut self,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let mut folders: BTreeSet<PathBuf> = BTreeSet::new();
        for name in &self.outcome.vanished.names {
            let path = unescape_path(name);
            for folder in path.ancestors() {
                let is_folder =
                    lstat(&self.at.join(below(folder))).is_ok_and(|about| about.is_dir());
                if is_folder && folders.len() < ASKED_FOR_MAX {
                    folders.insert(folder.to_owned());
                }
            }
        }
        if folders.is_empty() {
            return Ok(());
        }
        let folders: Vec<PathBuf> = folders.into_iter().collect();
        let run = self.run;
        let at = &run.folder.job.path;
        let host = self.host;
        let answer = host.ask_for(&run.rsync, run.spec, &folders, at, progress, cancel)?;
        let asked = folders.iter().zip(answer.why_missing);
        let gone = asked.filter(|(_, why)| why.is_some());
        let mut outermost: Vec<&PathBuf> = Vec::new();
        for (folder, _) in gone {
            if !outermost.iter().any(|outer| folder.starts_with(outer)) {
                outermost.push(folder);
            }
        }
        if outermost.is_empty() {
            return Ok(());
        }
        self.warnings.push(Warning::FoldersVanished {
            folders: outermost.len() as u64,
        });
        for folder in outermost {
            self.outcome.unread.push(escape_path(folder));
        }
        Ok(())
    }

    /// The sources that are in the tree.
    fn parts(&self) -> Vec<PulledPart> {
        let names = &self.outcome.unread;
        let all_named = names.count == names.names.len() as u64;
        let unread: Vec<PathBuf> = names.names.iter().map(|name| unescape_path(name)).collect();
        let is_there = |path: &Path| lstat(&self.at.join(below(path))).is_ok();
        let sources = self.host.sources.iter();
        let there = sources.filter(|source| is_there(&source.path));
        there
            .map(|source| PulledPart {
                source: source.clone(),
                full: all_named && !unread.iter().any(|path| path.starts_with(&source.path)),
            })
            .collect()
    }
}

/// A path of a host relative to its root.
fn below(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// Whether a failure is one of the processes here, which write to the volume. They see a lost connection,
/// too: the generator mostly before the receiver does.
fn is_of_this_side(message: &str) -> bool {
    let roles = ["rsync: [generator] ", "rsync: [receiver] "];
    let mut said = roles.iter().filter_map(|role| message.strip_prefix(role));
    // Of the connection only (io.c, `perform_io`): those of files name the file.
    let of_connection = ["write error: ", "read error: "];
    said.any(|said| !of_connection.iter().any(|error| said.starts_with(error)))
}

impl Run<'_> {
    /// The trees to link a host's files from: those of the run that have the host, and the newest
    /// snapshot that has all of it.
    fn trees_with(&self, host: &Host) -> Vec<Folder> {
        let job = &self.folder.job;
        let has =
            |folder: &Folder| lstat(&job.path.join(folder.to_string()).join(host.folder())).is_ok();
        let linked = self.linked_from.iter().map(|(folder, _)| *folder);
        let mut trees: Vec<Folder> = linked.filter(has).collect();
        let has_all = |folder: &Folder| {
            let record = job.record(folder.name());
            record.is_ok_and(|record| {
                let mut parts = record.pulled.iter();
                parts.any(|part| part.full && part.source.host == host.name)
            })
        };
        if !trees.iter().any(has_all) {
            let own = job.own_folders().unwrap_or_default().into_iter();
            let mut named: Vec<Folder> = own
                .filter(|folder| matches!(folder, Folder::Named(_)) && has(folder))
                .collect();
            named.sort_by_key(|folder| std::cmp::Reverse(folder.name()));
            let newest = named.into_iter().find(|folder| has_all(folder));
            trees.extend(newest.filter(|folder| !trees.contains(folder)));
        }
        trees
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_connection_is_no_failure_of_the_volume() {
        for (message, is) in [
            ("rsync: [generator] write error: Broken pipe (32)", false),
            (
                "rsync: [receiver] read error: Connection reset by peer (104)",
                false,
            ),
            (
                "rsync: connection unexpectedly closed (9 bytes received so far) [receiver]",
                false,
            ),
            (
                "rsync: [sender] read errors mapping \"/a\": Input/output error (5)",
                false,
            ),
            (
                "rsync: [receiver] write failed on \"/v/a\": Input/output error (5)",
                true,
            ),
            (
                "rsync: [generator] recv_generator: mkdir \"/v/a\" failed: Read-only file system (30)",
                true,
            ),
        ] {
            assert_eq!(is_of_this_side(message), is, "{message}");
        }
    }
}
