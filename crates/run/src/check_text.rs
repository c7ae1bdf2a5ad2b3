//! What people read of a check.

use std::fmt::Write as _;

use sprat_session::check::Checked;
use sprat_session::text;
use sprat_snapshot::{CheckReport, NameList};

/// How many names of each list are shown.
const NAMES_SHOWN: usize = 20;

/// What a check of `target` found. `read_data`: it compared files with an earlier check, not with their source.
#[must_use]
pub fn table(target: &str, read_data: bool, checked: &Checked) -> String {
    let mut out = String::new();
    let header = &checked.header;
    let _ = writeln!(
        out,
        "{target}: {} long, file system of {}",
        text::bytes(checked.facts.file_bytes),
        text::bytes(checked.facts.volume_bytes)
    );
    if header.copies.is_empty() {
        out.push_str("header: both copies are good, and are the ones that this machine knows\n");
    }
    for slot in &header.slots {
        let _ = writeln!(
            out,
            "header: DAMAGED, key slot {slot} differs from the header that this machine has saved"
        );
        out.push_str(
            "  The key of that slot may no longer open the container: test the key with `sprat key \
             rehearse`. If it fails, run `sprat key header-restore`\n",
        );
    }
    for copy in &header.copies {
        let _ = writeln!(out, "header: DAMAGED, {}", text::harmless(copy));
        out.push_str(
            "  The other copy opens the container. To repair the header, run `sprat key \
             header-restore`\n",
        );
    }
    match &checked.file_system {
        None => {}
        Some(found) if found.clean => out.push_str("file system: clean\n"),
        Some(found) => {
            out.push_str("file system: DAMAGED; the check reports:\n");
            for line in found.output.lines().take(NAMES_SHOWN) {
                let _ = writeln!(out, "  {}", text::harmless(line));
            }
        }
    }
    if let Some(errors) = checked.facts.file_system_errors {
        let _ = writeln!(
            out,
            "file system: DAMAGED, marked as faulty: the kernel found {}. First restore the files \
             that you need. To repair it, open the container file with `cryptsetup open`, and run \
             `e2fsck -f` on the mapped device",
            text::counted(errors.into(), "error", "errors")
        );
    }
    if let Some(files) = &checked.overwritten {
        let _ = writeln!(
            out,
            "late writes: DAMAGED, {} overwritten by an earlier session after its lock was taken over. \
             {}",
            text::counted(checked.facts.overwritten.len() as u64, "block", "blocks"),
            match files.count {
                0 if matches!(checked.files, Some(Err(_))) => {
                    "The files that use these blocks are not known: the file system can't be mounted"
                        .to_owned()
                }
                0 =>
                    "No file uses these blocks: they are free, or belong to the file system itself"
                        .to_owned(),
                count => format!(
                    "These blocks belong to files: {} in all snapshots. The next backup reads these \
                     files from the source again",
                    text::counted(count, "path", "paths")
                ),
            }
        );
        for name in files.names.iter().take(NAMES_SHOWN) {
            let _ = writeln!(out, "  {name}");
        }
    }
    if checked.differing_blocks > 0 {
        let _ = writeln!(
            out,
            "server: DAMAGED, {} as this machine wrote them. Either the server's disk is damaged, or \
             the server lost data that it had reported as durable, or it shows an older copy of the file",
            text::counted(checked.differing_blocks, "block is not", "blocks are not")
        );
    }
    match &checked.files {
        None => {}
        Some(Ok(report)) => out.push_str(&files(read_data, report)),
        Some(Err(failure)) => {
            let _ = writeln!(out, "files: not read: {}", text::harmless(&failure.what));
        }
    }
    if checked.is_damaged() {
        out.push_str(
            "What to do: don't back up into this container before you know the cause. First restore the \
             files that you need; files that aren't named here are good as far as they were checked. \
             Then check the server's disk. If the disk can't read some blocks, copy the container file \
             with `ddrescue`: `sprat copy` stops at such a block\n",
        );
    }
    if let Some(Ok(report)) = &checked.files
        && (report.is_damaged() || !report.missed.is_empty())
    {
        out.push_str(
            "Back up again after the cause is removed: the backup reads the damaged files from the \
             source again, if they still exist, and names them. It never links to the damaged content \
             again\n",
        );
    }
    out
}

fn files(read_data: bool, report: &CheckReport) -> String {
    let mut out = format!(
        "files: {} read, {}",
        text::counted(report.files_read, "file", "files"),
        text::bytes(report.bytes_read)
    );
    if report.files_before > 0 {
        let _ = write!(
            out,
            "; {} by earlier runs",
            text::count(report.files_before)
        );
    }
    if read_data {
        let _ = write!(
            out,
            "; {} compared with the checksum of their backup, {} with an earlier check",
            text::count(report.files_listed),
            text::count(report.files_known)
        );
    } else {
        let _ = write!(
            out,
            "; {} the same as in the source",
            text::count(report.same)
        );
    }
    out.push('\n');
    list(&mut out, "CAN'T BE READ", &report.unreadable);
    list(&mut out, "DAMAGED", &report.damaged);
    list(&mut out, "paths with this damage", &report.affected);
    if report.affected_left > 0 {
        let _ = writeln!(
            out,
            "not listed, because the time was over: {} of the damaged files (hard links in other \
             snapshots)",
            text::counted(report.affected_left, "more path", "more paths")
        );
    }
    list(
        &mut out,
        "changed in the source since the backup",
        &report.changed,
    );
    list(
        &mut out,
        "differ from the source although size and time are the same: backups did not notice the change \
         (the next backup from this machine copies them)",
        &report.missed,
    );
    if !report.gone.is_empty() {
        let count = text::count(report.gone.count);
        let _ = writeln!(out, "removed from the source since the backup: {count}");
    }
    list(
        &mut out,
        "NOT IN THE SNAPSHOT, although the source had them when the backup began (the next backup \
         copies them)",
        &report.lacking,
    );
    list(
        &mut out,
        "not in the snapshot: created, moved or mounted since the backup (the next backup copies them)",
        &report.new_since,
    );
    if let Some(why) = &report.lacking_unknown {
        let _ = writeln!(
            out,
            "it is not known which files the snapshot lacks: {}",
            text::harmless(why)
        );
    }
    list(
        &mut out,
        "can't be read in the source",
        &report.source_unreadable,
    );
    if !report.finished {
        out.push_str("not all files were read: run the same command again to continue\n");
    }
    out
}

pub(crate) fn list(out: &mut String, title: &str, names: &NameList) {
    if names.is_empty() {
        return;
    }
    let _ = writeln!(out, "{title}: {}", text::count(names.count));
    for name in names.names.iter().take(NAMES_SHOWN) {
        let _ = writeln!(out, "  {}", text::harmless(name));
    }
    if names.count > NAMES_SHOWN as u64 {
        out.push_str("  …; --json shows more\n");
    }
}
