//! `sprat key`: lists, adds and removes keys.

mod header;
mod sheet;

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::json;
use sprat_luks::{Header, LuksErrorKind, RecoveryKey, Secret, Slot, SlotKind};
use sprat_session as session;
use sprat_session::ssh_config::Known;
use sprat_session::state::key_notes::{KeyKind, KeyNote, KeyNotes};
use sprat_session::state::{self, identity, moved};
use sprat_session::{Access, HeaderChange, HeaderChanged, IdentityPolicy, connect, text};
use sprat_store::{Access as StoreAccess, StoreErrorKind, StoreFile};

use super::context::{Context, Resolved};
use super::sheet_files::SheetFiles;
use crate::args::{KeyAddArgs, KeyCommand, KeyRemoveArgs, KeyTargetArgs};
use crate::output::{Reporter, exit_json};
use crate::secrets::{self, SecretSource};
use crate::{Exit, Failure};

pub(super) use sheet::jobs;

pub(super) fn run(context: &Context, command: KeyCommand) -> Result<Exit, Failure> {
    match command {
        KeyCommand::List(args) => list(context, &args),
        KeyCommand::Add(args) => add(context, &args),
        KeyCommand::Remove(args) => remove(context, &args),
        KeyCommand::Sheet(args) => sheet::print_again(context, &args),
        KeyCommand::HeaderBackup(args) => header::backup(context, &args),
        KeyCommand::HeaderRestore(args) => header::restore(context, &args),
        KeyCommand::Rehearse(args) => sheet::rehearse(context, &args),
    }
}

fn state_dir(context: &Context) -> PathBuf {
    context.environment.absolute(&context.global.state_dir)
}

/// The container's file, open for reading; no lock, nothing is written.
fn open(context: &Context, resolved: &Resolved) -> Result<Arc<dyn StoreFile>, Failure> {
    let store = connect::connect(&resolved.target, &resolved.ssh_command)?;
    match store.open(&resolved.target.name, StoreAccess::ReadOnly) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == StoreErrorKind::NotFound => {
            Err(moved::no_container(&state_dir(context), &resolved.target))
        }
        Err(error) => Err(Failure::from(&error)),
    }
}

/// The container's header, compared with what is pinned here or was given.
fn judged(context: &Context, resolved: &Resolved, file: &dyn StoreFile) -> Result<Header, Failure> {
    let fingerprint = context.global.fingerprint.as_deref();
    let policy = identity::policy(&state_dir(context), &resolved.target, fingerprint)?;
    let header = Header::load(&connect::HeaderBytes(file)).map_err(|error| match error.kind() {
        LuksErrorKind::NoContainer | LuksErrorKind::Damaged => {
            state::header_unreadable(&state_dir(context), &resolved.target, &policy, &error)
        }
        _ => Failure::of_key_work(&error),
    })?;
    match policy {
        IdentityPolicy::Known(pins) => header.check_pins(&pins)?,
        IdentityPolicy::Expect(typed) => check_typed(context, resolved, &header, &typed)?,
        IdentityPolicy::TrustOnce => context.output.note(&format!(
            "nothing is pinned of this container here; compare its fingerprint {} with the \
             recovery sheet",
            header.pins().fingerprint()
        )),
    }
    Ok(header)
}

/// Warns where key slots are gone or changed. For commands that use no key: they show what is there.
fn warn_of_changed_slots(context: &Context, resolved: &Resolved, header: &Header) {
    let slots = header.slot_digests();
    if context.global.accept_changed_keys {
        return;
    }
    let checked = state::check_slots(&state_dir(context), &resolved.target, header.uuid(), &slots);
    if let Err(failure) = checked {
        context.warn(&failure);
    }
}

/// Compares the header with a fingerprint off the sheet.
fn check_typed(
    context: &Context,
    resolved: &Resolved,
    header: &Header,
    typed: &str,
) -> Result<(), Failure> {
    let Err(error) = header.check_fingerprint(typed) else {
        return Ok(());
    };
    if !identity::is_known(&state_dir(context), &resolved.target, header) {
        return Err(error.into());
    }
    Err(Failure::new(
        Exit::Damaged,
        "that is not this container's fingerprint: compare it with the sheet",
    )
    .because(format!(
        "{}, and what is pinned here, say {}",
        resolved.target,
        header.pins().fingerprint()
    ))
    .with_hint("nothing was changed. It is a typing error, or another container's sheet"))
}

fn list(context: &Context, args: &KeyTargetArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let file = open(context, &resolved)?;
    let header = judged(context, &resolved, &*file)?;
    warn_of_changed_slots(context, &resolved, &header);
    let notes = KeyNotes::load(&state_dir(context), header.uuid());
    let slots = header.slots();
    let json = json!({
        "command": "key list",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "uuid": header.uuid(),
        "copies_good": header.copies().both_good(),
        "keys": slots.iter().map(|slot| key_json(slot, &notes)).collect::<Vec<_>>(),
    });
    context.output.listing(&key_table(&slots, &notes), &json)?;
    if !header.copies().both_good() {
        context.output.warning(
            "one of the header's two copies is not good; the next change of keys makes it good \
             again",
        );
    }
    Ok(Exit::Done)
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
    let title = ["SLOT", "KIND", "ADDED", "PROVED", "LABEL", "DERIVATION"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    let day = |time: Option<Timestamp>| {
        time.map_or_else(
            || "-".to_owned(),
            |time| time.strftime("%Y-%m-%d").to_string(),
        )
    };
    for slot in slots {
        let note = notes.of(&slot.mark);
        // The header doesn't say what a key is, only how dear it is to guess.
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

/// A key that is to be added.
struct New {
    secret: Secret,
    slot_kind: SlotKind,
    kind: KeyKind,
    recovery: Option<RecoveryKey>,
}

fn new_key(context: &Context, args: &KeyAddArgs) -> Result<New, Failure> {
    if args.new_recovery {
        let recovery = RecoveryKey::generate()
            .map_err(|error| Failure::from(&error).context("can't make a recovery key"))?;
        return Ok(New {
            secret: recovery.secret(),
            slot_kind: SlotKind::Recovery,
            kind: KeyKind::Recovery,
            recovery: Some(recovery),
        });
    }
    let absolute = |path: &PathBuf| context.environment.absolute(path);
    let source = match (&args.new_key_file, &args.new_passphrase_file) {
        (Some(path), _) => {
            let path = absolute(path);
            if secrets::make_key_file(&path)? {
                let note = format!("made the key file {}", path.display());
                context.output.note(&note);
            }
            SecretSource::KeyFile(path)
        }
        (None, Some(path)) => SecretSource::PassphraseFile(absolute(path)),
        (None, None) => SecretSource::Terminal,
    };
    let (secret, slot_kind) = source.fetch_for_new(context.output, &context.interrupt)?;
    let kind = match source {
        SecretSource::KeyFile(_) => KeyKind::KeyFile,
        _ => KeyKind::Passphrase,
    };
    Ok(New {
        secret,
        slot_kind,
        kind,
        recovery: None,
    })
}

fn add(context: &Context, args: &KeyAddArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let secret = context.secret(&resolved)?;
    // Before anything is made: it may take seconds.
    let known = match args.new_recovery {
        true => Known::look_up(&resolved.target, &resolved.ssh_command),
        false => Known::default(),
    };
    let on_stdout = context.output.json || args.sheet.is_none();
    let files = SheetFiles::create(
        context,
        args.sheet.as_ref(),
        args.html.as_ref(),
        args.new_recovery && on_stdout,
    )?;
    let new = new_key(context, args).inspect_err(|_| files.remove())?;
    let change = HeaderChange::Add {
        secret: new.secret,
        kind: new.slot_kind,
        fast_kdf_for_tests: context.global.cheap_kdf_for_tests,
    };
    let changed = match change_header(context, &resolved, &secret, &change) {
        Ok(changed) => changed,
        Err(failure) => {
            files.remove();
            return Err(match new.kind {
                KeyKind::Recovery => failure.with_more_hint(
                    "The new recovery key was thrown away: if `sprat key list` shows a new slot, \
                     remove it",
                ),
                _ => failure,
            });
        }
    };
    note_key(context, &changed, |notes| {
        let known = notes.of(&changed.mark).cloned();
        let known = known.filter(|_| changed.as_before).unwrap_or(KeyNote {
            mark: changed.mark.clone(),
            kind: new.kind,
            label: None,
            added: Some(Timestamp::now()),
            proved: None,
        });
        notes.note(KeyNote {
            label: args.label.clone().or(known.label),
            ..known
        });
    });
    let json = json!({
        "command": "key add",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "slot": changed.slot,
        "was_there": changed.as_before,
        "recovery_key": new.recovery.as_ref().map(RecoveryKey::text),
    });
    let was_there = if changed.as_before {
        "opens already with"
    } else {
        "opens with the new key, in"
    };
    let said = format!(
        "{} {was_there} key slot {}\n",
        resolved.target, changed.slot
    );
    match &new.recovery {
        Some(recovery) => {
            let key_file = sheet::key_file_now(context, &resolved, &secret);
            let shown = sheet::Shown {
                resolved: &resolved,
                pins: &changed.facts.pins,
                key_file,
                known: &known,
                recovery: Some(recovery.text()),
                files: &files,
                text: true,
            };
            shown.print(context, &json).map_err(|failure| {
                failure.with_hint(format!(
                    "the new recovery key is in slot {}, and not all of its sheet was shown. Where \
                     you have it, `sprat key sheet` prints it again; else remove the slot with \
                     `sprat key remove` and add another key",
                    changed.slot
                ))
            })?;
            context.output.note(said.trim_end());
        }
        None => context.output.result(&said, &json)?,
    }
    Ok(Exit::Done)
}

fn remove(context: &Context, args: &KeyRemoveArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let secret = context.secret(&resolved)?;
    if !args.allow_last {
        refuse_last(context, &resolved, args.slot)?;
    }
    let change = HeaderChange::Remove {
        slot: args.slot,
        although_in_use: args.although_in_use,
        used_here: used_here(context, &resolved, args)?,
    };
    let changed = change_header(context, &resolved, &secret, &change)?;
    note_key(context, &changed, |notes| notes.removed(&changed.mark));
    let json = json!({
        "command": "key remove",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "slot": changed.slot,
        "was_gone": changed.as_before,
    });
    let said = if changed.as_before {
        format!("key slot {} was gone already\n", args.slot)
    } else {
        format!("removed key slot {}\n", args.slot)
    };
    context.output.result(&said, &json)?;
    context.output.note(
        "what was removed is the slot, not the past: whoever kept an old copy of the container \
         file or of its header (the server, a snapshot of its disk) can still open that copy with \
         the removed key. If the key is in wrong hands, make a new container",
    );
    Ok(Exit::Done)
}

/// Refuses to remove what the printed sheet shows, or the last key that is more than a file. What a key
/// is this machine knows of those that it added; of others their derivation says as much as a key file's
/// does.
fn refuse_last(context: &Context, resolved: &Resolved, slot: u32) -> Result<(), Failure> {
    let file = open(context, resolved)?;
    // A header that can't be used the change itself judges, with the right words.
    let Ok(header) = Header::load(&connect::HeaderBytes(&*file)) else {
        return Ok(());
    };
    let notes = KeyNotes::load(&state_dir(context), header.uuid());
    let kind = |slot: &Slot| match notes.of(&slot.mark) {
        Some(note) => Some(note.kind),
        None if slot.kdf.starts_with("pbkdf2") => Some(KeyKind::KeyFile),
        None => None,
    };
    let slots = header.slots();
    let Some(going) = slots.iter().find(|found| found.number == slot) else {
        return Ok(());
    };
    if slots.len() == 1 {
        // That one is never removed.
        return Ok(());
    }
    let going = kind(going);
    let left: Vec<_> = slots
        .iter()
        .filter(|left| left.number != slot)
        .map(kind)
        .collect();
    let what = match going {
        Some(KeyKind::KeyFile) => return Ok(()),
        _ if left.iter().all(|kind| *kind == Some(KeyKind::KeyFile)) => {
            "the only key that is not a file: once the key files are lost, nobody can open the container"
        }
        Some(KeyKind::Passphrase) => return Ok(()),
        // One that this machine doesn't know may be a recovery key as well.
        _ if left
            .iter()
            .any(|kind| matches!(kind, None | Some(KeyKind::Recovery))) =>
        {
            return Ok(());
        }
        _ => "the only recovery key: the printed recovery sheet would open nothing any more",
    };
    Err(
        Failure::usage(format!("key slot {slot} holds {what}")).with_hint(
            "nothing was changed. Make a new recovery key and sheet first: `sprat key add TARGET \
             --new-recovery`; or insist with --allow-last",
        ),
    )
}

/// What this machine's backups open the container with, where another key was given and the
/// removal must not cost it. A file that the config names and that isn't there counts: its disk may
/// just not be mounted. A default key file that is gone is used by nobody.
fn used_here(
    context: &Context,
    resolved: &Resolved,
    args: &KeyRemoveArgs,
) -> Result<Option<Secret>, Failure> {
    let own = &resolved.own_secret;
    let asked = matches!(own, SecretSource::Terminal);
    if args.although_in_use || asked || *own == resolved.secret {
        return Ok(None);
    }
    let fetched = context.fetch(own);
    Ok(Some(fetched.map_err(|failure| {
        failure
            .context(format!(
                "can't tell whether this machine's backups use key slot {}",
                args.slot
            ))
            .with_hint(
                "nothing was changed. Make what the config names readable (is its disk mounted?); or, \
                 if it is gone for good, insist with --although-in-use",
            )
    })?))
}

/// Changes the header, and pins what it is now.
fn change_header(
    context: &Context,
    resolved: &Resolved,
    secret: &Secret,
    change: &HeaderChange,
) -> Result<HeaderChanged, Failure> {
    let options = context.session_options(resolved, Access::ReadWrite)?;
    let state_dir = options.state_dir.clone();
    let mut reporter = Reporter::new(context.output, "");
    let changed =
        session::change_header(options, secret, change, &mut reporter, &context.interrupt);
    reporter.clear();
    let changed = changed?;
    if let Err(failure) = identity::store(&state_dir, &resolved.target, &changed.facts.pins) {
        context.warn(&failure);
    }
    if let Err(reason) = &changed.kept {
        context.output.warning(reason);
    }
    if changed.repaired {
        context
            .output
            .note("a copy of the header that an interrupted change had left was made good");
    }
    if let Some(reason) = &changed.lock_left {
        context.output.warning(&format!(
            "everything is done and durable, but the lock could not be given back ({reason}); the \
             next command of this machine takes it over"
        ));
    }
    Ok(changed)
}

/// Notes what is known of a key; that it can't be noted changes nothing of the container.
fn note_key(context: &Context, changed: &HeaderChanged, edit: impl FnOnce(&mut KeyNotes)) {
    let state_dir = state_dir(context);
    let uuid = &changed.facts.uuid;
    let mut notes = KeyNotes::load(&state_dir, uuid);
    edit(&mut notes);
    if let Err(failure) = notes.store(&state_dir, uuid) {
        context.warn(&failure);
    }
}
