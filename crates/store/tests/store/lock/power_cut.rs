//! What the write journal contains after a power cut of this machine, with a real disk.

use std::path::PathBuf;

use sprat_testkit::test_folder::TestFolder;

use super::*;

/// An ext4 in a file, which commits its journal only when it is asked to.
struct Disk {
    folder: TestFolder,
    cuts: std::cell::Cell<u32>,
}

impl Disk {
    fn mount() -> Self {
        let folder = TestFolder::new("sprat-power-cut-");
        let cuts = std::cell::Cell::new(0);
        let disk = Self { folder, cuts };
        let image = disk.path("image");
        let file = std::fs::File::create_new(&image).unwrap();
        file.set_len(24 << 20).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg(&image));
        disk.mount_at(&image, "before");
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn mount_at(&self, image: &Path, name: &str) {
        // Nothing is written to the disk by itself: not after a time, and not because of a rename.
        let options = "loop,commit=300,noauto_da_alloc";
        std::fs::create_dir(self.path(name)).unwrap();
        run(Command::new("mount")
            .args(["-o", options])
            .arg(image)
            .arg(self.path(name)));
    }

    /// The state folder of the machine.
    fn state(&self) -> PathBuf {
        self.path("before").join("state")
    }

    /// The state folder as it is after a power cut at this moment.
    fn after_power_cut(&self) -> PathBuf {
        let cut = self.cuts.get() + 1;
        self.cuts.set(cut);
        // Each in a file of its own: a loop device may outlive its mount, with its cache.
        let (image, name) = (self.path(&format!("image-{cut}")), format!("after-{cut}"));
        std::fs::copy(self.path("image"), &image).unwrap();
        self.mount_at(&image, &name);
        self.path(&name).join("state")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let after = (1..=self.cuts.get()).map(|cut| format!("after-{cut}"));
        for name in after.chain(["before".to_owned()]) {
            let _ = Command::new("umount").arg(self.path(&name)).output();
        }
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {done:?}");
}

#[test]
fn after_a_power_cut_the_journal_has_the_lease_and_sent_ranges() {
    requires!(
        needs::root(),
        needs::program("mkfs.ext4"),
        needs::program("mount")
    );
    let (store, disk) = (MemoryStore::new(), Disk::mount());
    let mine = record(&disk.state());
    // The journal is on the disk before the lease is created.
    let lock = take(&store, &mine).unwrap();
    // The disk is another one, and the boot is not: the machine that is described here may live.
    let is_own = |record: &WriteJournal| {
        assert!(held(&store).is_some() && record.may_live());
        lock::inspect(&store, &container(), Some(record))
            .unwrap()
            .highest_is_own
    };
    assert!(is_own(&record(&disk.after_power_cut())));
    // And the highest value of the counter before it is renewed so often.
    for _ in 0..8 {
        lock.renew(&store).unwrap();
    }
    assert!(is_own(&record(&disk.after_power_cut())));
    // The first ranges of a session, too, before their bytes are sent.
    mine.before_send(&[4096..8192]).unwrap();
    let after = record(&disk.after_power_cut());
    assert_eq!(after.in_doubt(), [4096..8192]);
    drop((after, lock, mine));
    // The journal was replaced, by a complete one.
    let mine = record(&disk.state());
    let after = record(&disk.after_power_cut());
    assert_eq!(after.in_doubt(), [4096..8192]);
    assert!(is_own(&after));
    drop(mine);
}
