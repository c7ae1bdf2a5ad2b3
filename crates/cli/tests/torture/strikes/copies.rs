//! Copies and moves of a container, killed and cut off at their remote changes in turn.

use std::fs;
use std::path::PathBuf;

use sprat_testkit::client_and_server::FileSystem;
use sprat_testkit::machine::strikes::{self, Blow, Struck, copy_sparse, same_bytes, strike_with};
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::requires;

use super::{init, names};

/// Two folders, each behind its own connection.
struct Copies {
    machine: TestMachine,
    pristine: PathBuf,
    moves: bool,
}

impl Copies {
    fn new(moves: bool, file_system: FileSystem) -> Self {
        let machine = TestMachine::new();
        machine.write("src/a", "alpha\n");
        let noise = |n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8;
        machine.write("src/b", (0..700_000).map(noise).collect::<Vec<u8>>());
        init(&machine, file_system);
        for _ in 0..2 {
            machine.backup(&[]).succeeded();
        }
        let pristine = machine.path("pristine");
        copy_sparse(&machine.path(CONTAINER), &pristine);
        Self {
            machine,
            pristine,
            moves,
        }
    }

    fn command(&self) -> Vec<String> {
        let mut words = vec!["copy".to_owned()];
        words.extend(["from/x.luks", "to/x.luks"].map(|path| self.machine.on_line(path)));
        words.extend(self.moves.then(|| "--move".to_owned()));
        words
    }

    fn is_whole(&self, file: &str) -> bool {
        let file = self.machine.path(file);
        file.exists() && same_bytes(&self.pristine, &file)
    }
}

impl Struck for Copies {
    fn machine(&self) -> &TestMachine {
        &self.machine
    }

    /// The source as it was, nothing else, and no memory of what came before.
    fn begin_anew(&self) {
        let known = ["copies", "locks", "containers"].map(|name| format!("state/{name}"));
        for folder in ["from", "to"]
            .iter()
            .copied()
            .chain(known.iter().map(|name| &**name))
        {
            let path = self.machine.path(folder);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path).unwrap();
        }
        copy_sparse(&self.pristine, &self.machine.path("from/x.luks"));
    }

    fn holds(&self, struck: &Ran, at: &str) {
        let about = format!("{at}: {}", struck.whole());
        assert!(matches!(struck.code, -1 | 0 | 1 | 14), "{about}");
        let (source, copy) = (self.is_whole("from/x.luks"), self.is_whole("to/x.luks"));
        assert!(source || copy, "no whole container is left: {about}");
        // What has its name is whole, and a source stays whole as long as it is there.
        let there = |file: &str| self.machine.path(file).exists();
        assert_eq!(source, there("from/x.luks"), "{about}");
        assert_eq!(copy, there("to/x.luks"), "{about}");
    }

    fn is_done(&self, again: &Ran, at: &str) {
        let here = ["from", "to", "state/copies"].map(|folder| names(&self.machine, folder));
        let about = format!("{at}: {here:?}: {}", again.whole());
        // All had been done, and the next session takes over a lock that was left.
        let over = match self.moves {
            true => again.code == 10,
            false => again.stderr.contains("exists already"),
        };
        assert!(again.code == 0 || over, "{about}");
        assert!(self.is_whole("to/x.luks"), "{about}");
        let source = self.machine.path("from/x.luks");
        assert_eq!(source.exists(), !self.moves, "{about}");
        let left: Vec<String> = ["from", "to"]
            .iter()
            .flat_map(|folder| names(&self.machine, folder))
            .filter(|name| name != "x.luks" && !(over && name.contains(".lock.")))
            .collect();
        assert!(left.is_empty(), "{left:?} is left: {about}");
    }
}

fn strike_copy(moves: bool, file_system: FileSystem) {
    requires!(strikes::missing(), file_system.missing());
    let copies = Copies::new(moves, file_system);
    let command = copies.command();
    let command: Vec<&str> = command.iter().map(|word| &**word).collect();
    strike_with(file_system, &copies, &command);
    // With time for reconnecting the same run continues by itself.
    copies.begin_anew();
    let blow = Blow {
        how: "lose",
        when: "before",
        nth: 20,
        kind: None,
    };
    let patient = copies.machine.sprat_struck(&command, Some(blow));
    assert!(copies.machine.was_struck());
    copies.is_done(&patient, "a lost line");
    assert!(
        patient.stderr.contains("connection lost"),
        "{}",
        patient.whole()
    );
    if moves {
        // A repeated move after a finished one does not suggest to remove what is left.
        let over = copies.machine.sprat_struck(&command, None);
        let said = over.failed_with(10);
        assert!(said.contains("the move is complete"), "{said}");
    }
    // The copy opens, with every snapshot, on a machine that does not know it.
    let copy = copies.machine.path("to/x.luks");
    let look = ["snapshots", copy.to_str().unwrap(), "--json"];
    let listed = copies.machine.sprat(&look).json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
    copies.machine.nothing_is_left();
}

#[test]
fn interrupted_copy_keeps_its_source_and_finishes_when_repeated() {
    strike_copy(false, FileSystem::Ext4);
}

#[test]
fn interrupted_copy_keeps_its_source_and_finishes_when_repeated_on_btrfs() {
    strike_copy(false, FileSystem::Btrfs);
}

#[test]
fn interrupted_move_keeps_a_container_and_finishes_when_repeated() {
    strike_copy(true, FileSystem::Ext4);
}

#[test]
fn interrupted_move_keeps_a_container_and_finishes_when_repeated_on_btrfs() {
    strike_copy(true, FileSystem::Btrfs);
}
