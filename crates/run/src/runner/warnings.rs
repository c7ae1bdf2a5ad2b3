//! The words for what a run's record warns of.

use sprat_session::text;
use sprat_snapshot::Warning;

/// Largest number of the kernel's own file systems that are named one by one; JSON has all of them.
const KERNEL_PLACES_SHOWN_MAX: usize = 3;

/// The words for what a run's record warns of.
fn warning_text(warning: &Warning) -> String {
    use Warning as W;
    match warning {
        W::ClockBehind { newest } => {
            format!("this machine's clock is behind the newest snapshot, {newest}. Check the clock")
        }
        W::OwnVolumeLeftOut { path } => format!("excluded {path}: the volume itself"),
        W::KernelFileSystemLeftOut { path } => {
            format!("excluded {path}: a file system of the kernel")
        }
        W::LatestLeftAlone => {
            "`latest` in the volume was not made by sprat; it was not changed".to_owned()
        }
        W::CrashedRunSwept { files } => format!(
            "the previous run crashed: {} of it copied again",
            text::counted(*files, "file", "files")
        ),
        W::ChangesNotListed { reason } => {
            format!(
                "what this run changed could not be listed: {reason}. The snapshot is not affected"
            )
        }
        W::LeftoverKept { folder, reason } => {
            format!("the interrupted snapshot {folder} could not be removed: {reason}")
        }
        W::UnmountedMeanwhile { path } => format!(
            "{path} was unmounted or mounted again during the backup: the snapshot is NOT complete"
        ),
        W::MountedMeanwhile { path } => format!(
            "something was mounted at {path} during the backup: the snapshot is NOT complete"
        ),
        W::NotMounted { path, before, .. } => format!(
            "{path} is not mounted: this snapshot lacks its disk. Snapshot {before} has the disk, and \
             prune keeps that snapshot. Mount the disk, or exclude {path}. If the disk is gone for \
             good, run one backup with --disk-gone {path}"
        ),
        W::OtherFileSystem {
            path,
            before,
            was,
            now,
            ..
        } => format!(
            "{path}: another file system ({now}) is mounted there than before ({was}). This snapshot \
             has the new one. Snapshot {before} has the former one, and prune keeps that snapshot. If \
             the former one is gone for good, run one backup with --disk-gone {path}"
        ),
        W::AutomountEmpty { path } => {
            format!("{path}: the automount failed, so this snapshot has no files of it")
        }
        W::FoldersVanished { folders } => format!(
            "{} moved or removed during the backup: the snapshot is NOT complete",
            text::counted(*folders, "folder was", "folders were")
        ),
        W::ManyVanished { files } => format!(
            "{} vanished during the backup. That is a large part, so the snapshot counts as NOT complete",
            text::counted(*files, "file", "files")
        ),
        W::AttributesTooLarge { files } => format!(
            "{} with more attributes (xattrs, ACLs) than the volume can store, about 4 KiB for each \
             file: the snapshot has the content, but lacks some of the attributes",
            text::counted(*files, "file", "files")
        ),
        W::DamageHealed { files } => format!(
            "{} that a check had found damaged in an older snapshot: read from the source again, and \
             correct in this snapshot. Older snapshots keep the damage",
            text::counted(*files, "file", "files")
        ),
        W::MissedChangeCopied { files } => format!(
            "{} changed without a new size or time, so that an older snapshot missed the change: this \
             snapshot has the new content",
            text::counted(*files, "file", "files")
        ),
        W::LatestNotMoved { reason } => format!(
            "the snapshot is complete, but the link `latest` could not be set to it: {reason}"
        ),
        W::AttributesRefused { files } => format!(
            "{} with attributes that the volume's file system refuses: the snapshot has the content, \
             but lacks these attributes",
            text::counted(*files, "file", "files")
        ),
        W::GroupRightsUnknown { folders } => format!(
            "{} with the sticky bit and an ACL: the owning group may lack its rights in this snapshot, \
             because they could not be compared with the source",
            text::counted(*folders, "folder", "folders")
        ),
        W::SourceLeftOut { path, why } => {
            format!("source {path}: {why}; the snapshot is made without it")
        }
        W::LinksSplit { path } => format!(
            "{path} has more hard links than the volume allows for one file (older snapshots count, \
             too). Nothing is missing: sprat stored the file once more"
        ),
        W::UnchangedCopied { files } => format!(
            "rsync copied at least {} that did not change, instead of linking {}. So the volume fills \
             up without need. Some releases of rsync ignore --link-dest: run `sprat doctor` to test \
             yours",
            text::counted(*files, "file", "files"),
            if *files == 1 { "it" } else { "them" }
        ),
        W::HolesRead {
            path,
            bytes,
            data_bytes,
        } => format!(
            "{path} is {} long, but has only {} of data. rsync reads the holes, too, so each change of \
             the file takes long. If you don't need the file, exclude it: --exclude {}",
            text::bytes(*bytes),
            text::bytes(*data_bytes),
            text::quoted(std::path::Path::new(path))
        ),
        W::ForeignObject { path, done } => {
            format!("{path} in the volume was not made by sprat; it was {done}")
        }
        W::NewTooLarge {
            path,
            files,
            larger_than,
        } => format!(
            "excluded for the first time, because of a size over {}: {}, such as {path}",
            text::bytes(*larger_than),
            text::counted(*files, "file", "files")
        ),
        W::DumpShrank {
            path,
            bytes,
            before_bytes,
        } => format!(
            "{path} has {}, less than half of the {} that it had before: is it complete?",
            text::bytes(*bytes),
            text::bytes(*before_bytes)
        ),
        W::SubvolumesLeftOut { path, subvolumes } => format!(
            "{path}{} of btrfs, which one_file_system excludes: empty in this snapshot. Add {} as a \
             source of its own, or exclude it by a pattern",
            match subvolumes {
                1 => " is a subvolume".to_owned(),
                more => format!(" and {} more are subvolumes", more - 1),
            },
            if *subvolumes == 1 { "it" } else { "each" }
        ),
        _ => "the run's record has a warning that this version does not know".to_owned(),
    }
}

/// The lines for a run's warnings, and whether each is a warning for the user or only a note.
#[must_use]
pub fn warning_lines(job: &str, warnings: &[Warning]) -> Vec<(String, bool)> {
    let is_kernels =
        |warning: &&Warning| matches!(warning, Warning::KernelFileSystemLeftOut { .. });
    // A backup of `/` leaves out more than ten: one line is enough.
    let kernels = warnings.iter().filter(is_kernels).count();
    let mut said = Vec::new();
    if kernels > KERNEL_PLACES_SHOWN_MAX {
        let text =
            format!("{job}: excluded the file systems of the kernel ({kernels} mount points)");
        said.push((text, false));
    }
    for warning in warnings {
        if is_kernels(&warning) && kernels > KERNEL_PLACES_SHOWN_MAX {
            continue;
        }
        let text = format!("{job}: {}", warning_text(warning));
        said.push((text, warning.lacks_something() || warning.is_of_content()));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_places_of_the_kernels_are_one_line_and_a_few_are_named() {
        let kernels = |count: usize| -> Vec<Warning> {
            let path = |n| format!("/sys/{n}");
            (0..count)
                .map(|n| Warning::KernelFileSystemLeftOut { path: path(n) })
                .collect()
        };
        let few = warning_lines("root", &kernels(KERNEL_PLACES_SHOWN_MAX));
        assert_eq!(few.len(), KERNEL_PLACES_SHOWN_MAX);
        assert!(few[0].0.contains("excluded /sys/0"), "{few:?}");
        let mut many = kernels(15);
        many.push(Warning::FoldersVanished { folders: 1 });
        let many = warning_lines("root", &many);
        assert_eq!(many.len(), 2, "{many:?}");
        assert!(many[0].0.contains("(15 mount points)") && !many[0].1);
        assert!(many[1].1);
    }
}
