//! The write journal on a disk that is full by now.

use std::fs;
use std::path::Path;

use sprat_store::WriteJournal;
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::{LoopDisk, SmallDisk, fill};
use sprat_testkit::{needs, requires};

/// A container that was used before, on a disk without a free byte: a session dies, and another ends in order.
fn journal_works(folder: &Path) {
    let state = folder.join("locks");
    drop(WriteJournal::open(&state, "used").unwrap());
    fill(folder);
    let journal = WriteJournal::open(&state, "used").unwrap();
    let block = |n: u64| n << 14..(n << 14) + 4096;
    // Longer than the journal may be.
    for round in 0..4 {
        for n in 0..20_000 {
            journal.before_send(&[block(n)]).unwrap();
        }
        let all: Vec<_> = (round..20_000).map(block).collect();
        journal.resolved(&all).unwrap();
    }
    journal.before_send(&[block(9)]).unwrap();
    drop(journal);
    let journal = WriteJournal::open(&state, "used").unwrap();
    let expected: Vec<_> = (0..3).chain([9]).map(block).collect();
    assert_eq!(journal.in_doubt(), expected);
    journal.all_resolved().unwrap();
    drop(journal);
    assert_eq!(WriteJournal::open(&state, "used").unwrap().in_doubt(), []);
}

#[test]
fn journal_that_was_used_before_works_on_a_full_ext4() {
    requires!(needs::root(), needs::devices(), needs::program("mkfs.ext4"));
    let folder = TestFolder::new("sprat-full-");
    let (image, at) = (folder.path().join("image"), folder.path().join("at"));
    fs::create_dir(&at).unwrap();
    let _disk = LoopDisk::mount(&image, &at, 32);
    journal_works(&at);
}

#[test]
fn journal_that_was_used_before_works_on_a_full_tmpfs() {
    requires!(needs::root());
    let disk = SmallDisk::new("size=16m");
    journal_works(disk.path());
    // Nothing is allocated for another one, so no session of it begins.
    WriteJournal::open(&disk.path().join("locks"), "new").unwrap_err();
}
