//! `sprat key header-restore`: restores a saved header.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sprat_luks::{Header, LuksErrorKind};
use sprat_session::closed_container::ClosedContainer;
use sprat_session::state::key_notes::KeyNotes;
use sprat_session::state::paths::{Elsewhere, StatePaths};
use sprat_session::state::{headers, identity};
use sprat_session::{HeaderChange, IdentityPolicy, text};

use super::super::context::{Context, Resolved};
use super::change::{change_header, open};
use crate::args::TARGET_HELP;
use crate::output::path_json;
use crate::{Exit, Failure, terminal};

#[derive(Debug, Args)]
pub(super) struct HeaderRestoreArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// The saved header; the default is the newest one that this machine has saved
    file: Option<PathBuf>,
    /// Do not ask for confirmation
    #[arg(long)]
    yes: bool,
}

impl HeaderRestoreArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let state_dir = context.state_dir();
        let file = open(context, &resolved)?;
        let fingerprint = context.global.fingerprint.as_deref();
        let policy = identity::policy(&state_dir, &resolved.target, fingerprint)?;
        let present = Present::read(&file, &policy)?;
        let (path, of_another) = match &self.file {
            Some(path) => (context.environment.absolute(path), None),
            None => {
                let uuid = match (&policy, present.header()) {
                    (IdentityPolicy::Known(pins), _) => pins.uuid.clone(),
                    (_, Some(header)) => header.uuid().to_owned(),
                    _ => {
                        return Err(Failure::usage(
                            "this machine has no saved header of this container",
                        )
                        .with_hint("nothing was changed. Give the file of a saved header"));
                    }
                };
                let paths = StatePaths::new(&state_dir, &uuid, &resolved.target);
                name_others(context, self.yes, &headers::others(&paths));
                headers::to_put_back(&paths)
            }
        };
        let from = headers::load(&headers::open(&path)?, &path)?;
        // The header there was compared with the pins or the sheet above. The saved one is compared later.
        if let Some(header) = present.header()
            && from.uuid() != header.uuid()
        {
            return Err(another(&from, header));
        }
        let secret = context.secret(&resolved)?;
        let notes = KeyNotes::load(&state_dir, from.uuid());
        if let Some(other) = of_another {
            tell_whose(context, self.yes, &resolved, &other);
        }
        for line in difference(&from, &present, &notes) {
            match self.yes {
                true => context.output.note(&line),
                false => context.output.asked_about(&line),
            }
        }
        if !self.yes && !confirmed(context)? {
            return Err(Failure::interrupted().with_hint("nothing was changed"));
        }
        let change = HeaderChange::Restore {
            kept: path.clone(),
            shown: present.header().map(Header::sequence_id),
        };
        let changed = change_header(context, &resolved, &secret, &change)?;
        let fields = json!({
            "file": path_json(&path),
            "sequence": changed.facts.pins.sequence_id,
            "opened_by": changed.slot,
            "replaced": changed.replaced.as_deref().map(path_json),
        });
        let text = format!(
            "restored the header of {}; the given key opens slot {}\n",
            resolved.target, changed.slot
        );
        let target = &resolved.target;
        context.finish("key header-restore", changed.exit(), target, &text, fields)?;
        if let Some(replaced) = &changed.replaced {
            let kept = format!("the replaced header is saved in {}", replaced.display());
            context.output.note(&kept);
        }
        Ok(changed.exit())
    }
}

/// What is at the header's place.
enum Present {
    /// One that can be of this container.
    Own(Box<Header>),
    /// Something else, in words.
    Another(String),
}

impl Present {
    fn read(file: &ClosedContainer, policy: &IdentityPolicy) -> Result<Self, Failure> {
        Ok(match Header::load(&file.bytes()) {
            Ok(present) if policy.fits(&present).is_ok() => Self::Own(Box::new(present)),
            Ok(present) => Self::Another(format!(
                "the header of another container is there; the restore replaces it: {}",
                present.uuid()
            )),
            Err(error) if error.kind() == LuksErrorKind::Read => return Err(error.into()),
            Err(error) => Self::Another(format!(
                "no header of this container is there; the restore replaces what is there: {error}"
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

/// Names the saved headers that are not the newest: one of them may have a key that this one lacks.
fn name_others(context: &Context, yes: bool, others: &[PathBuf]) {
    if others.is_empty() {
        return;
    }
    let others: Vec<String> = others.iter().map(|path| text::quoted(path)).collect();
    let named = format!(
        "this machine has other saved headers of this container, with other key slots: {}. To restore \
         one of them, give its file",
        others.join(", ")
    );
    match yes {
        true => context.output.note(&named),
        false => context.output.asked_about(&named),
    }
}

fn another(from: &Header, present: &Header) -> Failure {
    Failure::usage("the saved header belongs to another container")
        .because(format!(
            "the saved header has UUID {}, this container has {}",
            text::harmless(from.uuid()),
            text::harmless(present.uuid())
        ))
        .with_hint("nothing was changed")
}

/// Names the container that the saved header is of, if none was saved of the container at this location.
fn tell_whose(context: &Context, yes: bool, resolved: &Resolved, other: &Elsewhere) {
    let target = &resolved.target;
    let begin = format!("this machine has no saved header of {target} itself; this one is of");
    let named = match &other.target {
        Some(other) => {
            let other = text::harmless(other);
            format!("{begin} {other}, which has the same UUID: it may be a copy with other keys")
        }
        None => format!(
            "{begin} a container with the same UUID, at a place that is no longer known: it may be a \
             copy with other keys"
        ),
    };
    match yes {
        true => context.output.warning(&named),
        false => context.output.asked_about(&named),
    }
}

fn confirmed(context: &Context) -> Result<bool, Failure> {
    if !terminal::is_there() {
        return Err(Failure::usage("there is no terminal to ask on")
            .with_hint("nothing was changed. To restore without a question, add --yes"));
    }
    let answer = terminal::ask_openly("Type yes to restore it: ", &context.interrupt)?;
    Ok(answer == "yes")
}

/// What would change, in lines.
fn difference(from: &Header, found: &Present, notes: &KeyNotes) -> Vec<String> {
    let present = found.header();
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
    let mut lines = match found {
        Present::Own(present) => vec![format!(
            "the present header has sequence {}, the saved one {}",
            present.sequence_id(),
            from.sequence_id()
        )],
        Present::Another(what) => vec![
            what.clone(),
            format!("the saved header has sequence {}", from.sequence_id()),
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
