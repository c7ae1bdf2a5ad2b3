//! What the browser shows and what it waits for. It draws nothing and asks nobody itself: keys and answers go in,
//! questions come out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Instant;

use sprat_inside::Kind;
use sprat_run::watch::Shown;
use sprat_run::{analyze_text, inside_text, restore_text};
use sprat_session::{Exit, Failure, text, trusted_file};
use sprat_snapshot::{Existing, RestoreSpec};

use crate::dialog::{self, Dialog};
use crate::folder::{Folder, Order, Sizes};
use crate::preview::Preview;
use crate::question::{Answer, At, Event, Question};
use crate::rows::Move;
use crate::snapshots::Snapshots;
use crate::versions::Versions;

/// More than a dialog ever has. Drawing knows how many there are: wide ones are broken.
const LINES_MAX: usize = 1 << 20;

/// What fills the screen.
#[derive(Debug)]
pub(crate) enum View {
    Folder(Folder),
    Versions(Versions),
    Preview(Preview),
}

/// A key that means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Move(Move),
    Open,
    Back,
    /// Stops what is waited for; else as [`Key::Back`].
    Escape,
    Erase,
    Letter(char),
    Reload,
}

/// What an answer is for.
#[derive(Debug)]
enum Goal {
    Snapshots,
    /// Shows a folder, with the cursor on this path.
    Folder(At, Option<String>),
    Size(At),
    Versions,
    Preview(At, u64),
    Frees,
    /// Shows what a restore would do.
    Plan(Box<RestoreSpec>),
    Restore(Box<RestoreSpec>, Instant),
}

/// A question that is under way.
#[derive(Debug)]
struct Asked {
    number: u64,
    goal: Goal,
    question: Question,
    since: Instant,
    /// Nobody wants the answer any more.
    is_dropped: bool,
}

pub(crate) struct App {
    pub(crate) target: String,
    pub(crate) shown: Shown,
    pub(crate) colours: bool,
    current_dir: PathBuf,
    pub(crate) snapshots: Snapshots,
    /// The last one fills the screen; none: the list of snapshots does.
    pub(crate) views: Vec<View>,
    pub(crate) dialog: Option<Dialog>,
    pub(crate) sizes: Sizes,
    /// The marked paths of each snapshot.
    marked: HashMap<(String, String), BTreeMap<String, At>>,
    order: Order,
    /// The last thing that the user should know.
    pub(crate) message: String,
    /// What is being done, in the session's words.
    pub(crate) progress: String,
    asked: Option<Asked>,
    wanted: Option<(Question, Goal)>,
    stops: bool,
    numbers: u64,
    pub(crate) ends: bool,
}

impl App {
    pub(crate) fn new(target: String, shown: Shown, colours: bool, current_dir: PathBuf) -> Self {
        Self {
            target,
            shown,
            colours,
            current_dir,
            snapshots: Snapshots::default(),
            views: Vec::new(),
            dialog: None,
            sizes: Sizes::default(),
            marked: HashMap::new(),
            order: Order::Name,
            message: String::new(),
            progress: String::new(),
            asked: None,
            wanted: Some((Question::Snapshots, Goal::Snapshots)),
            stops: false,
            numbers: 0,
            ends: false,
        }
    }

    /// Whether a question is under way.
    pub(crate) fn is_waiting(&self) -> bool {
        self.asked.is_some()
    }

    /// The next question, with its number.
    pub(crate) fn next(&mut self) -> Option<(u64, Question)> {
        if self.asked.is_some() {
            return None;
        }
        let sum_up = || match self.views.last() {
            Some(View::Folder(folder)) if self.dialog.is_none() => {
                let at = folder.to_sum_up(&self.sizes)?;
                Some((Question::Size(at.clone()), Goal::Size(at)))
            }
            _ => None,
        };
        let (question, mut goal) = self.wanted.take().or_else(sum_up)?;
        if let Goal::Restore(_, begun) = &mut goal {
            *begun = Instant::now();
        }
        self.numbers += 1;
        self.asked = Some(Asked {
            number: self.numbers,
            goal,
            question: question.clone(),
            since: Instant::now(),
            is_dropped: false,
        });
        Some((self.numbers, question))
    }

    /// Whether what is under way must be stopped. Asked once for each.
    pub(crate) fn take_stop(&mut self) -> bool {
        std::mem::take(&mut self.stops)
    }

    /// What is waited for, and since when. Sums of folders come by themselves.
    pub(crate) fn waits_for(&self) -> Option<(&'static str, Instant)> {
        let asked = self.asked.as_ref()?;
        // What is dropped may take a while to stop. Then the next one waits for that.
        let goal = match (&self.wanted, asked.is_dropped) {
            (Some((_, goal)), _) => goal,
            (None, false) => &asked.goal,
            (None, true) => return None,
        };
        let what = match goal {
            Goal::Snapshots => "reading the list of snapshots",
            Goal::Folder(..) => "reading the folder",
            Goal::Size(_) => return None,
            Goal::Versions => "comparing the snapshots",
            Goal::Preview(..) => "reading the file",
            Goal::Frees => "reading all folders of the job's snapshots",
            Goal::Plan(_) => "comparing with the destination",
            Goal::Restore(..) => "restoring",
        };
        Some((what, asked.since))
    }

    /// Wants an answer. What was wanted before is not wanted any more.
    fn want(&mut self, question: Question, goal: Goal) {
        self.message.clear();
        self.drop_asked();
        self.wanted = Some((question, goal));
    }

    /// Stops what is under way.
    fn drop_asked(&mut self) {
        self.wanted = None;
        if let Some(asked) = self.asked.as_mut().filter(|asked| !asked.is_dropped) {
            asked.is_dropped = true;
            self.stops = true;
        }
    }

    fn fail(&mut self, failure: &Failure) {
        self.message = failure.in_one_line();
    }
}

/// Keys.
impl App {
    pub(crate) fn press(&mut self, key: Key) {
        if self.dialog.is_some() {
            self.press_in_dialog(key);
            return;
        }
        match key {
            Key::Escape if self.is_stopped_by_escape() => {}
            Key::Escape | Key::Back => {
                self.message.clear();
                self.drop_asked();
                self.views.pop();
            }
            Key::Move(to) => self.go(to),
            Key::Open => self.open(),
            Key::Reload => self.reload(),
            Key::Letter(letter) => self.letter(letter),
            Key::Erase => self.press(Key::Back),
        }
    }

    /// Stops what is waited for, and the sums of folders.
    fn is_stopped_by_escape(&mut self) -> bool {
        let sums = match self.views.last_mut() {
            Some(View::Folder(folder)) => {
                folder.to_sum_up(&self.sizes).is_some()
                    && std::mem::replace(&mut folder.sums_up, false)
            }
            _ => false,
        };
        let waits = self.waits_for().is_some() || self.wanted.is_some();
        if waits || sums {
            self.drop_asked();
            self.message = "stopped".to_owned();
        }
        waits || sums
    }

    fn go(&mut self, to: Move) {
        match self.views.last_mut() {
            None => {
                let count = self.snapshots.entries.len();
                self.snapshots.rows.go(to, count);
            }
            Some(View::Folder(folder)) => folder.rows.go(to, folder.entries.len()),
            Some(View::Versions(versions)) => versions.rows.go(to, versions.versions.len()),
            Some(View::Preview(preview)) => {
                let count = preview.count();
                preview.rows.scroll(to, count);
            }
        }
    }

    fn open(&mut self) {
        match self.views.last() {
            None => {
                if let Some(at) = self.snapshots.current() {
                    self.want(Question::Folder(at.clone()), Goal::Folder(at, None));
                }
            }
            Some(View::Folder(folder)) => {
                let Some(entry) = folder.current() else {
                    return;
                };
                let (at, kind, bytes) = (
                    folder.at.path(&entry.path),
                    entry.found.kind,
                    entry.found.bytes,
                );
                match kind {
                    Kind::Folder => self.want(Question::Folder(at.clone()), Goal::Folder(at, None)),
                    kind => self.preview(at, kind, bytes),
                }
            }
            Some(View::Versions(versions)) => {
                let Some((at, _)) = versions.current() else {
                    return;
                };
                if let Some(parent) = at.parent() {
                    let goal = Goal::Folder(parent.clone(), Some(at.path));
                    self.want(Question::Folder(parent), goal);
                }
            }
            Some(View::Preview(_)) => {}
        }
    }

    fn reload(&mut self) {
        match self.views.last() {
            Some(View::Folder(folder)) => {
                let at = folder.at.clone();
                let cursor = folder.current().map(|entry| entry.path.clone());
                self.sizes
                    .retain(|known, _| known.parent().as_ref() != Some(&at));
                self.views.pop();
                self.want(Question::Folder(at.clone()), Goal::Folder(at, cursor));
            }
            None => self.want(Question::Snapshots, Goal::Snapshots),
            Some(View::Versions(_) | View::Preview(_)) => {}
        }
    }

    fn letter(&mut self, letter: char) {
        match letter {
            'q' => self.ends = true,
            '?' => self.dialog = Some(help()),
            ' ' => self.mark(),
            's' => self.change_order(),
            'z' => self.sum_up(),
            'v' => self.ask_versions(),
            'p' => self.ask_preview(),
            'f' => self.ask_frees(),
            'r' => self.ask_where(),
            _ => {}
        }
    }

    fn mark(&mut self) {
        match self.views.last() {
            None => self.snapshots.mark(),
            Some(View::Folder(folder)) => {
                if let Some(entry) = folder.current() {
                    let at = folder.at.path(&entry.path);
                    let key = (at.job.clone(), at.snapshot.clone());
                    let marked = self.marked.entry(key).or_default();
                    if marked.remove(&at.path).is_none() {
                        marked.insert(at.path.clone(), at);
                    }
                }
            }
            Some(View::Versions(_) | View::Preview(_)) => return,
        }
        self.go(Move::Down);
    }

    /// The marked paths of a snapshot.
    pub(crate) fn marked(&self, at: &At) -> Option<&BTreeMap<String, At>> {
        self.marked.get(&(at.job.clone(), at.snapshot.clone()))
    }

    fn change_order(&mut self) {
        let Some(View::Folder(folder)) = self.views.last_mut() else {
            return;
        };
        folder.order = match folder.order {
            Order::Name => Order::Size,
            Order::Size => Order::Name,
        };
        folder.sums_up |= folder.order == Order::Size;
        self.order = folder.order;
        folder.sort(&self.sizes);
        folder.rows.cursor = 0;
    }

    fn sum_up(&mut self) {
        if let Some(View::Folder(folder)) = self.views.last_mut() {
            folder.sums_up = true;
            self.message.clear();
        }
    }

    fn ask_versions(&mut self) {
        let at = match self.views.last() {
            Some(View::Folder(folder)) => folder.current().map(|entry| folder.at.path(&entry.path)),
            Some(View::Preview(preview)) => Some(preview.at.clone()),
            Some(View::Versions(_)) | None => None,
        };
        if let Some(at) = at {
            self.want(Question::Versions(at), Goal::Versions);
        }
    }

    fn ask_preview(&mut self) {
        let what = match self.views.last() {
            Some(View::Folder(folder)) => folder.current().map(|entry| {
                let found = &entry.found;
                (folder.at.path(&entry.path), found.kind, found.bytes)
            }),
            Some(View::Versions(versions)) => versions
                .current()
                .map(|(at, version)| (at, version.found.kind, version.found.bytes)),
            Some(View::Preview(_)) | None => None,
        };
        if let Some((at, kind, bytes)) = what {
            self.preview(at, kind, bytes);
        }
    }

    fn preview(&mut self, at: At, kind: Kind, bytes: u64) {
        match kind {
            Kind::File => self.want(Question::Preview(at.clone()), Goal::Preview(at, bytes)),
            _ => self.message = "only files have a content to show".to_owned(),
        }
    }

    fn ask_frees(&mut self) {
        if !self.views.is_empty() {
            return;
        }
        let chosen = self.snapshots.chosen();
        if !chosen.is_empty() {
            self.want(Question::Frees(chosen), Goal::Frees);
        }
    }
}

/// A restore.
impl App {
    /// What is restored: what is marked in this snapshot, else what is under the cursor.
    fn chosen(&self) -> Vec<At> {
        let marked = |at: &At| {
            let marked = self.marked(at)?;
            // A marked folder has what is marked in it.
            let is_inside = |at: &&At| {
                let mut above = at.parent();
                while let Some(at) = above {
                    if marked.contains_key(&at.path) {
                        return true;
                    }
                    above = at.parent();
                }
                false
            };
            let tops: Vec<At> = marked
                .values()
                .filter(|at| !is_inside(at))
                .cloned()
                .collect();
            (!tops.is_empty()).then_some(tops)
        };
        match self.views.last() {
            None => self.snapshots.current().into_iter().collect(),
            Some(View::Folder(folder)) => marked(&folder.at).unwrap_or_else(|| {
                let current = folder.current();
                current
                    .map(|entry| folder.at.path(&entry.path))
                    .into_iter()
                    .collect()
            }),
            Some(View::Versions(versions)) => {
                versions.current().map(|(at, _)| at).into_iter().collect()
            }
            Some(View::Preview(preview)) => vec![preview.at.clone()],
        }
    }

    fn ask_where(&mut self) {
        let chosen = self.chosen();
        let Some(first) = chosen.first() else {
            return;
        };
        let job = match first.job_name() {
            Ok(job) => job,
            Err(failure) => return self.fail(&failure),
        };
        let mut spec = RestoreSpec::new(job, PathBuf::new());
        spec.snapshot = first.choice();
        let what = match &chosen[..] {
            [one] if one.path == "/" => format!("{}/{}: everything", one.job, one.snapshot),
            [one] => {
                spec.path = Some(one.raw_path());
                one.shown()
            }
            several => {
                spec.paths = several.iter().map(At::raw_path).collect();
                let count = text::counted(several.len() as u64, "path", "paths");
                format!("{}/{}: {count}", first.job, first.snapshot)
            }
        };
        self.message.clear();
        self.drop_asked();
        self.dialog = Some(Dialog::Where {
            spec: Box::new(spec),
            what,
            typed: self.current_dir.join("restored").display().to_string(),
        });
    }

    fn press_in_dialog(&mut self, key: Key) {
        match (&mut self.dialog, key) {
            (Some(Dialog::Restoring { .. }), Key::Escape) => {
                // Its answer is still wanted: it names what was done.
                self.stops = true;
            }
            (Some(Dialog::Restoring { .. }), _) | (None, _) => {}
            (Some(Dialog::Where { typed, .. }), Key::Letter(letter)) => typed.push(letter),
            (Some(Dialog::Where { typed, .. }), Key::Erase) => {
                typed.pop();
            }
            (Some(Dialog::Where { .. }), Key::Open) => self.plan(),
            (Some(Dialog::Where { .. }), Key::Escape) => self.leave_dialog(),
            (Some(Dialog::Where { .. }), _) => {}
            (Some(Dialog::Text { rows, .. } | Dialog::Confirm { rows, .. }), Key::Move(to)) => {
                rows.scroll(to, LINES_MAX);
            }
            (Some(Dialog::Confirm { replaces, spec, .. }), Key::Letter(letter)) => {
                if let Some(existing) = dialog::existing(letter, *replaces) {
                    let spec = (**spec).clone();
                    self.restore(spec, existing);
                }
            }
            (Some(Dialog::Confirm { .. }), Key::Escape) => {
                self.leave_dialog();
                self.message = "nothing was restored".to_owned();
            }
            (Some(Dialog::Confirm { .. }), _) => {}
            (Some(Dialog::Text { .. }), _) => self.leave_dialog(),
        }
    }

    fn leave_dialog(&mut self) {
        self.drop_asked();
        self.message.clear();
        self.dialog = None;
    }

    /// Finds out what the restore would do.
    fn plan(&mut self) {
        let Some(Dialog::Where { spec, typed, .. }) = &self.dialog else {
            return;
        };
        let mut spec = spec.clone();
        let home = std::env::home_dir();
        match dialog::destination(typed, &self.current_dir, home.as_deref()) {
            Some(to) => spec.to = to,
            None => {
                self.message = "type the folder that the files go to".to_owned();
                return;
            }
        }
        spec.dry_run = true;
        self.want(Question::Restore(spec.clone()), Goal::Plan(spec));
    }

    fn restore(&mut self, mut spec: RestoreSpec, existing: Existing) {
        spec.dry_run = false;
        spec.existing = existing;
        self.dialog = Some(Dialog::Restoring {
            to: spec.to.clone(),
        });
        let spec = Box::new(spec);
        self.want(
            Question::Restore(spec.clone()),
            Goal::Restore(spec, Instant::now()),
        );
    }
}

/// Answers.
impl App {
    pub(crate) fn hear(&mut self, event: Event) {
        match event {
            Event::Progress(text) => self.progress = text,
            Event::Notice(text) => self.message = text,
            Event::Over => self.ends = true,
            Event::Answer(number, answer) => {
                if let Some(asked) = self.asked.take_if(|asked| asked.number == number) {
                    self.progress.clear();
                    self.meet(asked, answer);
                }
            }
        }
    }

    fn meet(&mut self, asked: Asked, answer: Result<Answer, Failure>) {
        let is_stopped = |failure: &Failure| failure.exit == Exit::Interrupted;
        match answer {
            _ if asked.is_dropped => {}
            Ok(answer) => self.show(asked.goal, answer),
            Err(failure) => match asked.goal {
                Goal::Restore(spec, _) => self.not_restored(&spec, &failure),
                // A stop that was meant for the question before.
                goal if is_stopped(&failure) && self.wanted.is_none() => match goal {
                    Goal::Size(_) => {}
                    goal => self.wanted = Some((asked.question, goal)),
                },
                Goal::Size(at) => {
                    self.sizes.insert(at, None);
                    self.fail(&failure);
                }
                _ => self.fail(&failure),
            },
        }
    }

    fn show(&mut self, goal: Goal, answer: Answer) {
        match (goal, answer) {
            (Goal::Snapshots, Answer::Snapshots(entries)) => self.snapshots.set(entries),
            (Goal::Folder(at, cursor), Answer::Folder(listing)) => {
                if let Some(note) = inside_text::note(&listing.snapshot, listing.kind) {
                    self.message = note;
                }
                let at = At {
                    snapshot: listing.snapshot.clone(),
                    ..at
                };
                let mut folder = Folder::new(at, *listing, self.order, &self.sizes);
                if let Some(path) = cursor {
                    folder.find(&path);
                }
                self.views.push(View::Folder(folder));
            }
            (Goal::Size(at), Answer::Size(size)) => {
                self.sizes.insert(at, Some(size));
                if let Some(View::Folder(folder)) = self.views.last_mut()
                    && folder.order == Order::Size
                {
                    folder.sort(&self.sizes);
                }
            }
            (Goal::Versions, Answer::Versions(report)) => {
                self.views.push(View::Versions(Versions::new(*report)));
            }
            (Goal::Preview(at, bytes), Answer::Preview(content)) => {
                self.views
                    .push(View::Preview(Preview::new(at, bytes, content)));
            }
            (Goal::Frees, Answer::Frees(report)) => {
                let mut lines = to_lines(&analyze_text::removal_alone(&report));
                lines.push(String::new());
                let removal = report.removal.iter();
                let names: BTreeSet<&String> =
                    removal.flat_map(|removal| &removal.snapshots).collect();
                lines.extend(names.iter().map(|name| format!("  {name}")));
                lines.push(String::new());
                lines.push("Nothing was removed. `sprat remove` removes snapshots.".to_owned());
                self.dialog = Some(Dialog::text("What a removal frees", lines));
            }
            (Goal::Plan(spec), Answer::Restored(report)) => {
                let mut lines = Vec::new();
                if let Some(note) = inside_text::note(&report.snapshot, report.kind) {
                    lines.push(format!("Warning: {note}"));
                }
                if let Some(why) = trusted_file::folder_writable_by_others(&spec.to) {
                    lines.push(format!(
                        "Warning: other users can change where the files go during the restore: {why}"
                    ));
                }
                lines.extend(to_lines(&restore_text::summary(&spec, &report, None)));
                let planned = report.planned.unwrap_or_default();
                self.dialog = Some(Dialog::Confirm {
                    spec,
                    lines,
                    replaces: planned.replaced > 0,
                    rows: crate::rows::Rows::default(),
                });
            }
            (Goal::Restore(spec, begun), Answer::Restored(report)) => {
                let lines = to_lines(&restore_text::summary(
                    &spec,
                    &report,
                    Some(begun.elapsed()),
                ));
                self.dialog = Some(Dialog::text("Restored", lines));
                self.marked.clear();
            }
            // Each question has an answer of its own kind.
            _ => {}
        }
    }

    fn not_restored(&mut self, spec: &RestoreSpec, failure: &Failure) {
        let mut lines = vec![failure.what.clone()];
        lines.extend(failure.causes.iter().cloned());
        lines.push(format!(
            "What was restored before stays in {}. Restore again to continue.",
            spec.to.display()
        ));
        lines.extend(failure.hint.clone());
        let title = match failure.exit {
            Exit::Interrupted => "Stopped",
            _ => "Not restored",
        };
        self.dialog = Some(Dialog::text(title, lines));
    }
}

fn to_lines(words: &str) -> Vec<String> {
    words.lines().map(str::to_owned).collect()
}

fn help() -> Dialog {
    let lines = [
        "Up Down PgUp PgDn Home End   move, also with j and k",
        "Enter or Right               open a snapshot or folder, show a file",
        "Left or Backspace            back",
        "Esc                          stop what is under way; else back",
        "Space                        mark: files to restore, or snapshots",
        "s                            sort a folder by size or by name",
        "z                            show how large the folders are",
        "v                            versions of the file or folder",
        "p                            show the beginning of a file",
        "r                            restore what is marked, or the file at the cursor",
        "f                            what removing the marked snapshots frees",
        "F5 or Ctrl-R                 read again",
        "Ctrl-Z                       stop the browser until fg",
        "q                            end; Ctrl-C ends at once",
    ];
    Dialog::text("Keys", lines.map(str::to_owned).to_vec())
}
