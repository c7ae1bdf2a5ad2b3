//! A container to be copied, for the tests of copies.

use std::fs;
use std::path::PathBuf;

use sprat_testkit::leases;
use sprat_testkit::machine::strikes::{copy_sparse, same_bytes};
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};

/// A container with some MiB in it at `store/x.luks`, the same at `pristine`, and a folder `server`
/// for its copy, which may be behind a connection that strikes.
pub struct CopyScene {
    pub machine: TestMachine,
    pub pristine: PathBuf,
}

impl CopyScene {
    pub fn new() -> Self {
        Self::with_bytes(24 << 20)
    }

    /// With a container that holds so much data.
    pub fn with_bytes(bytes: usize) -> Self {
        let machine = TestMachine::new();
        fs::create_dir(machine.path("server")).unwrap();
        machine.write("src/large", noise(bytes, 7));
        machine.init(&[CONTAINER, "--size", "128M"]);
        machine.backup(&[]).succeeded();
        let pristine = machine.path("pristine");
        copy_sparse(&machine.path(CONTAINER), &pristine);
        Self { machine, pristine }
    }

    #[track_caller]
    pub fn arrived_whole(&self) {
        let copy = self.machine.path("server/x.luks");
        assert!(same_bytes(&self.pristine, &copy), "the copy differs");
    }

    pub fn names(&self, folder: &str) -> Vec<String> {
        leases::names_but_free(&self.machine.path(folder))
    }
}
