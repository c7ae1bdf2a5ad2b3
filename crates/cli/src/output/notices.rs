//! The words for what a session reports beside its progress.

use std::path::Path;
use std::time::Duration;

use sprat_session::state::reserved_names;
use sprat_session::{NotCompared, Notice, text};

/// The words for a notice, and whether it is a warning, which `-q` shows too.
pub(super) fn notice_text(notice: &Notice) -> (String, bool) {
    match notice {
        Notice::HeaderCopyDamaged { copy } => (
            format!(
                "one of the two copies of the LUKS2 header is damaged ({copy}); the other one was \
                 used. The data is whole, but repair it soon: `cryptsetup repair` on the \
                 container file"
            ),
            true,
        ),
        Notice::TrustedOnce { fingerprint } => (
            format!(
                "this machine didn't know this container: its header is trusted and pinned from \
                 now on. Compare with the recovery sheet: fingerprint {fingerprint}"
            ),
            true,
        ),
        Notice::TookOverDeadSession => (
            "took over the lock of a session that died on this machine".to_owned(),
            false,
        ),
        Notice::Suspects { bytes } => (
            format!(
                "a session that died had {} in flight: waiting until the server can't write it any \
                 more; all of it is read back before success is reported",
                text::bytes(*bytes)
            ),
            false,
        ),
        Notice::DeadSessionLeftLock => (
            "a session that was writing died on this machine; its journal is replayed locally, \
             nothing is written to the server"
                .to_owned(),
            false,
        ),
        Notice::LockLeft { reason } => (
            format!(
                "the lock could not be released ({reason}). Everything is on the server's disk. The \
                 next run of this machine takes the lock over; other machines need `sprat \
                 unlock`"
            ),
            true,
        ),
        Notice::LockIgnored { holder } => (
            format!(
                "{holder} is ignored; if that session still writes, what is read now may be a \
                 mixture of two states: don't rely on it"
            ),
            true,
        ),
        Notice::CacheOutdated => (
            "the container was changed since this machine's last session (by stock tools, another \
             machine, or a change of keys): the local cache is outdated and not used, everything is \
             read again"
                .to_owned(),
            false,
        ),
        Notice::WrittenElsewhere => (
            "the container was written to since this machine's last session, by another machine or \
             by stock tools"
                .to_owned(),
            false,
        ),
        Notice::OlderStateAccepted => (
            "the container is older than this machine knew it; this state is accepted from now on"
                .to_owned(),
            true,
        ),
        Notice::NotCompared(note) => (not_compared(note), true),
        Notice::NotListed { reason } => (
            format!(
                "this session can't store the list of its writes beside the container: {reason}. \
                 The container is in order. But if a session that it was taken over from overwrites \
                 something later, that can't be detected"
            ),
            true,
        ),
        Notice::Overwritten { blocks, files } => (overwritten(*blocks, files), true),
        Notice::NotNoted { reason } => (
            format!(
                "{reason}. The container is in order; but an older state of it may not be detected"
            ),
            true,
        ),
        Notice::ServerSpaceLow { available_bytes } => (
            format!(
                "only {} are left on the server",
                text::bytes(*available_bytes)
            ),
            true,
        ),
        Notice::MoreThanServerHas {
            available_bytes,
            size_bytes,
        } => (
            format!(
                "the container may grow to {}, and {} are free on the server: it is sparse and takes \
                 only the space of what is written, and a backup stops safely before that disk is full",
                text::bytes(*size_bytes),
                text::bytes(*available_bytes)
            ),
            false,
        ),
        Notice::VolumeSpaceLow {
            available_bytes,
            inodes,
        } => (
            format!(
                "the volume is nearly full: room for {} and {} is left. `sprat prune` makes room, \
                 `sprat grow` makes the container larger",
                text::bytes(*available_bytes),
                text::counted(*inodes, "file", "files")
            ),
            true,
        ),
        Notice::ReserveGivenUp => (
            "the server's disk is full: the reserve beside the container was released to continue; it \
             is created again once there is room"
                .to_owned(),
            true,
        ),
        Notice::NoDurableFlush => (
            "this server can't fsync: if it crashes, the container may be lost".to_owned(),
            false,
        ),
        Notice::NoFolderFlush => (
            "this server can't make a rename durable at once; a crash of the server in the next \
             seconds may undo it"
                .to_owned(),
            false,
        ),
        Notice::NothingRemoved => (
            format!(
                "this account may not remove files on the server: {}",
                reserved_names::WITHOUT_REMOVING
            ),
            false,
        ),
        Notice::HolesFilled { size_bytes } => (
            format!(
                "the server's file system has no sparse files (exFAT, FAT): the container takes its \
                 whole size of {} there from now on",
                text::bytes(*size_bytes)
            ),
            true,
        ),
        Notice::NotHardened { reason } => (format!("not hardened: {reason}"), false),
        Notice::HeaderNotKept { reason } => (
            format!(
                "{reason}. The container itself is in order. `sprat key header-backup` saves its \
                 header where there is room"
            ),
            true,
        ),
        Notice::SlotsDiffer {
            gone,
            slots,
            kept,
            newest,
        } => (slots_differ(gone, slots, kept, newest), true),
        Notice::SlotAreasDiffer { slots } => (areas_differ(slots), true),
        Notice::TrimRoutePassed { reason } => (reason.clone(), false),
        Notice::Settling {
            done_bytes,
            whole_bytes,
        } => (
            format!(
                "recovering the in-doubt writes of the dead session: {} of {}",
                text::bytes(*done_bytes),
                text::bytes(*whole_bytes)
            ),
            false,
        ),
        Notice::LateWrites { wait_s } => (
            format!(
                "the server may still execute writes of the lost connection: newer writes to the \
                 same blocks wait, and so does the end of this run, for at most {wait_s} s"
            ),
            false,
        ),
        Notice::LineLost { reason } => (
            format!("connection lost, reconnecting: {reason}"),
            false,
        ),
        Notice::LineBack { away_s } => (
            format!(
                "connection restored after {}",
                text::duration(Duration::from_secs(*away_s))
            ),
            false,
        ),
    }
}

fn numbers(slots: &[u32]) -> String {
    let slots: Vec<String> = slots.iter().map(u32::to_string).collect();
    slots.join(", ")
}

fn areas_differ(slots: &[u32]) -> String {
    let which = match slots {
        [one] => format!("the area of key slot {one} holds"),
        more => format!("the areas of key slots {} hold", numbers(more)),
    };
    format!(
        "{which} other bytes than in the header that this machine keeps: the key of that slot may open \
         nothing any more. All data is there for the other keys"
    )
}

fn slots_differ(gone: &[u32], differ: &[u32], kept: &Path, newest: &Path) -> String {
    let mut parts = Vec::new();
    match gone {
        [] => {}
        [one] => parts.push(format!("key slot {one} is gone or was changed")),
        more => parts.push(format!(
            "key slots {} are gone or were changed",
            numbers(more)
        )),
    }
    match differ {
        [] => {}
        [one] => parts.push(format!("the area of key slot {one} holds other bytes")),
        more => parts.push(format!(
            "the areas of key slots {} hold other bytes",
            numbers(more)
        )),
    }
    format!(
        "compared with the header that this machine had kept, {}: a key may open nothing any \
         more. Both headers are kept: the present one in {}, the former one in {}. Test your keys. If a \
         key no longer opens the container, run `sprat key header-restore TARGET {2}`. If you wanted the \
         change, delete {2}: removed keys still open it",
        parts.join(", and "),
        newest.display(),
        kept.display()
    )
}

/// Largest number of file names in a message.
const FILES_SAID: usize = 10;

fn not_compared(note: &NotCompared) -> String {
    let since = i64::try_from(note.since_s).ok();
    let since = since.and_then(|since| jiff::Timestamp::from_second(since).ok());
    let since = since.map_or_else(|| "an unknown time".to_owned(), |since| since.to_string());
    let host = match note.host.is_empty() {
        true => "several machines".to_owned(),
        false => format!("host {}", text::harmless(&note.host)),
    };
    format!(
        "what {host} wrote after it took the container over ({since}) has not been compared yet, and \
         its list is missing: that session did not end in order. Whether the session before \
         overwrote something of it later is not known. Run `sprat check --read-data`, and then \
         `sprat unlock --forget-watch`"
    )
}

fn overwritten(blocks: u64, files: &[String]) -> String {
    let mut said = format!(
        "{} were overwritten by a session that the container was taken over from",
        text::counted(blocks, "block", "blocks")
    );
    match files.len() {
        0 => said.push_str("; no file has content there"),
        more => {
            let names: Vec<&str> = files.iter().take(FILES_SAID).map(String::as_str).collect();
            said.push_str("; damaged: ");
            said.push_str(&names.join(", "));
            if more > FILES_SAID {
                said.push_str(", …; `sprat check` names all");
            }
        }
    }
    said
}
