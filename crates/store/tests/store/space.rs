//! Holes through a shell on the server, and copies within the server.

use std::ffi::OsString;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sprat_store::{
    Access, Fence, FileName, Puncher, PuncherOptions, SftpStore, Store, StoreError, StoreErrorKind,
};
use sprat_testkit::{needs, requires};

const BLOCK: u64 = 4096;

fn name(text: &str) -> FileName {
    FileName::new(text).unwrap()
}

/// A folder whose name needs quoting, with a file full of ones and a lock beside it.
struct Place {
    folder: tempfile::TempDir,
    file: FileName,
}

impl Place {
    fn new(file: &str, blocks: u64) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("it's $HOME; `x` \"y\" ")
            .tempdir()
            .unwrap();
        let bytes = vec![1; usize::try_from(blocks * BLOCK).unwrap()];
        fs::write(folder.path().join(file), bytes).unwrap();
        let place = Self {
            folder,
            file: name(file),
        };
        fs::write(place.lock(1), "{\"token\":\"abc123\"}").unwrap();
        place
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(self.file.as_str())
    }

    fn lock(&self, number: u32) -> PathBuf {
        self.folder
            .path()
            .join(format!("{}.lock.{number}", self.file))
    }

    fn options(&self, program: &[&str]) -> PuncherOptions {
        let lock = |number: u32| name(&format!("{}.lock.{number}", self.file));
        PuncherOptions {
            program: program.iter().map(OsString::from).collect(),
            host: "test.host".to_owned(),
            folder: self.folder.path().to_str().unwrap().to_owned(),
            file: self.file.clone(),
            fence: Fence {
                lock: lock(1),
                next: lock(2),
                token: "abc123".to_owned(),
            },
            inherit_fds: Vec::new(),
            answer_timeout: Duration::from_secs(30),
        }
    }

    fn start(&self, program: &[&str]) -> Result<Puncher, StoreError> {
        Puncher::start(self.options(program))
    }
}

fn no_puncher() -> Option<String> {
    needs::program("fallocate").or_else(|| {
        // The folder for temporary files must be on a file system that can punch holes.
        let place = Place::new("probe", 1);
        let mut puncher = place.start(&["sh"]).ok()?;
        puncher
            .punch(&one(0..BLOCK))
            .err()
            .map(|error| error.to_string())
    })
}

fn one(range: Range<u64>) -> [Range<u64>; 1] {
    [range]
}

/// Every other block.
fn holes(blocks: u64) -> Vec<Range<u64>> {
    (0..blocks)
        .step_by(2)
        .map(|block| block * BLOCK..(block + 1) * BLOCK)
        .collect()
}

fn refused(result: Result<Puncher, StoreError>) -> (StoreErrorKind, String) {
    let error = result.map(drop).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn each_shell_punches_exactly_the_ranges_of_an_oddly_named_file() {
    requires!(no_puncher());
    let shells: [&[&str]; 4] = [
        &["sh"],
        &["bash"],
        &["busybox", "sh"],
        &[
            "sh",
            "-c",
            "echo Welcome; echo; echo sprat- ready >&2; exec sh",
        ],
    ];
    for shell in shells {
        if needs::find_program(shell[0]).is_none() {
            continue;
        }
        let place = Place::new("a 'b'\"$(id)`id`.luks", 1000);
        let mut puncher = match place.start(shell) {
            // Debian's uses its own fallocate, whatever is in the path.
            Err(error) if shell[0] == "busybox" => {
                assert_eq!(error.kind(), StoreErrorKind::Unsupported, "{error}");
                continue;
            }
            started => started.unwrap(),
        };
        // All of it, then half; a file system may need some blocks for itself.
        let takes = |puncher: &mut Puncher| puncher.allocated_bytes().unwrap() / BLOCK;
        assert!((1000..1010).contains(&takes(&mut puncher)), "{shell:?}");
        puncher.punch(&holes(1000)).unwrap();
        assert!((500..510).contains(&takes(&mut puncher)), "{shell:?}");
        let bytes = fs::read(place.path()).unwrap();
        for (index, block) in bytes.chunks(4096).enumerate() {
            let expected = u8::from(index % 2 == 1);
            assert!(block.iter().all(|byte| *byte == expected), "block {index}");
        }
    }
}

#[test]
fn hole_is_punched_only_with_the_lock_there_and_no_next_one() {
    requires!(no_puncher());
    for change in ["removed", "followed", "created again by another session"] {
        let place = Place::new("x.luks", 4);
        let mut puncher = place.start(&["sh"]).unwrap();
        puncher.punch(&one(0..BLOCK)).unwrap();
        match change {
            "removed" => fs::remove_file(place.lock(1)).unwrap(),
            "followed" => fs::write(place.lock(2), "another session").unwrap(),
            _ => fs::write(place.lock(1), "another token").unwrap(),
        }
        let error = puncher.punch(&one(BLOCK..2 * BLOCK)).unwrap_err();
        assert!(error.to_string().contains("lock"), "{error}");
        let bytes = fs::read(place.path()).unwrap();
        assert!(bytes[4096..].iter().all(|byte| *byte == 1), "{change}");
    }
}

#[test]
fn another_folder_and_a_symbolic_link_are_refused() {
    requires!(needs::program("fallocate"));
    let place = Place::new("x.luks", 1);
    fs::write(place.lock(1), "another token").unwrap();
    let (kind, said) = refused(place.start(&["sh"]));
    assert_eq!(kind, StoreErrorKind::Unsupported, "{said}");
    let place = Place::new("x.luks", 1);
    fs::rename(place.path(), place.folder.path().join("y")).unwrap();
    std::os::unix::fs::symlink("y", place.path()).unwrap();
    let (kind, said) = refused(place.start(&["sh"]));
    assert_eq!(kind, StoreErrorKind::NotRegular, "{said}");
}

#[test]
fn missing_support_is_reported_with_its_cause_and_no_change() {
    requires!(needs::program("fallocate"));
    let place = Place::new("x.luks", 1);
    let bin = tempfile::tempdir().unwrap();
    for program in ["sh", "cat", "du"] {
        let found = needs::find_program(program).unwrap();
        std::os::unix::fs::symlink(found, bin.path().join(program)).unwrap();
    }
    let only = format!("PATH='{}' exec sh", bin.path().display());
    let (kind, said) = refused(place.start(&["/bin/sh", "-c", &only]));
    assert_eq!(kind, StoreErrorKind::Unsupported);
    assert!(said.contains("no fallocate"), "{said}");

    let fake = |body: &str| {
        let path = bin.path().join("fallocate");
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    fake("echo 'BusyBox v1.35.0 multi-call binary.' >&2; exit 1");
    let (kind, said) = refused(place.start(&["/bin/sh", "-c", &only]));
    assert_eq!(kind, StoreErrorKind::Unsupported);
    assert!(said.contains("can't punch holes"), "{said}");

    // The texts of glibc and of util-linux: what counts is that the first hole can't be made.
    for said in [
        "fallocate failed: Operation not supported",
        "fallocate: keep size mode is unsupported",
    ] {
        fake(&format!(
            "case $1 in --help) echo '--punch-hole' ;; *) echo 'fallocate: {said}' >&2; exit 1 ;; \
             esac"
        ));
        let mut puncher = place.start(&["/bin/sh", "-c", &only]).unwrap();
        let error = puncher.punch(&one(0..BLOCK)).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unsupported, "{error}");
    }

    // A later failure, or a temporary cause, does not mean unsupported.
    fake(
        "case $1 in --help) echo '--punch-hole' ;; *) echo 'fallocate: bad \x1b[31mthing, No space \
         left' >&2; exit 1 ;; esac",
    );
    let mut puncher = place.start(&["/bin/sh", "-c", &only]).unwrap();
    let error = puncher.punch(&one(0..BLOCK)).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Failed, "{error}");
    assert!(!error.to_string().contains('\x1b'), "{error}");
    assert_eq!(fs::read(place.path()).unwrap(), vec![1; 4096]);
}

#[test]
fn account_without_a_shell_is_reported() {
    requires!(needs::sftp_server_missing());
    let place = Place::new("x.luks", 1);
    let sftp_server = needs::plain_sftp_server().unwrap().display().to_string();
    let greeting = "echo 'This service allows sftp connections only.'; exit 1";
    let programs: [&[&str]; 4] = [
        &["false"],
        &["sh", "-c", greeting],
        &[&sftp_server],
        &["sh", "-c", "yes | head -c 3000000"],
    ];
    for program in programs {
        let (kind, said) = refused(place.start(program));
        assert_eq!(kind, StoreErrorKind::Unsupported, "{program:?}: {said}");
    }
}

#[test]
fn connection_lost_while_punching_is_reported_as_lost() {
    requires!(no_puncher());
    let place = Place::new("x.luks", 2000);
    // The shell ends after the first batch, as if it were killed.
    let mut puncher = place
        .start(&["/bin/sh", "-c", "dd bs=1 count=3000 2>/dev/null | sh"])
        .unwrap();
    let error = puncher.punch(&holes(2000)).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Disconnected, "{error}");
}

/// A store over sftp-server without ssh.
fn store(folder: &Path, arguments: &[&str]) -> SftpStore {
    SftpStore::connect(crate::part::piped(folder, arguments)).unwrap()
}

#[test]
fn server_copies_ranges_and_leaves_holes_between_them() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let len = 200 << 20;
    let old = fs::File::create(folder.path().join("old")).unwrap();
    old.set_len(len).unwrap();
    old.write_all_at(&vec![7; 70 << 20], 1 << 20).unwrap();
    old.write_all_at(b"end", len - 3).unwrap();
    fs::set_permissions(folder.path().join("old"), fs::Permissions::from_mode(0o640)).unwrap();
    let store = store(folder.path(), &[]);
    let new = store.create_new(&name("new")).unwrap();
    new.resize(len).unwrap();
    let ranges = [1 << 20..71 << 20, len - 4096..len];
    store
        .copy_ranges(&name("old"), &name("new"), &ranges)
        .unwrap();
    store
        .copy_owner_and_mode(&name("old"), &name("new"))
        .unwrap();
    let found = fs::metadata(folder.path().join("new")).unwrap();
    assert_eq!(found.len(), len);
    assert_eq!(found.mode() & 0o7777, 0o640);
    assert!(
        found.blocks() * 512 <= (70 << 20) + 8192,
        "{}",
        found.blocks()
    );
    assert!(
        fs::read(folder.path().join("old")).unwrap()
            == fs::read(folder.path().join("new")).unwrap()
    );
    // Of 10,000 small ranges each arrives, too.
    let small: Vec<_> = (0..10_000_u64).map(|n| n * 8192..n * 8192 + 1).collect();
    store
        .copy_ranges(&name("old"), &name("new"), &small)
        .unwrap();
}

#[test]
fn missing_copy_data_and_a_full_disk_are_reported() {
    requires!(needs::root().or_else(needs::sftp_server_missing));
    let folder = tempfile::tempdir().unwrap();
    for file in ["old", "new"] {
        fs::write(folder.path().join(file), vec![1; 4096]).unwrap();
    }
    let without = store(folder.path(), &["-P", "copy-data"]);
    let error = without
        .copy_ranges(&name("old"), &name("new"), std::slice::from_ref(&(0..4096)))
        .unwrap_err();
    assert!(
        matches!(
            error.kind(),
            StoreErrorKind::Unsupported | StoreErrorKind::PermissionDenied
        ),
        "{error}"
    );
    let disk = sprat_testkit::tmpfs::SmallDisk::new("size=8m");
    fs::write(disk.path().join("old"), vec![1; 5 << 20]).unwrap();
    fs::write(disk.path().join("new"), b"").unwrap();
    let error = store(disk.path(), &[])
        .copy_ranges(
            &name("old"),
            &name("new"),
            std::slice::from_ref(&(0..5 << 20)),
        )
        .unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NoSpace, "{error}");
}

#[test]
fn owner_and_mode_are_copied_in_a_local_folder() {
    let folder = tempfile::tempdir().unwrap();
    for (file, mode) in [("old", 0o604), ("new", 0o600)] {
        fs::write(folder.path().join(file), b"x").unwrap();
        fs::set_permissions(folder.path().join(file), fs::Permissions::from_mode(mode)).unwrap();
    }
    let store = sprat_store::LocalStore::open(folder.path()).unwrap();
    store
        .copy_owner_and_mode(&name("old"), &name("new"))
        .unwrap();
    let mode = fs::metadata(folder.path().join("new")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o604);
    assert!(store.open(&name("new"), Access::ReadWrite).is_ok());
}
