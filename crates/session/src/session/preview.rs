//! What a backup would copy and exclude: reads the sources, and opens no container.

use sprat_snapshot::{Cancel, Preview, SnapshotSpec};

use super::{exclude_own, without_questions};
use crate::Failure;
use crate::files::make_private_folder;
use crate::interrupt::Interrupt;
use crate::settings::SessionSettings;

/// Lists what a backup of `spec` into the container of `settings` would copy and exclude. With `all`, names
/// every path.
///
/// # Errors
/// As [`sprat_snapshot::preview`], or an interrupt came.
pub fn preview(
    settings: &SessionSettings,
    mut spec: SnapshotSpec,
    all: bool,
    interrupt: &Interrupt,
) -> Result<Preview, Failure> {
    exclude_own(settings, &mut spec);
    without_questions(&mut spec);
    make_private_folder(&settings.runtime_dir)?;
    let nowhere = tempfile::tempdir_in(&settings.runtime_dir)
        .map_err(|error| Failure::failed("can't make an empty folder").caused_by(&error))?;
    let cancel = Cancel::new();
    let mut watch = |_| {
        if interrupt.requested() {
            cancel.cancel();
        }
    };
    let preview = sprat_snapshot::preview(nowhere.path(), &spec, all, &mut watch, &cancel)?;
    Ok(preview)
}
