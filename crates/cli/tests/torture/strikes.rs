//! Changes of a container, killed and cut off at their remote changes in turn: keys, header, prune, remove, pin,
//! trim by each way, copy and move. Each time there must be a container that opens and has every
//! snapshot, and the same command must succeed when repeated.
//!
//! In `make test` each gets some blows at random moments, half of them with ext4 in the container and half with
//! btrfs; with `SPRAT_STRIKES` (`make torture`: 200) a kill and a cut at every change up to so many, else at so
//! many and at the end of each phase.

mod copies;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sprat_luks::{Header, Secret};
use sprat_testkit::client_and_server::{self, FileSystem, HEADER_BYTES};
use sprat_testkit::machine::strikes::{self, Blow, Struck, copy_sparse, strike_with};
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::{leases, needs, requires};
use sprat_testkit_session::plain_volume::{PlainVolume, data_after};

/// What a command may change: the server's folder, and what the client knows.
const FOLDERS: [&str; 2] = ["store", "state"];

/// Makes the smallest container; returns its recovery key.
fn init(machine: &TestMachine, file_system: FileSystem) -> String {
    let size = match file_system {
        FileSystem::Ext4 => "64M",
        FileSystem::Btrfs => "256M",
    };
    let kind = ["--file-system", file_system.name()];
    machine.init(&[&[CONTAINER, "--size", size][..], &kind].concat())
}

/// Names in one of the machine's folders.
fn names(machine: &TestMachine, folder: &str) -> Vec<String> {
    leases::names_but_free(&machine.path(folder))
}

/// A container whose keys are changed.
struct Keys {
    machine: TestMachine,
    file_system: FileSystem,
    /// All keys that open it at some time; `before` and `after` list those that do then.
    keys: Vec<Secret>,
    before: Vec<bool>,
    after: Vec<bool>,
    payload: BTreeMap<u64, Vec<u8>>,
    /// A removal that had come to its end finds nothing to remove when it is run again.
    removes: bool,
}

impl Keys {
    fn new(file_system: FileSystem) -> Self {
        let machine = TestMachine::new();
        machine.write("src/a", "alpha\n");
        let recovery = init(&machine, file_system);
        machine.backup(&[]).succeeded();
        machine.write("pass", "correct horse battery");
        let key = fs::read(machine.path("config/keys/x.key")).unwrap();
        machine.write("key", &key);
        Self {
            keys: vec![
                Secret::key_file(key),
                Secret::passphrase(recovery),
                Secret::passphrase("correct horse battery".to_owned()),
            ],
            before: Vec::new(),
            after: Vec::new(),
            payload: payload(&machine),
            removes: false,
            file_system,
            machine,
        }
    }

    /// Which of the keys open the file.
    fn opened(&self) -> Vec<bool> {
        let file = fs::File::open(self.machine.path(CONTAINER)).unwrap();
        let header = Header::load(&file).unwrap();
        let keys = self.keys.iter();
        keys.map(|key| header.unlock(&file, key).is_ok()).collect()
    }

    /// Strikes at `change`, after which the keys `after` open it, and leaves it done.
    fn strike(&mut self, change: &[&str], after: &[bool]) {
        self.before = self.opened();
        self.after = after.to_vec();
        self.removes = change.contains(&"remove");
        self.machine.copy_folders(&FOLDERS, "", "-before");
        strike_with(self.file_system, self, change);
        self.begin_anew();
        let ran = self.machine.sprat_struck(change, None);
        self.is_done(&ran, "at the end");
    }
}

/// The blocks behind the header that are no zeros, by their place.
fn payload(machine: &TestMachine) -> BTreeMap<u64, Vec<u8>> {
    let file = fs::File::open(machine.path(CONTAINER)).unwrap();
    let mut blocks = BTreeMap::new();
    let mut at = HEADER_BYTES;
    while let Some((from, to)) = data_after(&file, at, u64::MAX) {
        for place in (from..to).step_by(4096) {
            let mut block = vec![0; 4096];
            file.read_exact_at(&mut block, place).unwrap();
            if block.iter().any(|byte| *byte != 0) {
                blocks.insert(place, block);
            }
        }
        at = to;
    }
    assert!(blocks.len() > 10);
    blocks
}

impl Struck for Keys {
    fn machine(&self) -> &TestMachine {
        &self.machine
    }

    fn begin_anew(&self) {
        self.machine.copy_folders(&FOLDERS, "-before", "");
    }

    fn holds(&self, struck: &Ran, at: &str) {
        let now = self.opened();
        let stay = |was: &[bool]| was.iter().zip(&now).all(|(was, now)| !was || *now);
        let opens = stay(&self.before) || stay(&self.after);
        assert!(opens, "{at}: {now:?}\n{}", struck.whole());
        assert!(payload(&self.machine) == self.payload, "{at}");
        // What this machine began is not the work of others.
        let target = self.machine.on_line(CONTAINER);
        let shown = ["--key-file", "key", "snapshots", &target];
        let shown = self.machine.sprat_struck(&shown, None);
        assert_eq!(
            shown.code,
            0,
            "{at}\n{}\nthen\n{}",
            struck.whole(),
            shown.whole()
        );
    }

    fn is_done(&self, again: &Ran, at: &str) {
        let came_through = self.removes && again.stderr.contains("there is no key slot");
        assert!(again.code == 0 || came_through, "{at}: {}", again.whole());
        assert_eq!(self.opened(), self.after, "{at}");
        assert!(payload(&self.machine) == self.payload, "{at}");
        let header = Header::load(&fs::File::open(self.machine.path(CONTAINER)).unwrap());
        assert!(header.unwrap().copies().both_good(), "{at}");
        assert_eq!(names(&self.machine, "store"), ["x.luks"], "{at}");
    }
}

#[test]
fn interrupted_key_change_leaves_a_container_that_opens() {
    interrupted_key_change(FileSystem::Ext4);
}

#[test]
fn interrupted_key_change_leaves_a_container_that_opens_on_btrfs() {
    interrupted_key_change(FileSystem::Btrfs);
}

fn interrupted_key_change(file_system: FileSystem) {
    requires!(strikes::missing(), file_system.missing());
    let mut keys = Keys::new(file_system);
    let target = keys.machine.on_line(CONTAINER);
    let own = ["--key-file", "key"];
    let with = |words: &[&'static str]| {
        let mut all = own.to_vec();
        all.extend(&words[..2]);
        all.push(&target);
        all.extend(&words[2..]);
        all
    };
    let kept = with(&["key", "header-backup", "kept"]);
    keys.machine.sprat_struck(&kept, None).succeeded();
    let add = with(&["key", "add", "--new-passphrase-file", "pass"]);
    keys.strike(&add, &[true, true, true]);
    let remove = with(&["key", "remove", "1", "--allow-last"]);
    keys.strike(&remove, &[true, false, true]);
    let restore = with(&["key", "header-restore", "kept", "--yes"]);
    keys.strike(&restore, &[true, true, false]);
    keys.machine.restores_whole(&[]);
    keys.machine.nothing_is_left();
}

/// A container with snapshots, and what is in each.
struct Snapshots {
    machine: TestMachine,
    file_system: FileSystem,
    /// All that were ever made, oldest first; `was/NAME` is a copy of the source.
    all: Vec<String>,
    /// Those that must stay, whatever happens.
    kept: Vec<String>,
    /// The others may be gone, or whole.
    may_go: Vec<String>,
    /// What is there when the command is done: snapshots, and `NAME.pin` of pinned ones.
    done: Vec<String>,
}

/// Why the tests pin a snapshot.
const REASON: &str = "before the move";

impl Snapshots {
    /// Three of them, with a file of their own each.
    fn new(file_system: FileSystem) -> Self {
        let machine = TestMachine::new();
        init(&machine, file_system);
        let key = fs::read(machine.path("config/keys/x.key")).unwrap();
        machine.write("key", key);
        fs::create_dir(machine.path("was")).unwrap();
        let mut all = Vec::new();
        for round in 0..3_u8 {
            let noise = |n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8 ^ round;
            let _ = fs::remove_file(machine.path("src/own"));
            machine.write("src/own", (0..1_500_000).map(noise).collect::<Vec<u8>>());
            machine.write(&format!("src/d/{round}"), format!("{round}").repeat(9_000));
            let ran = machine.backup(&["--json"]).succeeded();
            let name = ran.json()["jobs"][0]["snapshot"]
                .as_str()
                .unwrap()
                .to_owned();
            copy_sparse(&machine.path("src"), &machine.path(format!("was/{name}")));
            all.push(name);
        }
        let kept = all.split_off(2);
        let (may_go, all) = (all.clone(), [all, kept.clone()].concat());
        Self {
            machine,
            file_system,
            all,
            done: kept.clone(),
            kept,
            may_go,
        }
    }

    /// The same without the older two, whose blocks can be freed.
    fn pruned(file_system: FileSystem) -> Self {
        let mut snapshots = Self::new(file_system);
        let prune = snapshots.prune(CONTAINER.to_owned());
        let prune: Vec<&str> = prune.iter().map(|word| &**word).collect();
        snapshots.machine.ok(&prune);
        snapshots.may_go.clear();
        snapshots
    }

    fn prune(&self, target: String) -> Vec<String> {
        let mut words = ["--key-file", "key", "prune", "--job", "home"]
            .map(str::to_owned)
            .to_vec();
        words.extend(["--keep-last", "1"].map(str::to_owned));
        words.push(target);
        words
    }

    /// What is known of the container is known of its target; then this is where each strike begins.
    fn ready(self) -> Self {
        let target = self.machine.on_line(CONTAINER);
        let look = ["--key-file", "key", "snapshots", &target];
        self.machine.sprat_struck(&look, None).succeeded();
        self.machine.copy_folders(&FOLDERS, "", "-before");
        self
    }

    fn strike(&self, command: &[&str]) {
        strike_with(self.file_system, self, command);
    }

    /// Decrypted offline, it is clean and every snapshot whole; returns their names.
    fn whole(&self, at: &str) -> BTreeSet<String> {
        let machine = &self.machine;
        let (container, key) = (machine.path(CONTAINER), machine.path("key"));
        let plain = PlainVolume::export(&container, &key, &machine.path("plain"));
        plain.assert_clean();
        let mounted = plain.mount(&machine.path("offline"));
        let here = names(machine, "offline/home");
        let here: BTreeSet<String> = here
            .into_iter()
            .filter(|name| name.starts_with('2'))
            .collect();
        let source = machine.path("src");
        for name in &here {
            assert!(self.all.contains(name), "{at}: {name}");
            let root = machine.path(format!("offline/home/{name}"));
            let compared = Command::new("diff")
                .arg("-r")
                .arg(machine.path(format!("was/{name}")))
                .arg(root.join(source.strip_prefix("/").unwrap()))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&compared.stdout);
            assert!(compared.status.success(), "{at}, {name}: {said}");
        }
        let mut here = here;
        for pin in names(machine, "offline/home/.sprat") {
            if pin.ends_with(".pin") {
                let path = machine.path(format!("offline/home/.sprat/{pin}"));
                let reason = fs::read_to_string(path).unwrap();
                assert_eq!(reason, format!("{REASON}\n"), "{at}");
                here.insert(pin);
            }
        }
        drop(mounted);
        here
    }
}

impl Struck for Snapshots {
    fn machine(&self) -> &TestMachine {
        &self.machine
    }

    fn begin_anew(&self) {
        self.machine.copy_folders(&FOLDERS, "-before", "");
    }

    fn holds(&self, struck: &Ran, at: &str) {
        let about = format!("{at}: {}", struck.whole());
        let here = self.whole(&about);
        assert!(self.kept.iter().all(|name| here.contains(name)), "{about}");
        let known = |name: &String| self.kept.contains(name) || self.may_go.contains(name);
        assert!(here.iter().all(known), "{here:?}: {about}");
    }

    fn is_done(&self, again: &Ran, at: &str) {
        // A removal that had come to its end finds nothing to remove when it is run again.
        let was_removed = again.code == 1 && again.whole().contains("job home has no snapshot");
        assert!(again.code == 0 || was_removed, "{at}: {}", again.whole());
        let here: Vec<String> = self.whole(at).into_iter().collect();
        assert_eq!(here, self.done, "{at}");
        assert_eq!(names(&self.machine, "store"), ["x.luks"], "{at}");
    }
}

#[test]
fn interrupted_prune_loses_no_kept_snapshot() {
    interrupted_prune(FileSystem::Ext4);
}

#[test]
fn interrupted_prune_loses_no_kept_snapshot_on_btrfs() {
    interrupted_prune(FileSystem::Btrfs);
}

fn interrupted_prune(file_system: FileSystem) {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        file_system.missing()
    );
    let snapshots = Snapshots::new(file_system).ready();
    let prune = snapshots.prune(snapshots.machine.on_line(CONTAINER));
    snapshots.strike(&prune.iter().map(|word| &**word).collect::<Vec<_>>());
}

#[test]
fn interrupted_remove_loses_no_other_snapshot() {
    interrupted_remove(FileSystem::Ext4);
}

#[test]
fn interrupted_remove_loses_no_other_snapshot_on_btrfs() {
    interrupted_remove(FileSystem::Btrfs);
}

fn interrupted_remove(file_system: FileSystem) {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        file_system.missing()
    );
    let mut snapshots = Snapshots::new(file_system);
    // The newest one: `latest` and what this machine expects change, too.
    let newest = snapshots.kept.pop().unwrap();
    snapshots.kept = std::mem::replace(&mut snapshots.may_go, vec![newest.clone()]);
    snapshots.done.clone_from(&snapshots.kept);
    let snapshots = snapshots.ready();
    let target = snapshots.machine.on_line(CONTAINER);
    let name = format!("home/{newest}");
    let words = [
        "--key-file",
        "key",
        "remove",
        "--yes",
        "--allow-newest",
        &target,
        &name,
    ];
    snapshots.strike(&words);
}

#[test]
fn interrupted_pin_loses_no_snapshot() {
    interrupted_pin(FileSystem::Ext4);
}

#[test]
fn interrupted_pin_loses_no_snapshot_on_btrfs() {
    interrupted_pin(FileSystem::Btrfs);
}

fn interrupted_pin(file_system: FileSystem) {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        file_system.missing()
    );
    let mut snapshots = Snapshots::new(file_system);
    snapshots.kept.clone_from(&snapshots.all);
    let pin = format!("{}.pin", snapshots.all[0]);
    snapshots.done = [
        &snapshots.all[..1],
        std::slice::from_ref(&pin),
        &snapshots.all[1..],
    ]
    .concat();
    snapshots.may_go = vec![pin];
    let snapshots = snapshots.ready();
    let target = snapshots.machine.on_line(CONTAINER);
    let name = format!("home/{}", snapshots.all[0]);
    let words = [
        "--key-file",
        "key",
        "pin",
        "--reason",
        REASON,
        &target,
        &name,
    ];
    snapshots.strike(&words);
}

fn strike_trim(file_system: FileSystem, more: &[&str]) {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        file_system.missing(),
        needs::program("fallocate")
    );
    let snapshots = Snapshots::pruned(file_system).ready();
    let target = snapshots.machine.on_line(CONTAINER);
    let mut command = vec!["--key-file", "key", "trim", &target];
    command.extend(more);
    snapshots.strike(&command);
}

#[test]
fn interrupted_trim_by_shell_loses_nothing() {
    strike_trim(FileSystem::Ext4, &[]);
}

#[test]
fn interrupted_trim_by_shell_loses_nothing_on_btrfs() {
    strike_trim(FileSystem::Btrfs, &[]);
}

#[test]
fn interrupted_rewrite_loses_nothing() {
    strike_trim(FileSystem::Ext4, &["--rewrite"]);
}

#[test]
fn interrupted_rewrite_loses_nothing_on_btrfs() {
    strike_trim(FileSystem::Btrfs, &["--rewrite"]);
}

#[test]
fn interrupted_rewrite_through_client_loses_nothing() {
    strike_trim(FileSystem::Ext4, &["--rewrite", "--through-client"]);
}

#[test]
fn interrupted_rewrite_through_client_loses_nothing_on_btrfs() {
    strike_trim(FileSystem::Btrfs, &["--rewrite", "--through-client"]);
}

/// The server may do the rename later: the next session makes sure that it can't.
#[test]
fn next_session_removes_files_of_a_killed_rewrite() {
    requires!(strikes::missing(), client_and_server::missing());
    let snapshots = Snapshots::pruned(FileSystem::Ext4).ready();
    let machine = &snapshots.machine;
    let target = machine.on_line(CONTAINER);
    let key = ["--key-file", "key"];
    let rewrite = [&key[..], &["trim", &target, "--rewrite"]].concat();
    let blow = Blow {
        how: "kill",
        when: "before",
        nth: 1,
        kind: Some("rename"),
    };
    machine.sprat_struck(&rewrite, Some(blow));
    assert!(machine.was_struck());
    let left = names(machine, "store");
    assert!(left.iter().any(|name| name.starts_with("x.luks.trim-")));
    let backup = ["backup", &target, "--name", "home", "src"];
    let ran = machine
        .sprat_struck(&[&key[..], &backup].concat(), None)
        .succeeded();
    assert_eq!(names(machine, "store"), ["x.luks"], "{}", ran.whole());
    machine.nothing_is_left();
}

#[test]
fn killed_local_trim_loses_nothing() {
    killed_local_trim(FileSystem::Ext4);
}

#[test]
fn killed_local_trim_loses_nothing_on_btrfs() {
    killed_local_trim(FileSystem::Btrfs);
}

/// There is no connection to cut, and no request to count.
fn killed_local_trim(file_system: FileSystem) {
    requires!(
        strikes::missing(),
        client_and_server::missing(),
        file_system.missing()
    );
    let snapshots = Snapshots::pruned(file_system);
    let machine = &snapshots.machine;
    machine.copy_folders(&FOLDERS, "", "-before");
    let trim = ["--key-file", "key", "trim", CONTAINER];
    let begun = Instant::now();
    let ran = machine.sprat(&trim);
    let took = begun.elapsed();
    snapshots.is_done(&ran, "undisturbed");
    let (mut dice, kills) = (strikes::dice(), strikes::long_form().unwrap_or(2));
    let mut too_late = 0;
    for kill in 0..kills {
        snapshots.begin_anew();
        let mut sprat = machine.command();
        sprat.args(trim).stdout(Stdio::null()).stderr(Stdio::null());
        let mut sprat = sprat.spawn().unwrap();
        let part_us = u64::try_from(took.as_micros()).unwrap() / kills;
        let moment = Duration::from_micros(kill * part_us + dice.below(part_us.max(1)));
        std::thread::sleep(moment);
        machine.kill_all();
        let status = sprat.wait().unwrap();
        too_late += u32::from(status.success());
        let at = format!("killed after {moment:?}");
        machine.nothing_is_left();
        let ran = Ran {
            code: status.code().unwrap_or(-1),
            stdout: String::new(),
            stderr: String::new(),
        };
        snapshots.holds(&ran, &at);
        snapshots.is_done(&machine.sprat(&trim), &at);
    }
    println!("{kills} kills in {took:?}, {too_late} of them too late");
}
