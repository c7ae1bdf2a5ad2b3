//! Random modes, owners and ACLs, also of large files.

use super::*;
use crate::preserve::modes::{RandomModes, check};

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
