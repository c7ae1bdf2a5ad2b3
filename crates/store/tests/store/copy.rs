//! Copies of a file between stores: sparse, despite faults, and only what reads back counts.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sprat_store::copy::{
    self, CopyError, CopyIdentity, CopyLeft, CopyNote, CopyProgress, CopySides, CopyStage,
    CopyStep, CopyWatch, DataMap, PIECE_BYTES,
};
use sprat_store::{Access, FileName, LocalStore, SftpStore, Store, StoreFile};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::fault::{Fault, FaultFile, FaultPlan};
use sprat_testkit::wrapped::WrappedFile;
use sprat_testkit::{needs, requires};

const LEN: u64 = 3 * PIECE_BYTES + 12_288;

struct Patient;

impl CopyWatch for Patient {
    fn progress(&mut self, _: &CopyProgress) -> bool {
        true
    }

    fn checkpoint(&mut self, _: CopyLeft) -> bool {
        true
    }
}

fn name(text: &str) -> FileName {
    FileName::new(text).unwrap()
}

/// A file with data at both ends, a long run, and single blocks; most of it is holes.
fn make_source(folder: &Path) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(LEN).unwrap()];
    let mut fill = |start: usize, len: usize| {
        for (index, byte) in content[start..start + len].iter_mut().enumerate() {
            *byte = u8::try_from((start + index * 7 + index / 251) % 255).unwrap() + 1;
        }
    };
    fill(0, 32_768);
    fill(3_500_000 / 4096 * 4096, 1 << 20);
    for block in 0..20 {
        fill((8 << 20) + block * 32_768, 4096);
    }
    fill(usize::try_from(LEN).unwrap() - 4096, 4096);
    let file = File::create(folder.join("source")).unwrap();
    file.set_len(LEN).unwrap();
    for (index, block) in content.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, index as u64 * 4096).unwrap();
        }
    }
    file.sync_all().unwrap();
    content
}

fn identity() -> CopyIdentity {
    CopyIdentity {
        source: "source".to_owned(),
        destination: "destination".to_owned(),
        uuid: String::new(),
        source_bytes: LEN,
        source_modified_s: None,
        new_header: None,
    }
}

fn destination(store: &dyn Store) -> Arc<dyn StoreFile> {
    match store.open(&name("destination"), Access::ReadWrite) {
        Ok(file) => file,
        Err(_) => {
            let file = store.create_new(&name("destination")).unwrap();
            file.resize(LEN).unwrap();
            file
        }
    }
}

fn check(folder: &Path, content: &[u8]) {
    let path = folder.join("destination");
    assert!(
        std::fs::read(&path).unwrap() == content,
        "the content differs"
    );
    let (source, copy) = (folder.join("source").metadata(), path.metadata());
    let (source, copy) = (source.unwrap(), copy.unwrap());
    assert!(
        copy.blocks() <= source.blocks() + 64,
        "{} blocks became {}",
        source.blocks(),
        copy.blocks()
    );
    assert_eq!(copy.mode() & 0o777, 0o600);
}

#[test]
fn sparse_file_arrives_complete_and_sparse_between_any_stores() {
    requires!(needs::sftp_server_missing());
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let content = make_source(folder);
    let local = || -> Arc<dyn Store> { Arc::new(LocalStore::open(folder).unwrap()) };
    let remote = || -> Arc<dyn Store> {
        Arc::new(SftpStore::connect(crate::part::piped(folder, &[])).unwrap())
    };
    for (from, to) in [
        (local(), local()),
        (local(), remote()),
        (remote(), local()),
        (remote(), remote()),
    ] {
        let source = from.open(&name("source"), Access::ReadOnly).unwrap();
        let map = DataMap::of(&*source).ok();
        let known = map.is_some();
        let sides = CopySides {
            source,
            destination: destination(&*to),
            len: LEN,
            map,
        };
        let path = folder.join("note");
        let mut note = CopyNote::begin(&path, identity()).unwrap();
        let figures = copy::copy(&sides, &mut note, &mut Patient).unwrap();
        assert_eq!(note.stage(), CopyStage::Verified);
        assert_eq!(figures.step, CopyStep::Verifying);
        // Holes that the source reports are not read.
        assert_eq!(figures.read_bytes < LEN / 2, known);
        assert!(figures.verified_bytes >= figures.written_bytes);
        check(folder, &content);
        to.remove(&name("destination")).unwrap();
        note.remove().unwrap();
    }
}

#[test]
fn after_any_failure_the_next_run_completes_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let content = make_source(folder);
    let store = LocalStore::open(folder).unwrap();
    let path = folder.join("note");
    let mut struck = 0;
    let ends = [true, false];
    for (fault, at_source) in Fault::ALL
        .iter()
        .flat_map(|fault| ends.map(|end| (*fault, end)))
    {
        for nth in (1..).step_by(if at_source { 1 } else { 4 }) {
            let plan = FaultPlan::new(nth, true, fault);
            let mut sides = CopySides {
                source: store.open(&name("source"), Access::ReadOnly).unwrap(),
                destination: destination(&store),
                len: LEN,
                map: None,
            };
            let side = if at_source {
                &mut sides.source
            } else {
                &mut sides.destination
            };
            *side = Arc::new(FaultFile::new(Arc::clone(side), Arc::clone(&plan)));
            let mut note = CopyNote::begin(&path, identity()).unwrap();
            let failed = copy::copy(&sides, &mut note, &mut Patient);
            if plan.struck() {
                struck += 1;
                assert!(failed.is_err(), "{fault:?} at {nth}");
                // As after a kill: only what is on the disks is left.
                drop(note);
                let mut note = CopyNote::open(&path).unwrap().unwrap();
                let sides = CopySides {
                    source: store.open(&name("source"), Access::ReadOnly).unwrap(),
                    destination: destination(&store),
                    len: LEN,
                    map: None,
                };
                assert!(copy::same_beginning(&*sides.source, &note).unwrap());
                copy::copy(&sides, &mut note, &mut Patient).unwrap();
            }
            check(folder, &content);
            store.remove(&name("destination")).unwrap();
            if !plan.struck() {
                break;
            }
        }
    }
    assert!(struck > 30, "only {struck} faults struck");
}

#[test]
fn recorded_pieces_are_neither_read_nor_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let content = make_source(dir.path());
    let store = LocalStore::open(dir.path()).unwrap();
    let path = dir.path().join("note");
    let source = store.open(&name("source"), Access::ReadOnly).unwrap();
    let sides = CopySides {
        source,
        destination: destination(&store),
        len: LEN,
        map: None,
    };
    let mut note = CopyNote::begin(&path, identity()).unwrap();
    let first = copy::copy(&sides, &mut note, &mut Patient).unwrap();
    drop(note);
    let mut note = CopyNote::open(&path).unwrap().unwrap();
    let second = copy::copy(&sides, &mut note, &mut Patient).unwrap();
    assert_eq!(first.read_bytes, LEN);
    assert_eq!((second.read_bytes, second.written_bytes), (0, 0));
    assert_eq!(second.verified_bytes, 0);
    check(dir.path(), &content);
}

/// A disk that damages a byte of each of the first `bad` writes.
fn damaging_a_byte(below: Arc<dyn StoreFile>, bad: u64) -> Arc<dyn StoreFile> {
    let writes = AtomicU64::new(0);
    let wrapped = WrappedFile::new(below).on_write(move |below, offset, data| {
        let mut data = data.to_vec();
        if writes.fetch_add(1, Ordering::SeqCst) < bad {
            data[0] ^= 1;
        }
        below.write_at(offset, &data)
    });
    Arc::new(wrapped)
}

#[test]
fn piece_that_does_not_read_back_is_copied_again_then_refused() {
    for (bad, ends_well) in [(2, true), (u64::MAX, false)] {
        let dir = tempfile::tempdir().unwrap();
        let content = make_source(dir.path());
        let store = LocalStore::open(dir.path()).unwrap();
        let sides = CopySides {
            source: store.open(&name("source"), Access::ReadOnly).unwrap(),
            destination: damaging_a_byte(destination(&store), bad),
            len: LEN,
            map: None,
        };
        let path = dir.path().join("note");
        let mut note = CopyNote::begin(&path, identity()).unwrap();
        let copied = copy::copy(&sides, &mut note, &mut Patient);
        if ends_well {
            copied.unwrap();
            check(dir.path(), &content);
        } else {
            assert!(
                matches!(copied, Err(CopyError::Differs { .. })),
                "{copied:?}"
            );
            assert_eq!(note.stage(), CopyStage::Copying);
        }
    }
}

#[test]
fn source_that_changed_meanwhile_is_detected() {
    let dir = tempfile::tempdir().unwrap();
    make_source(dir.path());
    let store = LocalStore::open(dir.path()).unwrap();
    let source = store.open(&name("source"), Access::ReadWrite).unwrap();
    let sides = CopySides {
        source: Arc::clone(&source),
        destination: destination(&store),
        len: LEN,
        map: None,
    };
    let mut note = CopyNote::begin(&dir.path().join("note"), identity()).unwrap();
    copy::copy(&sides, &mut note, &mut Patient).unwrap();
    assert!(copy::same_beginning(&*source, &note).unwrap());
    source.write_at(8 << 20, b"super block").unwrap();
    assert!(!copy::same_beginning(&*source, &note).unwrap());
}

#[test]
fn another_file_is_read_back_completely() {
    let dir = tempfile::tempdir().unwrap();
    make_source(dir.path());
    let store = LocalStore::open(dir.path()).unwrap();
    let sides = CopySides {
        source: store.open(&name("source"), Access::ReadOnly).unwrap(),
        destination: destination(&store),
        len: LEN,
        map: None,
    };
    let mut note = CopyNote::begin(&dir.path().join("note"), identity()).unwrap();
    let copied = copy::copy(&sides, &mut note, &mut Patient).unwrap();
    let read = copy::read_back(&*sides.destination, &mut note, &mut Patient).unwrap();
    assert_eq!(read.unwrap().verified_bytes, copied.verified_bytes);
    // Another file with that name, of the same length, with a different byte near the end.
    sides.destination.write_at(LEN - 100, &[0]).unwrap();
    let read = copy::read_back(&*sides.destination, &mut note, &mut Patient).unwrap();
    assert_eq!(read, None);
}

/// Records what is left at each checkpoint.
#[derive(Default)]
struct Leftovers(Vec<CopyLeft>);

impl CopyWatch for Leftovers {
    fn progress(&mut self, _: &CopyProgress) -> bool {
        true
    }

    fn checkpoint(&mut self, left: CopyLeft) -> bool {
        self.0.push(left);
        true
    }
}

#[test]
fn nothing_is_left_to_write_once_everything_has_arrived() {
    let dir = tempfile::tempdir().unwrap();
    make_source(dir.path());
    let store = LocalStore::open(dir.path()).unwrap();
    let source = store.open(&name("source"), Access::ReadOnly).unwrap();
    let map = DataMap::of(&*source).unwrap();
    for (map, left) in [(None, CopyLeft::AtMost(0)), (Some(map), CopyLeft::Bytes(0))] {
        let sides = CopySides {
            source: Arc::clone(&source),
            destination: destination(&store),
            len: LEN,
            map,
        };
        let mut note = CopyNote::begin(&dir.path().join("note"), identity()).unwrap();
        let mut watch = Leftovers::default();
        copy::copy(&sides, &mut note, &mut watch).unwrap();
        assert_eq!(watch.0.last(), Some(&left), "{:?}", watch.0);
        store.remove(&name("destination")).unwrap();
    }
}

/// Interrupts the copy as soon as something was written, or not at all.
struct Impatient(u64);

impl CopyWatch for Impatient {
    fn progress(&mut self, progress: &CopyProgress) -> bool {
        progress.written_bytes < self.0
    }

    fn checkpoint(&mut self, _: CopyLeft) -> bool {
        true
    }
}

/// The destination loses its power once the copy has ended: what was recorded is there.
#[test]
fn recorded_pieces_survive_a_power_cut_of_the_destination() {
    for patience in [1, u64::MAX] {
        let dir = tempfile::tempdir().unwrap();
        let content = make_source(dir.path());
        let store = LocalStore::open(dir.path()).unwrap();
        // Slow enough for an interruption in the middle.
        let options = CrashOptions {
            delay_max: Duration::from_millis(40),
            ..CrashOptions::default()
        };
        let disk = CrashDisk::new(content.len(), 3, options);
        let sides = |disk: &CrashDisk| CopySides {
            source: store.open(&name("source"), Access::ReadOnly).unwrap(),
            destination: disk.connect(),
            len: LEN,
            map: None,
        };
        let path = dir.path().join("note");
        let mut note = CopyNote::begin(&path, identity()).unwrap();
        let copied = copy::copy(&sides(&disk), &mut note, &mut Impatient(patience));
        assert_eq!(copied.is_ok(), patience == u64::MAX, "{copied:?}");
        disk.cut_power();
        if copied.is_ok() {
            assert!(disk.durable() == content, "what was verified is gone");
        }
        drop(note);
        // What was recorded is not written again, so only durable pieces can make this complete.
        let mut note = CopyNote::open(&path).unwrap().unwrap();
        copy::copy(&sides(&disk), &mut note, &mut Patient).unwrap();
        assert!(disk.durable() == content);
    }
}
