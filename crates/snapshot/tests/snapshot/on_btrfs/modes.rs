//! Random modes, owners and ACLs, also of large files.

use super::*;
use crate::preserve::modes::{RandomModes, check};
use crate::preserve::set_acl_like_mask;

#[test]
fn random_modes_owners_and_acls_are_equal_on_btrfs() {
    requires!(missing());
    let volume = OnBtrfs::of("1G");
    let mut spec = volume.bench.spec();
    spec.blocks = Some(volume.bench.path("blocks"));
    RandomModes::new(volume.bench.source()).in_rounds(|source| {
        let report = volume.try_take(&spec).unwrap();
        let tree = volume.bench.in_snapshot(report.name);
        check(
            &volume.bench,
            &volume.bench.volume(),
            source,
            &report,
            &tree,
        );
    });
}

/// rsync changes the bits of a file that is there after its ACL.
#[test]
fn rights_of_the_owning_group_stay_when_the_special_bits_change() {
    requires!(missing());
    let volume = OnBtrfs::of("256M");
    let source = volume.bench.source();
    let (file, folder) = (source.join("file"), source.join("folder"));
    fs::write(&file, "content").unwrap();
    fs::create_dir(&folder).unwrap();
    for (old, new) in [(0o2640, 0o670), (0o4640, 0o1670), (0o6640, 0o2670)] {
        for path in [&file, &folder] {
            let _ = rustix::fs::lremovexattr(path, "system.posix_acl_access");
            set_mode(path, old).unwrap();
        }
        volume.take();
        for path in [&file, &folder] {
            assert_eq!(set_acl_like_mask(path, new), None);
        }
        let report = volume.take();
        assert!(report.record.complete, "{:?}", report.record);
        assert_same(&source, &volume.bench.in_snapshot(report.name));
    }
}
