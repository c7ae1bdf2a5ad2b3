//! The words for what a session reports beside its progress.

use std::path::Path;
use std::time::Duration;

use sprat_session::state::reserved_names;
use sprat_session::{NotCompared, Notice, free_text, text};

/// The words for a notice, and whether it is a warning, which `-q` shows too.
#[must_use]
pub fn notice_text(notice: &Notice) -> (String, bool) {
    match notice {
        Notice::HeaderCopyDamaged { copy } => (
            format!(
                "one of the two copies of the LUKS2 header is damaged ({copy}); sprat used the other \
                 one. The data is complete. To repair the header, run `sprat key header-restore`"
            ),
            true,
        ),
        Notice::TrustedOnce { fingerprint } => (
            format!(
                "this machine sees this container for the first time, and accepts only this one from \
                 now on. Compare the fingerprint with the recovery sheet: {fingerprint}"
            ),
            true,
        ),
        Notice::TookOverDeadSession => (
            "took over the lock of a session that died on this machine".to_owned(),
            false,
        ),
        Notice::Suspects { bytes } => (
            format!(
                "an earlier session died before the server had confirmed {} of its writes. sprat \
                 waits until these writes can no longer arrive, then reads them back",
                text::bytes(*bytes)
            ),
            false,
        ),
        Notice::DeadSessionLeftLock => (
            "a session that was writing died on this machine. The file system's journal is replayed \
             locally; nothing is written to the server"
                .to_owned(),
            false,
        ),
        Notice::LockLeft { reason } => (
            format!(
                "the lock could not be released ({reason}). All data is on the server's disk. The next \
                 run on this machine takes over the lock; another machine needs `sprat unlock`"
            ),
            true,
        ),
        Notice::LockIgnored { holder } => (
            format!(
                "{holder} is ignored. If that session still writes, the data that is read now may be a \
                 mixture of two states: don't rely on it"
            ),
            true,
        ),
        Notice::CacheOutdated => (
            "the container was changed since this machine's last session (by another program, another \
             machine, or a change of keys). The local cache is outdated: sprat reads everything from \
             the server"
                .to_owned(),
            false,
        ),
        Notice::WrittenElsewhere => (
            "another machine or another program wrote to the container since this machine's last session"
                .to_owned(),
            false,
        ),
        Notice::SnapshotsGone { snapshots } => (gone(snapshots), true),
        Notice::OlderStateAccepted => (
            "the container is older than the state that this machine saw last; the older state is \
             accepted from now on"
                .to_owned(),
            true,
        ),
        Notice::NotCompared(note) => (not_compared(note), true),
        Notice::NotListed { reason } => (
            format!(
                "this session can't store the list of its writes beside the container: {reason}. The \
                 container is undamaged. But if an earlier session (before the takeover) overwrites \
                 something later, sprat can't detect that"
            ),
            true,
        ),
        Notice::Overwritten { blocks, files } => (overwritten(*blocks, files), true),
        Notice::NotNoted { reason } => (
            format!(
                "{reason}. The container is undamaged, but sprat may not detect an older state of it"
            ),
            true,
        ),
        Notice::ServerSpaceLow { available_bytes } => (
            format!(
                "only {} are free on the server",
                text::bytes(*available_bytes)
            ),
            true,
        ),
        Notice::MoreThanServerHas {
            available_bytes,
            size_bytes,
        } => (
            format!(
                "the container can grow to {}, but the server has {} free. That is no problem: the file \
                 takes only the space of the data in it, and a backup stops safely before the disk is \
                 full",
                text::bytes(*size_bytes),
                text::bytes(*available_bytes)
            ),
            false,
        ),
        Notice::SuperBlockRestored => (
            "the super block of the file system is damaged, and sprat used its copy. The next command \
             that writes repairs it"
                .to_owned(),
            true,
        ),
        Notice::VolumeSpaceLow {
            available_bytes,
            inodes,
            metadata_bytes,
        } => (
            format!(
                "the volume is nearly full: {} are left. Run `sprat prune` to free space, or `sprat \
                 grow` to enlarge the container",
                free_text(*available_bytes, *inodes, *metadata_bytes)
            ),
            true,
        ),
        Notice::ReserveGivenUp => (
            "the server's disk is full: sprat released the reserve file beside the container to \
             continue. A later command creates it again when there is space"
                .to_owned(),
            true,
        ),
        Notice::NoDurableFlush => (
            "this server has no fsync: if the server crashes, the container can be lost".to_owned(),
            false,
        ),
        Notice::NoFolderFlush => (
            "this server can't make a rename durable at once: a crash of the server in the next seconds \
             can undo the rename"
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
                "the server's file system has no sparse files (exFAT, FAT): from now on the container \
                 takes its full size of {} there",
                text::bytes(*size_bytes)
            ),
            true,
        ),
        Notice::NotHardened { reason } => (format!("sprat could not protect its memory (keys could get \
            into swap or a core dump): {reason}"), false),
        Notice::HeaderNotKept { reason } => (
            format!(
                "{reason}. The container itself is undamaged. Run `sprat key header-backup` to save its \
                 header in another place"
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
                "checking the unconfirmed writes of the session that died: {} of {}",
                text::bytes(*done_bytes),
                text::bytes(*whole_bytes)
            ),
            false,
        ),
        Notice::LateWrites { wait_s } => (
            format!(
                "writes of the lost connection may still arrive at the server. So newer writes to \
                 the same blocks wait for at most {wait_s} s, and so does the end of this run"
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
        [one] => format!("key slot {one} differs"),
        more => format!("key slots {} differ", numbers(more)),
    };
    format!(
        "{which} from the header that this machine has saved: its key may no longer open the container. \
         The other keys open it, and no data is lost"
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
        [one] => parts.push(format!("key slot {one} has other bytes")),
        more => parts.push(format!("key slots {} have other bytes", numbers(more))),
    }
    format!(
        "compared with the header that this machine had saved, {}: a key may no longer open the \
         container. Both headers are saved: the present one in {}, the former one in {}. Test your \
         keys. If a key no longer opens the container, run `sprat key header-restore TARGET {2}`. If \
         you wanted the change, delete {2}: removed keys still open it",
        parts.join(", and "),
        newest.display(),
        kept.display()
    )
}

fn gone(snapshots: &[String]) -> String {
    format!(
        "this machine has seen {} in the container, and {} there any more: {}. Either another machine \
         removed what is missing, or the container was replaced by another copy of it. If nobody removed \
         it, search the server for that copy, and for the right one",
        text::counted(snapshots.len() as u64, "snapshot", "snapshots"),
        if snapshots.len() == 1 {
            "it is not"
        } else {
            "they are not"
        },
        snapshots.join(", ")
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
        "{host} took over the container ({since}), and its session ended without the list of its \
         writes. So sprat can't check whether an earlier session has overwritten these writes. Run \
         `sprat check --read-data`, then `sprat unlock --forget-watch`"
    )
}

fn overwritten(blocks: u64, files: &[String]) -> String {
    let mut said = format!(
        "an earlier session overwrote {} after its lock was taken over",
        text::counted(blocks, "block", "blocks")
    );
    match files.len() {
        0 => said.push_str("; no file uses these blocks"),
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
