//! `sprat key header-backup` and `header-restore`: a header kept elsewhere, and put back.

use std::path::PathBuf;

use serde_json::json;
use sprat_luks::{Header, HeaderBackup, LuksErrorKind};
use sprat_session::state::key_notes::KeyNotes;
use sprat_session::state::paths::{Elsewhere, StatePaths};
use sprat_session::state::{headers, identity};
use sprat_session::{HeaderChange, IdentityPolicy, connect, text};
use sprat_store::StoreFile;

use super::super::context::{Context, Resolved};
use super::{change_header, judged, open, state_dir, warn_of_changed_slots};
use crate::args::{KeyHeaderBackupArgs, KeyHeaderRestoreArgs};
use crate::output::exit_json;
use crate::{Exit, Failure, terminal};

pub(super) fn backup(context: &Context, args: &KeyHeaderBackupArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let file = open(context, &resolved)?;
    let header = judged(context, &resolved, &*file)?;
    warn_of_changed_slots(context, &resolved, &header);
    let kept = whole(&header, &*file)?;
    let path = context.environment.absolute(&args.file);
    headers::write_new(&path, &kept)?;
    let json = json!({
        "command": "key header-backup",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "uuid": header.uuid(),
        "sequence": header.sequence_id(),
        "file": crate::output::path_json(&path),
    });
    let said = format!(
        "kept the header of {} in {} ({} key slots)\n",
        resolved.target,
        path.display(),
        header.slots().len()
    );
    context.output.result(&said, &json)?;
    context.output.note(
        "with today's keys that file opens the container for ever, also with those that are \
         removed later: keep it as you keep the keys",
    );
    Ok(Exit::Done)
}

/// A header that nobody changed while it was read.
fn whole(header: &Header, file: &dyn StoreFile) -> Result<HeaderBackup, Failure> {
    let kept = header.backup(&connect::HeaderBytes(file))?;
    if connect::header(file)?.sequence_id() == header.sequence_id() {
        return Ok(kept);
    }
    Err(Failure::failed("the header was changed while it was read")
        .with_hint("nothing was written. Run it again"))
}

/// What lies where the header belongs.
enum LiesThere {
    /// One that can be of this container.
    Own(Box<Header>),
    /// Something else, in words.
    Another(String),
}

impl LiesThere {
    fn look(file: &dyn StoreFile, policy: &IdentityPolicy) -> Result<Self, Failure> {
        Ok(match Header::load(&connect::HeaderBytes(file)) {
            Ok(present) if policy.fits(&present).is_ok() => Self::Own(Box::new(present)),
            Ok(present) => Self::Another(format!(
                "a header of another container lies there and goes away: {}",
                present.uuid()
            )),
            Err(error) if error.kind() == LuksErrorKind::Read => return Err(error.into()),
            Err(error) => Self::Another(format!(
                "no header of this container lies there, and what does goes away: {error}"
            )),
        })
    }

    fn header(&self) -> Option<&Header> {
        match self {
            Self::Own(header) => Some(header),
            Self::Another(_) => None,
        }
    }
}

pub(super) fn restore(context: &Context, args: &KeyHeaderRestoreArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let file = open(context, &resolved)?;
    let fingerprint = context.global.fingerprint.as_deref();
    let policy = identity::policy(&state_dir(context), &resolved.target, fingerprint)?;
    let lies_there = LiesThere::look(&*file, &policy)?;
    let (path, of_another) = match &args.file {
        Some(path) => (context.environment.absolute(path), None),
        None => {
            let uuid = match (&policy, lies_there.header()) {
                (IdentityPolicy::Known(pins), _) => pins.uuid.clone(),
                (_, Some(header)) => header.uuid().to_owned(),
                _ => {
                    return Err(
                        Failure::usage("this machine keeps no header of that container")
                            .with_hint("name the file that it is kept in"),
                    );
                }
            };
            let paths = StatePaths::new(&state_dir(context), &uuid, &resolved.target);
            name_others(context, args.yes, &headers::others(&paths));
            headers::to_put_back(&paths)
        }
    };
    let from = headers::load(&headers::open(&path)?, &path)?;
    // Known by its pins or by the sheet, it was judged already; that of the kept one comes later.
    if let Some(present) = lies_there.header()
        && from.uuid() != present.uuid()
    {
        return Err(another(&from, present));
    }
    let secret = context.secret(&resolved)?;
    let notes = KeyNotes::load(&state_dir(context), from.uuid());
    if let Some(other) = of_another {
        tell_whose(context, args.yes, &resolved, &other);
    }
    for line in difference(&from, &lies_there, &notes) {
        match args.yes {
            true => context.output.note(&line),
            false => context.output.asked_about(&line),
        }
    }
    if !args.yes && !confirmed(context)? {
        return Err(Failure::interrupted().with_hint("nothing was changed"));
    }
    let change = HeaderChange::Restore {
        kept: path.clone(),
        shown: lies_there.header().map(Header::sequence_id),
    };
    let changed = change_header(context, &resolved, &secret, &change)?;
    let json = json!({
        "command": "key header-restore",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "file": crate::output::path_json(&path),
        "sequence": changed.facts.pins.sequence_id,
        "opened_by": changed.slot,
        "replaced": changed.replaced.as_deref().map(crate::output::path_json),
    });
    let said = format!(
        "put the header of {} back; the given key opens slot {}\n",
        resolved.target, changed.slot
    );
    context.output.result(&said, &json)?;
    if let Some(replaced) = &changed.replaced {
        let kept = format!("what lay there before is kept in {}", replaced.display());
        context.output.note(&kept);
    }
    Ok(Exit::Done)
}

/// Names the kept headers that are not the newest: one of them may hold a key that this one lacks.
fn name_others(context: &Context, yes: bool, others: &[PathBuf]) {
    if others.is_empty() {
        return;
    }
    let others: Vec<String> = others.iter().map(|path| text::quoted(path)).collect();
    let named = format!(
        "other headers of this container are kept, with other key slots: {}. Name one to put that \
         one back",
        others.join(", ")
    );
    match yes {
        true => context.output.note(&named),
        false => context.output.asked_about(&named),
    }
}

fn another(from: &Header, present: &Header) -> Failure {
    Failure::usage("the kept header is another container's")
        .because(format!(
            "it is of {}, this container is {}",
            text::harmless(from.uuid()),
            text::harmless(present.uuid())
        ))
        .with_hint("nothing was changed")
}

/// Says whose header is to be put back where none was kept of the container at this place.
fn tell_whose(context: &Context, yes: bool, resolved: &Resolved, other: &Elsewhere) {
    let target = &resolved.target;
    let begin = format!("no header of {target} itself is kept on this machine; this one is of");
    let told = match &other.target {
        Some(other) => {
            let other = text::harmless(other);
            format!("{begin} {other}, which has the same UUID: it may be a copy with other keys")
        }
        None => format!(
            "{begin} a container with the same UUID, of a place that isn't known any more: it may \
             be a copy with other keys"
        ),
    };
    match yes {
        true => context.output.warning(&told),
        false => context.output.asked_about(&told),
    }
}

fn confirmed(context: &Context) -> Result<bool, Failure> {
    if !terminal::is_there() {
        return Err(Failure::usage("there is no terminal to ask on")
            .with_hint("nothing was changed. Say --yes if that is what you want"));
    }
    let answer = terminal::ask_openly("Type yes to put it back: ", &context.interrupt)?;
    Ok(answer == "yes")
}

/// What would change, in lines.
fn difference(from: &Header, lies_there: &LiesThere, notes: &KeyNotes) -> Vec<String> {
    let present = lies_there.header();
    let now = present.map(Header::slots).unwrap_or_default();
    let then = from.slots();
    let words = |slot: &sprat_luks::Slot| match notes.of(&slot.mark) {
        Some(note) => match &note.label {
            Some(label) => format!(
                "{} ({})",
                note.kind.text(),
                text::harmless_within(label, 40)
            ),
            None => note.kind.text().to_owned(),
        },
        None => slot.kdf.clone(),
    };
    let mut lines = match lies_there {
        LiesThere::Own(present) => vec![format!(
            "the header there has sequence {}, the kept one {}",
            present.sequence_id(),
            from.sequence_id()
        )],
        LiesThere::Another(what) => vec![
            what.clone(),
            format!("the kept header has sequence {}", from.sequence_id()),
        ],
    };
    let has = |slots: &[sprat_luks::Slot], mark: &str| slots.iter().any(|slot| slot.mark == mark);
    for slot in &then {
        let what = if has(&now, &slot.mark) {
            "stays"
        } else {
            "COMES BACK"
        };
        lines.push(format!("  slot {} {what}: {}", slot.number, words(slot)));
    }
    for slot in now.iter().filter(|slot| !has(&then, &slot.mark)) {
        lines.push(format!("  slot {} GOES AWAY: {}", slot.number, words(slot)));
    }
    lines
}
