//! What the commands of `sprat key` share: the closed container, and changes of its header.

use sprat_luks::{Header, Secret};
use sprat_session::closed_container::ClosedContainer;
use sprat_session::state::identity;
use sprat_session::state::key_notes::KeyNotes;
use sprat_session::{self as session, Access, HeaderChange, HeaderChanged};

use super::super::context::{Context, Resolved};
use crate::Failure;
use crate::output::Reporter;

/// Opens the container file for reading.
pub(in crate::commands) fn open(
    context: &Context,
    resolved: &Resolved,
) -> Result<ClosedContainer, Failure> {
    ClosedContainer::open(context.state_dir(), &resolved.target, &resolved.ssh)
}

/// The header of a closed container, compared with what is pinned on this machine or was given.
pub(in crate::commands) fn header(
    context: &Context,
    file: &ClosedContainer,
) -> Result<Header, Failure> {
    let (header, is_known) = file.header(context.global.fingerprint.as_deref())?;
    if !is_known {
        context.output.note(&format!(
            "this machine does not know this container. Compare its fingerprint {} with the recovery \
             sheet",
            header.pins().fingerprint()
        ));
    }
    Ok(header)
}

/// As [`header`], with a warning if key slots are gone or changed. For commands that use no key and show
/// what is there.
pub(super) fn header_to_show(context: &Context, file: &ClosedContainer) -> Result<Header, Failure> {
    let header = header(context, file)?;
    if !context.global.accept_changed_keys
        && let Err(failure) = file.check_slots(&header)
    {
        context.warn(&failure);
    }
    Ok(header)
}

/// Changes the header, and pins the new one.
pub(super) fn change_header(
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
    let changed = changed.map_err(|failure| context.explain_key(resolved, failure))?;
    if let Err(failure) = identity::store(&state_dir, &resolved.target, &changed.facts.pins) {
        context.warn(&failure);
    }
    if let Err(reason) = &changed.kept {
        context.output.warning(reason);
    }
    if let Some(note) = &changed.agent_note {
        context.output.note(note);
    }
    if changed.repaired {
        context.output.note(
            "an interrupted change of keys had left one header copy incomplete; it was repaired",
        );
    }
    if let Some(reason) = &changed.taken_over {
        context.output.warning(&format!(
            "the keys were changed, but another session took the container over meanwhile, and may have \
             changed them, too ({reason}). Run `sprat key list` to see the present keys"
        ));
    }
    if let Some(reason) = &changed.lock_left {
        context.output.warning(&format!(
            "all is done and durable, but the lock could not be released ({reason}). The next command \
             on this machine takes it over"
        ));
    }
    Ok(changed)
}

/// Notes what is known of a key. A failure is only a warning: the container is changed already.
pub(super) fn note_key(
    context: &Context,
    changed: &HeaderChanged,
    edit: impl FnOnce(&mut KeyNotes),
) {
    let state_dir = context.state_dir();
    let uuid = &changed.facts.uuid;
    let mut notes = KeyNotes::load(&state_dir, uuid);
    edit(&mut notes);
    if let Err(failure) = notes.store(&state_dir, uuid) {
        context.warn(&failure);
    }
}
