//! What is not as usual about a copy.

use sprat_session::text;
use sprat_snapshot::{SnapshotReport, Warning};

use crate::notify::Words;

/// Why the size of a snapshot that was made is not as usual; `None`: it is.
pub(super) fn growth(report: &SnapshotReport) -> Option<Words> {
    report.record.warnings.iter().find_map(shrunk_dump)
}

fn shrunk_dump(warning: &Warning) -> Option<Words> {
    let Warning::DumpShrank {
        path,
        bytes,
        before_bytes,
    } = warning
    else {
        return None;
    };
    Some(Words {
        class: "dump_shrank".to_owned(),
        text: format!(
            "{path} has {}, less than half of the {} that it had before.",
            text::bytes(*bytes),
            text::bytes(*before_bytes)
        ),
        hint: "The snapshot was made. Check what the job's command writes.".to_owned(),
    })
}
