//! The comparison at an opening, and the start of a session whose writes must be compared later.

use sprat_store::lock::{LateUntil, PendingComparison};
use sprat_store::{FileName, StoreErrorKind, StoreFile};

use crate::file_system::FileSystemKind;
use crate::file_system::ranges::merged;
use crate::protocol::messages::VolumeStart;
use crate::protocol::reports::{NotCompared, Notice};
use crate::settings::Access;
use crate::volume_process::knowledge::Knowledge;
use crate::volume_process::late::BLOCK;
use crate::volume_process::late::compare::{Compared, compare};
use crate::volume_process::late::digest::DigestKey;
use crate::volume_process::late::sent::{Replaced, Scope, Sent};
use crate::volume_process::lease::{ContainerLease, LateRecords};
use crate::volume_process::shutdown::EventSender;
use crate::{Exit, Failure, text};

/// What an opening found about late writes.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// Blocks of the volume that were overwritten late, ascending.
    pub overwritten: Vec<u64>,
    /// Sessions whose writes can't be compared.
    pub not_compared: Vec<NotCompared>,
}

/// Compares before anything of the volume is used. A session that writes refuses if blocks were
/// overwritten that no check has reported yet. From here on it records what it sends.
pub(crate) fn begin(
    start: &VolumeStart,
    lease: &ContainerLease,
    file: &dyn StoreFile,
    (key, offset_bytes): (DigestKey, u64),
    knowledge: &Knowledge,
    events: &EventSender,
) -> Result<Late, Failure> {
    let sent = Sent::new(key);
    // With --ignore-lock the data may change while we read; nothing checks consistency.
    let found = match start.settings.ignore_lock {
        true => LateRecords::default(),
        false => lease.late_records(),
    };
    let late_until = lease.late_until();
    let writes = start.settings.access == Access::ReadWrite;
    let whole = start.settings.verify_cache || (writes && late_until.is_none());
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
            &start.settings.target.to_string(),
            late.overwritten.len(),
        ));
    }
    let Some(until) = late_until else {
        end_watches(lease, &found.0, &compared.compared)?;
        lease.notes_sent(sent);
        return Ok(late);
    };
    begin_recording(lease, &until, compared, &sent)?;
    lease.notes_sent(sent);
    Ok(late)
}

/// Begins to record the session's writes, for a later comparison.
fn begin_recording(
    lease: &ContainerLease,
    until: &LateUntil,
    compared: Compared,
    sent: &Sent,
) -> Result<(), Failure> {
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
        // If nothing would be compared, and it was this machine that died before, a note is not
        // worth that.
        if scope == Scope::All || !compared.listed.is_empty() {
            lease.record_comparison(until.until_s)?;
        }
        // While a list is missing, nobody knows whether the others are still valid.
        let replaced = match compared.uncompared.is_empty() {
            true => Replaced {
                tokens: compared.compared,
                lists: compared.files,
            },
            false => Replaced::default(),
        };
        sent.watch(scope, compared.expected, replaced);
    }
    Ok(())
}

/// The failure of an opening that found an older state. A late write may have made the state older,
/// and not the server: then the file system's stamp block is among the blocks that were overwritten
/// after they were durable, and the failure says so. It stays a failure, because a server that
/// shows an old copy of the container beside newer lists looks the same.
pub(crate) fn explain_older(
    older: Failure,
    start: &VolumeStart,
    lease: &ContainerLease,
    file: &dyn StoreFile,
    (key, offset_bytes): (DigestKey, u64),
    kind: FileSystemKind,
) -> Failure {
    let (lists, notes) = lease.late_records();
    if start.settings.ignore_lock || (lists.is_empty() && notes.is_empty()) {
        return older;
    }
    let Ok(compared) = compare(&*lease.store(), file, &key, (&lists, &notes), true) else {
        return older;
    };
    let overwritten = of_volume(&compared.overwritten, offset_bytes);
    let stamp = kind.stamp_range().start / BLOCK;
    if overwritten.binary_search(&stamp).is_err() {
        return older;
    }
    let blocks = text::counted(overwritten.len() as u64, "block", "blocks");
    older
        .because(format!(
            "{blocks} differ from the data that was made durable, and the file system's super block is \
             one of them: probably a machine that was asleep or had lost its connection has written late"
        ))
        .with_hint(format!(
            "nothing was written. Run `sprat check {} --accept-older-state` on this machine: it names \
             the files that may be damaged. Then back up again: the backup reads damaged files from the \
             source again, never from a snapshot. But if the server shows an old copy of the container, \
             first bring back the newer one",
            start.settings.target
        ))
}

/// Converts blocks of the container to blocks of the volume.
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

/// Nothing can arrive any more, and everything that could be compared was compared: removes notes
/// and lists. A list without a note has no effect, so the lists go last.
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
            // A list may stay, for example if the account may not remove files. It has no effect
            // without its note.
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
            "{} of {target} were overwritten after they had been made durable",
            text::counted(blocks as u64, "block", "blocks")
        ),
    )
    .because(
        "the lock was taken over from a session that still had pending writes: its machine was not off",
    )
    .with_hint(format!(
        "nothing was written. Files in finished snapshots may be damaged. Run `sprat check {target}` on \
         this machine: it names these files. Then back up again: the backup reads damaged files from \
         the source again, never from a snapshot"
    ))
}
