//! `sprat key list`: lists the key slots.

use clap::Args;
use jiff::Timestamp;
use serde_json::json;
use sprat_luks::Slot;
use sprat_session::state::key_notes::KeyNotes;
use sprat_session::text;

use super::super::context::Context;
use super::change::{header_to_show, open};
use crate::args::TARGET_HELP;
use crate::output::result_json;
use crate::{Exit, Failure};

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
}

impl ListArgs {
    pub(super) fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let file = open(context, &resolved)?;
        let header = header_to_show(context, &file)?;
        let notes = KeyNotes::load(&context.state_dir(), header.uuid());
        let slots = header.slots();
        let fields = json!({
            "target": resolved.target.to_string(),
            "uuid": header.uuid(),
            "copies_good": header.copies().both_good(),
            "keys": slots.iter().map(|slot| key_json(slot, &notes)).collect::<Vec<_>>(),
        });
        let json = result_json("key list", Exit::Done, fields);
        context.output.listing(&key_table(&slots, &notes), &json)?;
        if !header.copies().both_good() {
            context.output.warning(
                "one of the two header copies is damaged. To repair it, run `sprat key header-restore`",
            );
        }
        Ok(Exit::Done)
    }
}

fn key_json(slot: &Slot, notes: &KeyNotes) -> serde_json::Value {
    let note = notes.of(&slot.mark);
    json!({
        "slot": slot.number,
        "mark": slot.mark,
        "kdf": slot.kdf,
        "kind": note.map(|note| note.kind),
        "label": note.and_then(|note| note.label.as_ref()),
        "added": note.and_then(|note| note.added),
        "proved": note.and_then(|note| note.proved),
    })
}

fn key_table(slots: &[Slot], notes: &KeyNotes) -> String {
    let title = ["SLOT", "KIND", "ADDED", "TESTED", "LABEL", "DERIVATION"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    let day = |time: Option<Timestamp>| {
        time.map_or_else(
            || "-".to_owned(),
            |time| time.strftime("%Y-%m-%d").to_string(),
        )
    };
    for slot in slots {
        let note = notes.of(&slot.mark);
        // The header shows only how expensive it is to guess a key, not its kind.
        let guess = if slot.kdf.starts_with("pbkdf2") {
            "key file?"
        } else {
            "passphrase?"
        };
        let label = note.and_then(|note| note.label.as_deref()).unwrap_or("-");
        rows.push(vec![
            slot.number.to_string(),
            note.map_or(guess, |note| note.kind.text()).to_owned(),
            day(note.and_then(|note| note.added)),
            day(note.and_then(|note| note.proved)),
            text::harmless_within(label, 40),
            slot.kdf.clone(),
        ]);
    }
    text::table(&rows, &[0])
}
