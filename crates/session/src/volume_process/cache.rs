//! Chooses the folder of a container's persistent cache.

use std::path::PathBuf;
use std::time::Duration;

use sprat_volume::{CacheOptions, CacheSample, Seen};

use crate::file_system::FileSystemKind;
use crate::protocol::messages::VolumeStart;
use crate::settings::Access;
use crate::state::journal::journal_id;
use crate::volume_process::lease::ContainerLease;

/// A container without a backup for so long is most likely gone. Its cache is then useless.
const UNUSED_FOR: Duration = Duration::from_secs(90 * 24 * 3600);

/// The cache of the container that `lease` has opened. `None` for a local store, which is as fast as
/// a cache. `seen`: as in [`CacheOptions`]. A container in two stores has two caches, because the
/// two files are not always the same.
pub(super) fn cache_options(
    start: &VolumeStart,
    lease: &ContainerLease,
    seen: Option<Seen>,
    kind: FileSystemKind,
) -> Option<CacheOptions> {
    start.settings.target.ssh()?;
    let dir = cache_dir(start, lease.uuid()?)?;
    if start.settings.access == Access::ReadWrite {
        sprat_volume::remove_unused_caches(&start.settings.cache_dir, UNUSED_FOR);
    }
    // Only durable data may be cached, and without fsync nothing is durable. A size of zero still
    // removes the clean marker.
    let durable =
        lease.store().capabilities().durable_flush || start.settings.access == Access::ReadOnly;
    Some(CacheOptions {
        dir,
        bytes_max: if durable {
            start.settings.cache_bytes_max
        } else {
            0
        },
        seen,
        only_compare: start.settings.verify_cache,
        stamp_offset_bytes: kind.stamp_range().start,
    })
}

/// Blocks of the cache of container `uuid`, to be compared with the container while it is opened.
/// `None` if there is no cache, or every block will be compared.
pub(super) fn cache_sample(start: &VolumeStart, uuid: &str) -> Option<CacheSample> {
    start.settings.target.ssh()?;
    if start.settings.verify_cache {
        return None;
    }
    CacheSample::choose(&cache_dir(start, uuid)?, start.settings.cache_bytes_max)
}

fn cache_dir(start: &VolumeStart, uuid: &str) -> Option<PathBuf> {
    let name = format!("{uuid}-{}", journal_id(&start.settings.target));
    may_be_uuid(uuid).then(|| start.settings.cache_dir.join(name))
}

/// The UUID becomes the name of a folder, and it comes from the server, so it could be any text.
fn may_be_uuid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_uuid_becomes_a_folder_name() {
        assert!(may_be_uuid("2bd1a1f0-7d1c-4a3c-9b36-1f2f9a3c1234"));
        for text in [
            "",
            "..",
            "../../etc",
            "2bd1a1f0-7d1c-4a3c-9b36-1f2f9a3c123/",
        ] {
            assert!(!may_be_uuid(text), "{text}");
        }
    }
}
