//! The comparison at an opening, and the beginning of a session that is watched.

use sprat_store::lock::PendingComparison;
use sprat_store::{FileName, StoreErrorKind, StoreFile};

use crate::protocol::messages::VolumeStart;
use crate::settings::{Access, NotCompared, Notice};
use crate::volume_process::knowledge::Knowledge;
use crate::volume_process::late::BLOCK;
use crate::volume_process::late::compare::{Compared, compare};
use crate::volume_process::late::digest::DigestKey;
use crate::volume_process::late::sent::{Replaced, Scope, Sent};
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::ranges::merged;
use crate::volume_process::shutdown::EventSender;
use crate::{Exit, Failure, text};

/// What an opening found of late writes.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// Blocks of the volume that were overwritten late, ascending.
    pub overwritten: Vec<u64>,
    /// Sessions whose writes can't be compared.
    pub not_compared: Vec<NotCompared>,
}

/// The lists beside a container, and the notes in its lease.
pub(crate) type Found = (Vec<FileName>, Vec<PendingComparison>);

/// Compares, before anything of the volume is used. A session that writes refuses what is overwritten
/// and was not named by a check yet; from here on it notes what it sends.
pub(crate) fn begin(
    start: &VolumeStart,
    lease: &ContainerLease,
    file: &dyn StoreFile,
    (key, offset_bytes): (DigestKey, u64),
    knowledge: &Knowledge,
    events: &EventSender,
) -> Result<Late, Failure> {
    let sent = Sent::new(key);
    // Who insists on reading what another holds gets what it gets.
    let found = match start.ignore_lock {
        true => Found::default(),
        false => lease.late_found(),
    };
    let late_until = lease.late_until();
    let writes = start.access == Access::ReadWrite;
    let whole = start.past_cache || (writes && late_until.is_none());
    let compared = match found.0.is_empty() && found.1.is_empty() {
        true => Compared::default(),
        false => {
            let found = (&found.0[..], &found.1[..]);
            compare(&*lease.store(), file, sent.key(), found, whole)?
        }
    };
    let late = Late {
        overwritten: of_volume(&compared.overwritten, offset_bytes),
        not_compared: compared.uncompared.iter().map(not_compared).collect(),
    };
    for note in &late.not_compared {
        events.notice(Notice::NotCompared(note.clone()));
    }
    if !writes {
        lease.notes_sent(sent);
        return Ok(late);
    }
    if !knowledge.knows_overwritten(&late.overwritten) {
        return Err(overwritten(
            &start.target.to_string(),
            late.overwritten.len(),
        ));
    }
    let Some(until) = late_until else {
        end_watches(lease, &found.0, &compared.compared)?;
        lease.notes_sent(sent);
        return Ok(late);
    };
    let scope = match until.own_only {
        false => Scope::All,
        true => Scope::Within(merged(
            lease
                .record()
                .in_doubt()
                .into_iter()
                .map(|range| range.start / BLOCK..range.end.div_ceil(BLOCK))
                .chain(compared.listed.iter().cloned())
                .collect(),
        )),
    };
    if scope != Scope::Within(Vec::new()) {
        // A session that dies after this leaves a note without a list: nobody knows what it wrote.
        // Where nobody compares anything, and this machine died before, that is not worth a note.
        if scope == Scope::All || !compared.listed.is_empty() {
            lease.record_comparison(until.until_s)?;
        }
        // While a list is missing nobody knows what the others are worth.
        let replaced = match compared.uncompared.is_empty() {
            true => Replaced {
                tokens: compared.compared,
                lists: compared.files,
            },
            false => Replaced::default(),
        };
        sent.watch(scope, compared.expected, replaced);
    }
    lease.notes_sent(sent);
    Ok(late)
}

/// The failure of an opening that found an older state. Where the blocks that were overwritten after they had
/// been made durable have the file system's first among them, a late write made the state older, and not
/// the server: the failure says so. It stays a failure, since a server that shows an old copy of the
/// container beside newer lists looks the same.
pub(crate) fn why_older(
    older: Failure,
    start: &VolumeStart,
    lease: &ContainerLease,
    file: &dyn StoreFile,
    (key, offset_bytes): (DigestKey, u64),
) -> Failure {
    let (lists, notes) = lease.late_found();
    if start.ignore_lock || (lists.is_empty() && notes.is_empty()) {
        return older;
    }
    let Ok(compared) = compare(&*lease.store(), file, &key, (&lists, &notes), true) else {
        return older;
    };
    let overwritten = of_volume(&compared.overwritten, offset_bytes);
    if overwritten.first() != Some(&0) {
        return older;
    }
    let blocks = text::counted(overwritten.len() as u64, "block", "blocks");
    older
        .because(format!(
            "{blocks} hold other bytes than were made durable there, the file system's first block among \
             them: a machine that slept or lost its connection has probably written late"
        ))
        .with_hint(format!(
            "nothing was written. Run `sprat check {} --accept-older-state` on this machine: it names the \
             files that may be damaged. Then back up again: what is damaged is read from its source again, \
             never from a snapshot. But if the server shows an old copy of the file, put the newer one \
             back first",
            start.target
        ))
}

/// Container blocks as the volume's.
fn of_volume(blocks: &[u64], offset_bytes: u64) -> Vec<u64> {
    let first = offset_bytes / BLOCK;
    blocks
        .iter()
        .filter_map(|block| block.checked_sub(first))
        .collect()
}

fn not_compared(note: &PendingComparison) -> NotCompared {
    NotCompared {
        host: note.host.clone(),
        since_s: note.since_s(),
    }
}

/// Nothing can arrive any more and all that could was compared: notes and lists go. A list without
/// a note is of no use, so it goes last.
fn end_watches(
    lease: &ContainerLease,
    lists: &[FileName],
    compared: &[String],
) -> Result<(), Failure> {
    if !compared.is_empty() {
        lease.drop_comparisons(compared)?;
    }
    let store = lease.store();
    for list in lists {
        match store.remove_if_there(list) {
            Err(error) if error.kind() == StoreErrorKind::Disconnected => {
                return Err(Failure::from(&error));
            }
            // One that stays, as with an account that may not remove, is of no account without its note.
            _ => {}
        }
    }
    Ok(())
}

/// The failure of a session that would write.
fn overwritten(target: &str, blocks: usize) -> Failure {
    Failure::new(
        Exit::Damaged,
        format!(
            "{} of {target} were overwritten after they had been written and made durable",
            text::counted(blocks as u64, "block", "blocks")
        ),
    )
    .because(
        "the container was taken over from a session that still had bytes on their way: its \
         machine was not off",
    )
    .with_hint(format!(
        "nothing was written. Files in finished snapshots may be damaged. Run `sprat check {target}` \
         on this machine: it names them. Then back up again: what is damaged is read from its source \
         again, never from a snapshot"
    ))
}
