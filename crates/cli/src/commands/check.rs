//! `sprat check`: looks whether a container is whole, down to every file if asked for.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::check::{Checked, check};
use sprat_session::state::checks::{self, KeptCheck, KeptChecks, Kind};
use sprat_session::state::paths::{CHECKS, SUSPECTS, StatePaths};
use sprat_session::{
    Access, ContainerFacts, IdentityPolicy, Notice, Observer, Phase, SessionProgress, text,
};
use sprat_snapshot::{CheckReport, CheckSpec, CheckWhat, JobName, NameList};

use super::context::{Context, Resolved};
use crate::args::CheckArgs;
use crate::output::{Reporter, exit_json, failure_json};
use crate::{Exit, Failure};

/// Names that are shown; JSON has more.
const NAMES_SHOWN: usize = 20;

/// A line that is lost costs no more than this of what was read.
const NOTE_INTERVAL: Duration = Duration::from_secs(120);

pub(super) fn run(context: &Context, args: &CheckArgs) -> Result<Exit, Failure> {
    let begun = Instant::now();
    let resolved = context.resolve(&args.target)?;
    let what = match (&args.against_source, args.read_data) {
        (Some(job), _) => Some(CheckWhat::AgainstSource(
            JobName::new(job).map_err(|error| Failure::usage(error.to_string()))?,
        )),
        (None, true) => Some(CheckWhat::Everything),
        (None, false) => None,
    };
    let secret = context.secret(&resolved)?;
    let mut options = context.session_options(&resolved, Access::ReadOnly)?;
    // What is checked is what the server has.
    options.past_cache = true;
    let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
    let mut seen = Seen {
        reporter: Reporter::new(context.output, ""),
        header: HeaderSeen::default(),
    };
    // Asked when files are to be read: what was before counts.
    let spec = |facts: &ContainerFacts| {
        what.map(|what| CheckSpec {
            known: sums(
                context,
                &StatePaths::new(&state_dir, &facts.uuid, &resolved.target),
                &what,
            ),
            what,
            suspects: StatePaths::new(&state_dir, &facts.uuid, &resolved.target)
                .file(CHECKS, SUSPECTS),
            duration_max: args.max_duration,
            duration_over: begun.elapsed(),
            note_interval: NOTE_INTERVAL,
            never_enter: Vec::new(),
            container: None,
        })
    };
    let checked = check(options, &secret, spec, &mut seen, &context.interrupt);
    seen.reporter.clear();
    let checked = match checked {
        Ok(checked) => checked,
        Err(failure) => {
            if let (Exit::Damaged, IdentityPolicy::Known(pins)) = (failure.exit, &policy) {
                let paths = StatePaths::new(&state_dir, &pins.uuid, &resolved.target);
                keep_failure(context, &paths, &failure);
            }
            return Err(failure);
        }
    };
    // A container that was never seen before is believed once its file system is whole.
    if checked.file_system.clean || matches!(policy, IdentityPolicy::Known(_)) {
        context.remember(&state_dir, &resolved, &policy, &checked.facts);
    }
    let exit = exit_of(is_damaged(&checked, &seen.header));
    let json = json!({
        "command": "check",
        "result": exit_json(exit),
        "target": resolved.target.to_string(),
        "at": Timestamp::now(),
        "seconds": begun.elapsed().as_secs_f64(),
        "uuid": checked.facts.uuid,
        "container_bytes": checked.facts.file_bytes,
        "volume_bytes": checked.facts.volume_bytes,
        "header_copies_damaged": seen.header.copies,
        "key_slots_damaged": seen.header.slots,
        "file_system": checked.file_system,
        "file_system_errors": checked.facts.file_system_errors,
        "differing_blocks": checked.differing_blocks,
        "overwritten_blocks": checked.facts.overwritten.len(),
        // Without a mount nobody knows which files they are: null, not "none".
        "overwritten_files": match checked.files {
            Some(Err(_)) => Value::Null,
            _ => json!(checked.overwritten),
        },
        "not_compared": checked.facts.not_compared,
        "against_source": args.against_source,
        "files": match &checked.files {
            None => Value::Null,
            Some(Ok(report)) => json!(report),
            Some(Err(failure)) => json!({ "failure": failure_json(failure) }),
        },
    });
    if let Some(Ok(report)) = &checked.files {
        for reason in &report.not_saved {
            context.output.warning(&format!(
                "what this check read and found can't be kept on this machine; later checks compare \
                 with nothing newer, and backups don't know of damage found here: {reason}"
            ));
        }
    }
    let paths = StatePaths::new(&state_dir, &checked.facts.uuid, &resolved.target);
    keep(context, args, &paths, &checked, &seen.header, &json);
    context
        .output
        .result(&told(&resolved, args, &checked, &seen.header), &json)?;
    Ok(exit)
}

/// The file that tells the next run what was read: an unfinished one of another kind is not gone
/// on with. The first check of a container compares it with what the last one of a copy of it read;
/// what was read of that one is not read of this one.
fn sums(context: &Context, paths: &StatePaths, what: &CheckWhat) -> PathBuf {
    let name = match what {
        CheckWhat::Everything => ".sums".to_owned(),
        CheckWhat::AgainstSource(job) => format!(".against-{job}.sums"),
    };
    let own = paths.file(CHECKS, &name);
    if own.exists() {
        return own;
    }
    let others = paths.of_others(CHECKS, &name).into_iter();
    let dated = others.filter_map(|other| {
        let written = other.path.metadata().ok()?.modified().ok()?;
        Some((written, other.path))
    });
    if let Some((_, newest)) = dated.max()
        && let Err(error) = sprat_snapshot::begin_known_from(&newest, &own)
    {
        context.output.warning(&format!(
            "files are compared from the next check on only, as what an earlier one read can't be \
             taken over into {}: {error}",
            own.display()
        ));
    }
    own
}

fn exit_of(damaged: bool) -> Exit {
    if damaged { Exit::Damaged } else { Exit::Done }
}

fn is_damaged(checked: &Checked, header: &HeaderSeen) -> bool {
    let files = match &checked.files {
        None => false,
        Some(Ok(report)) => report.is_damaged(),
        Some(Err(_)) => true,
    };
    header.is_damaged() || quick_is_damaged(checked) || files
}

/// What needs no file to be read.
fn quick_is_damaged(checked: &Checked) -> bool {
    !checked.file_system.clean
        || checked.facts.file_system_errors.is_some()
        || checked.differing_blocks > 0
        || checked.overwritten.is_some()
}

/// The result stays on this machine, for whoever asks how things stand.
fn keep(
    context: &Context,
    args: &CheckArgs,
    paths: &StatePaths,
    checked: &Checked,
    header: &HeaderSeen,
    json: &Value,
) {
    let at = Timestamp::now();
    let mut kept = checks::last(paths);
    let quick_damaged = header.is_damaged() || quick_is_damaged(checked);
    let mut quick = json.clone();
    quick["result"] = exit_json(exit_of(quick_damaged));
    (quick["files"], quick["against_source"]) = (Value::Null, Value::Null);
    kept.put(
        Kind::Quick,
        KeptCheck {
            at,
            exit: exit_of(quick_damaged),
            finished: true,
            result: quick,
        },
    );
    let kind = args
        .against_source
        .as_deref()
        .map_or(Kind::ReadData, Kind::AgainstSource);
    if let Some(files) = &checked.files {
        let check = KeptCheck {
            at,
            exit: exit_of(is_damaged(checked, header)),
            finished: files.as_ref().is_ok_and(|report| report.finished),
            result: json.clone(),
        };
        kept.put(kind, check);
    }
    store(context, &kept, paths);
}

/// So does damage that ended the check: a header or a file that can't be what it was.
fn keep_failure(context: &Context, paths: &StatePaths, failure: &Failure) {
    let mut kept = checks::last(paths);
    let check = KeptCheck {
        at: Timestamp::now(),
        exit: failure.exit,
        finished: false,
        result: json!({
            "command": "check",
            "result": exit_json(failure.exit),
            "failure": failure_json(failure),
        }),
    };
    kept.put(Kind::Quick, check);
    store(context, &kept, paths);
}

fn store(context: &Context, kept: &KeptChecks, paths: &StatePaths) {
    if let Err(error) = kept.store(paths) {
        let path = checks::path(paths);
        context.output.warning(&format!(
            "the result can't be kept in {}: {error}",
            path.display()
        ));
    }
}

fn told(resolved: &Resolved, args: &CheckArgs, checked: &Checked, header: &HeaderSeen) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}: {} long, file system of {}",
        resolved.target,
        text::bytes(checked.facts.file_bytes),
        text::bytes(checked.facts.volume_bytes)
    );
    if header.copies.is_empty() {
        out.push_str("header: both copies are whole, and what was pinned\n");
    }
    for slot in &header.slots {
        let _ = writeln!(
            out,
            "header: DAMAGED, the area of key slot {slot} holds other bytes than the header that this \
             machine keeps"
        );
        out.push_str(
            "  Its key may open nothing any more. Test it (`sprat key rehearse`); if it doesn't open, \
             put the header back: `sprat key header-restore`\n",
        );
    }
    for copy in &header.copies {
        let _ = writeln!(out, "header: DAMAGED, {}", text::harmless(copy));
        out.push_str(
            "  The other copy opens the container. Put the header back: `sprat key header-restore`\n",
        );
    }
    if checked.file_system.clean {
        out.push_str("file system: clean\n");
    } else {
        out.push_str("file system: DAMAGED; e2fsck says\n");
        for line in checked.file_system.output.lines().take(NAMES_SHOWN) {
            let _ = writeln!(out, "  {}", text::harmless(line));
        }
    }
    if let Some(errors) = checked.facts.file_system_errors {
        let _ = writeln!(
            out,
            "file system: DAMAGED, marked as faulty: the kernel has met {}. e2fsck repairs it, and \
             takes the mark off",
            text::counted(errors.into(), "error", "errors")
        );
    }
    if let Some(files) = &checked.overwritten {
        let _ = writeln!(
            out,
            "late writes: DAMAGED, {} overwritten by a session that the container was taken over \
             from. {}",
            text::counted(checked.facts.overwritten.len() as u64, "block", "blocks"),
            match files.count {
                0 if matches!(checked.files, Some(Err(_))) => {
                    "Which files hold them is not known: the file system can't be mounted"
                        .to_owned()
                }
                0 => "No file has content there: it is free space, or the file system's own"
                    .to_owned(),
                count => format!(
                    "They hold content of files, {} in all snapshots; backups read those from their \
                     source again",
                    text::counted(count, "name", "names")
                ),
            }
        );
        for name in files.names.iter().take(NAMES_SHOWN) {
            let _ = writeln!(out, "  {name}");
        }
    }
    if checked.differing_blocks > 0 {
        let _ = writeln!(
            out,
            "server: DAMAGED, {} as this machine left them: its disk is damaged, it lost what it \
             had called durable, or it shows an older copy",
            text::counted(checked.differing_blocks, "block is not", "blocks are not")
        );
    }
    match &checked.files {
        None => {}
        Some(Ok(report)) => out.push_str(&files_told(args, report)),
        Some(Err(failure)) => {
            let _ = writeln!(out, "files: not read: {}", text::harmless(&failure.what));
        }
    }
    if is_damaged(checked, header) {
        out.push_str(
            "What to do: don't back up into this container. Restore what you need first; files that \
             aren't named here are whole as far as was looked. Then look after the server's disk; \
             where blocks can't be read, `ddrescue` saves the rest of the file, and `sprat copy` \
             stops there\n",
        );
    }
    if let Some(Ok(report)) = &checked.files
        && (report.is_damaged() || !report.missed.is_empty())
    {
        out.push_str(
            "The next backup from this machine reads these files from their source, where the source \
             still has them, and names them. It never links to the damaged content again\n",
        );
    }
    out
}

fn files_told(args: &CheckArgs, report: &CheckReport) -> String {
    let mut out = format!(
        "files: {} read, {}",
        text::counted(report.files_read, "file", "files"),
        text::bytes(report.bytes_read)
    );
    if report.files_before > 0 {
        let _ = write!(
            out,
            "; {} by earlier runs",
            text::count(report.files_before)
        );
    }
    if args.read_data {
        let _ = write!(
            out,
            "; {} compared with an earlier check",
            text::count(report.files_known)
        );
    } else {
        let _ = write!(
            out,
            "; {} the same as in the source",
            text::count(report.same)
        );
    }
    out.push('\n');
    list(&mut out, "CAN'T BE READ", &report.unreadable);
    list(&mut out, "DAMAGED", &report.damaged);
    list(&mut out, "the damage concerns", &report.affected);
    if report.affected_left > 0 {
        let _ = writeln!(
            out,
            "time was too short to look for {} that they also have",
            text::counted(report.affected_left, "name", "names")
        );
    }
    list(&mut out, "changed in the source since", &report.changed);
    list(
        &mut out,
        "differ from the source although size and time are the same, so that backups missed it \
         (the next backup from this machine copies them)",
        &report.missed,
    );
    if !report.gone.is_empty() {
        let count = text::count(report.gone.count);
        let _ = writeln!(out, "gone from the source since: {count}");
    }
    list(
        &mut out,
        "NOT IN THE SNAPSHOT, though the source had them when it was begun (the next backup copies them)",
        &report.lacking,
    );
    list(
        &mut out,
        "not in the snapshot, as they were made, moved or mounted there since (the next backup copies \
         them)",
        &report.new_since,
    );
    if let Some(why) = &report.lacking_unknown {
        let _ = writeln!(
            out,
            "what the snapshot lacks is not known: {}",
            text::harmless(why)
        );
    }
    list(
        &mut out,
        "can't be read in the source",
        &report.source_unreadable,
    );
    if !report.finished {
        out.push_str("not everything was read: run the same command again, it goes on there\n");
    }
    out
}

fn list(out: &mut String, title: &str, names: &NameList) {
    if names.is_empty() {
        return;
    }
    let _ = writeln!(out, "{title}: {}", text::count(names.count));
    for name in names.names.iter().take(NAMES_SHOWN) {
        let _ = writeln!(out, "  {}", text::harmless(name));
    }
    if names.count > NAMES_SHOWN as u64 {
        out.push_str("  …; more of them with --json\n");
    }
}

/// Shows the session, and keeps what it says of the header.
struct Seen {
    reporter: Reporter,
    header: HeaderSeen,
}

/// What is wrong with the header.
#[derive(Default)]
struct HeaderSeen {
    /// What is wrong with a copy.
    copies: Vec<String>,
    /// Slots whose areas hold other bytes than this machine keeps of them.
    slots: Vec<u32>,
}

impl HeaderSeen {
    fn is_damaged(&self) -> bool {
        !self.copies.is_empty() || !self.slots.is_empty()
    }
}

impl Observer for Seen {
    fn phase(&mut self, phase: Phase) {
        self.reporter.phase(phase);
    }

    fn progress(&mut self, progress: &SessionProgress) {
        self.reporter.progress(progress);
    }

    fn notice(&mut self, notice: Notice) {
        match &notice {
            Notice::HeaderCopyDamaged { copy } => self.header.copies.push(copy.clone()),
            Notice::SlotAreasDiffer { slots } => self.header.slots.extend(slots),
            _ => {}
        }
        self.reporter.notice(notice);
    }
}
