//! Checks that the container exists, and that it is one regular file.

use std::os::unix::fs::MetadataExt;

use sprat_store::{FileStat, Store, StoreError, StoreErrorKind};

use crate::Failure;
use crate::protocol::messages::VolumeStart;
use crate::settings::Access;
use crate::state::{missing, reserved_names};

pub(crate) fn stat_container(start: &VolumeStart, store: &dyn Store) -> Result<FileStat, Failure> {
    let name = &start.settings.target.name;
    match store.stat(name) {
        // An open that was asked ahead may block the server.
        Ok(stat) if !stat.regular => Err(Failure::from(&StoreError::NotRegular {
            op: "open",
            object: format!("{}/{name}", store.describe()),
        })),
        Ok(stat) => {
            refuse_second_name(start)?;
            Ok(stat)
        }
        Err(error) if error.kind() == StoreErrorKind::NotFound => {
            let failure = missing::no_container(&start.settings.state_dir, &start.settings.target);
            let names = store.list().unwrap_or_default();
            let unfinished = names
                .iter()
                .find(|found| reserved_names::HalfMade::New.has_name(found, name));
            let aside = names
                .iter()
                .find(|found| reserved_names::is_set_aside(found, name));
            Err(if let Some(unfinished) = unfinished {
                failure.with_hint(format!(
                    "there is {unfinished}: an earlier `sprat init` did not finish. Run `sprat init` again"
                ))
            } else if let Some(aside) = aside {
                failure.with_hint(format!(
                    "there is {aside}: the source of a `sprat copy --move` that did not finish. Run the \
                     same command again on the machine where it ran, or rename the file to its old name"
                ))
            } else {
                failure
            })
        }
        Err(error) => Err(Failure::from(&error)),
    }
}

/// Refuses to write to a local file that has a second name. The lease lies beside one of the names,
/// so a session under the other name would write at the same time. SFTP does not report how many
/// names there are.
fn refuse_second_name(start: &VolumeStart) -> Result<(), Failure> {
    let (Access::ReadWrite, Some(path)) =
        (start.settings.access, start.settings.target.local_path())
    else {
        return Ok(());
    };
    let about = std::fs::symlink_metadata(path);
    let links = about.map_or(1, |about| about.nlink());
    if links <= 1 {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{} has {links} names (hard links): two sessions could write to it at once",
        start.settings.target
    ))
    .with_hint(format!(
        "nothing was changed. Find the other names (`find DISK -samefile {}`), and remove them or \
         replace them by copies. `restore` and `mount` still work",
        start.settings.target
    )))
}
