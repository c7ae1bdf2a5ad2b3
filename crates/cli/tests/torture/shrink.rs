//! A shrink that is killed, or loses its connection, at each of its remote changes in turn.

use std::fs;

use sprat_testkit::client_and_server::{self, FileSystem};
use sprat_testkit::machine::strikes::{self, Struck, same_bytes, strike};
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine, noise};
use sprat_testkit::requires;
use sprat_testkit_session::plain_volume::PlainVolume;

const FOLDERS: [&str; 2] = ["store", "state"];
const SIZE: &str = "768M";
const SMALLER: &str = "320M";
const SMALLER_BYTES: u64 = 320 << 20;

/// A container with one snapshot, and data behind the new end.
struct Shrunk {
    machine: TestMachine,
    files: u64,
}

impl Shrunk {
    fn new() -> Self {
        let machine = TestMachine::new();
        let files = 24;
        for number in 0..files {
            machine.write(&format!("src/{number}"), noise(2 << 20, number));
        }
        machine.init(&[CONTAINER, "--size", SIZE, "--file-system", "btrfs"]);
        machine.backup(&[]).succeeded();
        let key = fs::read(machine.path("config/keys/x.key")).unwrap();
        machine.write("key", key);
        let target = machine.on_line(CONTAINER);
        let look = ["--key-file", "key", "snapshots", &target];
        machine.sprat_struck(&look, None).succeeded();
        machine.copy_folders(&FOLDERS, "", "-before");
        Self { machine, files }
    }

    /// Decrypted offline, it is clean, and the snapshot has every file.
    fn is_whole(&self, at: &str) {
        let machine = &self.machine;
        let (container, key) = (machine.path(CONTAINER), machine.path("key"));
        let plain = PlainVolume::export(&container, &key, &machine.path("plain"));
        plain.assert_clean();
        let mounted = plain.mount(&machine.path("offline"));
        let source = machine.path("src");
        let kept = machine
            .path("offline/home/latest")
            .join(source.strip_prefix("/").unwrap());
        for number in 0..self.files {
            let name = number.to_string();
            assert!(
                same_bytes(&source.join(&name), &kept.join(&name)),
                "{at}: {name}"
            );
        }
        drop(mounted);
    }

    /// What this machine has cut itself is no older state.
    fn is_known(&self, at: &str) {
        let target = self.machine.on_line(CONTAINER);
        let look = ["--key-file", "key", "snapshots", &target];
        let ran = self.machine.sprat_struck(&look, None);
        assert_eq!(ran.code, 0, "{at}\nthen\n{}", ran.whole());
    }

    fn length(&self) -> u64 {
        fs::metadata(self.machine.path(CONTAINER)).unwrap().len()
    }
}

impl Struck for Shrunk {
    fn machine(&self) -> &TestMachine {
        &self.machine
    }

    fn begin_anew(&self) {
        self.machine.copy_folders(&FOLDERS, "-before", "");
    }

    fn holds(&self, struck: &Ran, at: &str) {
        let at = format!("{at}: {}", struck.whole());
        self.is_whole(&at);
        self.is_known(&at);
    }

    fn is_done(&self, again: &Ran, at: &str) {
        assert_eq!(again.code, 0, "{at}: {}", again.whole());
        assert_eq!(self.length(), SMALLER_BYTES, "{at}");
        self.is_whole(at);
        self.is_known(at);
    }
}

#[test]
fn interrupted_shrink_loses_nothing_and_the_next_one_finishes() {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        FileSystem::Btrfs.missing()
    );
    let shrunk = Shrunk::new();
    let target = shrunk.machine.on_line(CONTAINER);
    strike(&shrunk, &["--key-file", "key", "shrink", &target, SMALLER]);
    // What is in it does not fit into the smallest size, and a larger size is no smaller one.
    for size in ["64M", "1G"] {
        let ran = shrunk
            .machine
            .sprat_struck(&["--key-file", "key", "shrink", &target, size], None);
        assert_eq!(ran.code, 2, "{}", ran.whole());
        shrunk.is_whole(size);
    }
    assert_eq!(shrunk.length(), SMALLER_BYTES);
}

#[test]
fn what_does_not_fit_and_ext4_are_refused() {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        FileSystem::Btrfs.missing()
    );
    let machine = TestMachine::new();
    machine.write("src/large", noise(300 << 20, 3));
    machine.init(&[CONTAINER, "--size", SIZE, "--file-system", "btrfs"]);
    machine.backup(&[]).succeeded();
    let before = fs::metadata(machine.path(CONTAINER)).unwrap().len();
    let ran = machine.sprat(&["shrink", CONTAINER, SMALLER]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(ran.stderr.contains("does not fit into"), "{}", ran.stderr);
    assert_eq!(fs::metadata(machine.path(CONTAINER)).unwrap().len(), before);
    machine.restores_whole(&["--verify"]);
    // The kernel refuses it without a reason.
    let ran = machine.sprat(&["shrink", CONTAINER, "271M"]);
    assert_eq!(ran.code, 2, "{}", ran.whole());
    assert!(ran.stderr.contains("at least 272 MiB"), "{}", ran.stderr);
    machine.init(&["store/ext4.luks", "--size", "128M"]);
    let ran = machine.sprat(&["shrink", "store/ext4.luks", "64M"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(ran.stderr.contains("nothing was changed"), "{}", ran.stderr);
}
