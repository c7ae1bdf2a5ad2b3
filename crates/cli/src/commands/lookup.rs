//! What the commands that look into snapshots have in common.

use std::ffi::OsStr;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use sprat_inside::{Pattern, Place};
use sprat_run::inside_text;
use sprat_session::state::snapshots;
use sprat_session::{Session, text};
use sprat_snapshot::{Cancel, EntryKind, Lists, SnapshotError, unescape_name};

use super::context::{Context, Prepared};
use crate::args::ReadTarget;
use crate::output::{Reporter, result_json};
use crate::{Exit, Failure};

/// The place that `JOB[/SNAPSHOT][:PATH]` and `--at TIME` mean.
pub(super) fn place(context: &Context, what: &OsStr, at: Option<&str>) -> Result<Place, Failure> {
    let wanted = context.wanted(what, at)?;
    let snapshot = wanted.snapshot.unwrap_or_default();
    Ok(Place::new(wanted.job, snapshot, wanted.path.as_deref()))
}

/// Refuses a pattern that can't match, before anything is opened.
pub(super) fn check_pattern(text: &str, ignore_case: bool) -> Result<(), Failure> {
    let parsed = Pattern::parse(text, ignore_case);
    parsed.map(drop).map_err(|error| {
        Failure::usage(format!("the pattern is not valid: {error}"))
            .with_hint("nothing was started")
    })
}

/// What was found, and where.
pub(super) struct Answer<T> {
    pub(super) target: String,
    pub(super) report: T,
    /// It is from the lists of this machine, which noted then what the container had.
    pub(super) as_of: Option<Timestamp>,
}

/// What `ask` finds in a session, or with `offline` what `read` finds in the lists of this machine.
pub(super) fn look_or_read<T>(
    context: &Context,
    target: &ReadTarget,
    offline: bool,
    ask: impl FnOnce(&mut Session, &mut Reporter) -> Result<T, Failure>,
    read: impl FnOnce(&Lists, &Cancel) -> Result<T, SnapshotError>,
) -> Result<Answer<T>, Failure> {
    if !offline {
        let (target, report) =
            look(context, target, ask).map_err(|failure| match failure.exit {
                Exit::Unreachable => failure.with_more_hint(
                    "To search the lists of changes on this machine instead, add --offline",
                ),
                _ => failure,
            })?;
        return Ok(Answer {
            target,
            report,
            as_of: None,
        });
    }
    let target = context.resolve(&target.target)?.target;
    let (as_of, lists) = snapshots::known_lists(&context.state_dir(), &target)?;
    let report = read(&lists, &context.interrupt.cancel())?;
    context.output.note(&format!(
        "from the lists of changes on this machine: {} as it was on {}. The server was not asked",
        text::harmless(&target.to_string()),
        context.shown().time(as_of)
    ));
    Ok(Answer {
        target: target.to_string(),
        report,
        as_of: Some(as_of),
    })
}

/// The target, and what `ask` found in it.
pub(super) fn look<T>(
    context: &Context,
    target: &ReadTarget,
    ask: impl FnOnce(&mut Session, &mut Reporter) -> Result<T, Failure>,
) -> Result<(String, T), Failure> {
    look_in(context, context.prepare_reading(target)?, ask)
}

/// As [`look`], in a container that is prepared already.
pub(super) fn look_in<T>(
    context: &Context,
    prepared: Prepared,
    ask: impl FnOnce(&mut Session, &mut Reporter) -> Result<T, Failure>,
) -> Result<(String, T), Failure> {
    let target = prepared.resolved.target.to_string();
    let mut reporter = Reporter::new(context.output, "");
    let (found, _) = context.in_session(prepared, &mut reporter, ask)?;
    Ok((target, found))
}

/// Warns of what is no complete snapshot.
pub(super) fn note_kind(context: &Context, snapshot: &str, kind: EntryKind) {
    if let Some(what) = inside_text::note(snapshot, kind) {
        context.output.warning(&what);
    }
}

/// As [`print()`], with the time of the lists that it is from.
pub(super) fn print_answer(
    context: &Context,
    command: &str,
    text: &(impl AsRef<[u8]> + ?Sized),
    answer: &Answer<impl Serialize>,
    more: u64,
) -> Result<Exit, Failure> {
    let mut fields = fields(&answer.report)?;
    fields["as_of"] = answer.as_of.map(|at| at.to_string()).into();
    print(context, command, &answer.target, text, &fields, more)
}

/// A result as JSON.
pub(super) fn fields(report: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(report)
        .map_err(|error| Failure::failed("the result has no form in JSON").caused_by(&error))
}

/// Prints a list, and warns if it is not the whole one.
pub(super) fn print(
    context: &Context,
    command: &str,
    target: &str,
    text: &(impl AsRef<[u8]> + ?Sized),
    report: &impl Serialize,
    more: u64,
) -> Result<Exit, Failure> {
    let exit = context.exit(Exit::Done);
    let mut fields = fields(report)?;
    fields["target"] = target.into();
    context
        .output
        .listing(text, &result_json(command, exit, fields))?;
    if more > 0 {
        context.output.warning(&format!(
            "the list is too long: {} not shown. Name a folder, or use a narrower pattern",
            text::counted(more, "more path is", "more paths are")
        ));
    }
    Ok(exit)
}

/// Names for other programs: as they are, each with a zero byte at its end.
pub(super) fn raw(names: impl Iterator<Item = impl AsRef<str>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for name in names {
        bytes.extend(unescape_name(name.as_ref()));
        bytes.push(0);
    }
    bytes
}
