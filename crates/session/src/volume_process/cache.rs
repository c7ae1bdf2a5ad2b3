//! Which folder a container's persistent cache has, if it has one.

use std::path::Path;
use std::time::Duration;

use sprat_volume::{CacheOptions, Seen};

use crate::address::Location;
use crate::protocol::messages::VolumeStart;
use crate::settings::Access;
use crate::volume_process::connection::record_id;
use crate::volume_process::lease::ContainerLease;

/// A container that nobody has backed up to for so long is most likely gone, and its cache of no use.
const UNUSED_FOR: Duration = Duration::from_secs(90 * 24 * 3600);

/// The cache of the container that `lease` has opened; `None` for a local store, which is no slower
/// than a cache. `seen`: as in [`CacheOptions`]. One container in two stores has two caches: they are not always the same.
pub(super) fn cache_options(
    start: &VolumeStart,
    lease: &ContainerLease,
    seen: Option<Seen>,
) -> Option<CacheOptions> {
    let Location::Ssh { .. } = start.target.place else {
        return None;
    };
    let uuid = lease.uuid().filter(|uuid| may_be_uuid(uuid))?;
    let name = format!("{uuid}-{}", record_id(&start.target));
    if start.access == Access::ReadWrite {
        sprat_volume::remove_unused_caches(Path::new(&start.cache_dir), UNUSED_FOR);
    }
    // Only what is durable may be kept, and without fsync nothing is; none still removes the mark.
    let durable = lease.store().capabilities().durable_flush || start.access == Access::ReadOnly;
    Some(CacheOptions {
        dir: Path::new(&start.cache_dir).join(name),
        bytes_max: if durable { start.cache_bytes_max } else { 0 },
        seen,
        only_compare: start.past_cache,
    })
}

/// The server wrote it, so it could be any text, and this becomes the name of a folder.
fn may_be_uuid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_uuid_becomes_the_name_of_a_folder() {
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
