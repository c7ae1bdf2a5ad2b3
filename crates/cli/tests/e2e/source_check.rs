//! A run reads the sources again: bit rot on the disk of a source, until a person accepts it or the file is healed.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::program::system;
use sprat_testkit::{needs, requires};

/// A disk with an ext4 that the machine backs up.
struct SourceDisk {
    image: PathBuf,
    at: PathBuf,
}

impl SourceDisk {
    fn new(machine: &TestMachine) -> Self {
        let disk = Self {
            image: machine.path("disk.img"),
            at: machine.path("disk"),
        };
        File::create(&disk.image)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        system("mkfs.ext4", &["-q", "-b", "4096", disk.image()]);
        fs::create_dir(&disk.at).unwrap();
        disk.mount();
        disk
    }

    fn image(&self) -> &str {
        self.image.to_str().unwrap()
    }

    fn mount(&self) {
        system(
            "mount",
            &["-o", "loop", self.image(), self.at.to_str().unwrap()],
        );
    }

    fn unmount(&self) {
        system("umount", &[self.at.to_str().unwrap()]);
        // Another mount namespace may have a copy of the mount.
        for _ in 0..3000 {
            if system("losetup", &["-j", self.image()]).is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the loop device stays");
    }

    /// A file that nobody has touched for long.
    fn write_old(&self, name: &str, content: &[u8]) {
        let path = self.at.join(name);
        fs::write(&path, content).unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let file = File::options().write(true).open(path).unwrap();
        file.set_times(FileTimes::new().set_modified(old)).unwrap();
        drop(file);
        self.unmount();
        let request = format!("set_inode_field /{name} ctime @1700000000");
        system("debugfs", &["-w", "-R", &request, self.image()]);
        self.mount();
    }

    /// Flips a byte of a file on the device.
    fn rot(&self, name: &str) {
        self.unmount();
        let blocks = system("debugfs", &["-R", &format!("blocks /{name}"), self.image()]);
        let block: u64 = blocks.split_whitespace().next().unwrap().parse().unwrap();
        let device = File::options()
            .read(true)
            .write(true)
            .open(&self.image)
            .unwrap();
        let mut byte = [0];
        device.read_exact_at(&mut byte, block * 4096 + 9).unwrap();
        device.write_all_at(&[!byte[0]], block * 4096 + 9).unwrap();
        device.sync_all().unwrap();
        self.mount();
    }
}

impl Drop for SourceDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// The last slice was read long ago.
fn days_later(machine: &TestMachine) {
    let path = machine.path("state/sources/home.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["last"] = json!("2026-01-01T00:00:00Z");
    fs::write(path, state.to_string()).unwrap();
}

#[test]
fn run_finds_bit_rot_and_keeps_the_old_content_until_it_is_accepted() {
    requires!(
        needs::root(),
        needs::program("debugfs"),
        needs::program("mkfs.ext4")
    );
    let machine = TestMachine::with_container();
    let disk = SourceDisk::new(&machine);
    disk.write_old("photo", &noise(100_000, 1));
    disk.write_old("film", &noise(200_000, 2));
    let config = |every: &str| {
        machine.write(
            "config/sprat.toml",
            format!(
                "[container.nas]\ntarget = \"{}\"\nkey_file = \"{}\"\ncheck_every = \"never\"\n\
                 drill_every = \"never\"\nmin_free = \"1 MiB\"\n\
                 [job.home]\ncontainer = \"nas\"\nsources = \"{}\"\nevery = \"never\"\n\
                 keep_last = 1\nprune_every = \"0 s\"\nsource_check_every = \"{every}\"\n",
                machine.path(CONTAINER).display(),
                machine.path("config/keys/x.key").display(),
                disk.at.display(),
            ),
        );
    };
    config("1 day");
    let run = |code: i32| {
        let ran = machine.sprat(&["run", "--now", "--json"]);
        assert_eq!(ran.code, code, "{}", ran.whole());
        ran.json()
    };
    let slice = |said: &Value| {
        let slice = &said["sources"][0];
        ["files_read", "in_doubt", "changed_silently", "rewritten"].map(|field| {
            match &slice[field] {
                Value::Array(names) => names.len() as u64,
                Value::Object(list) => list["count"].as_u64().unwrap(),
                number => number.as_u64().unwrap(),
            }
        })
    };
    assert_eq!(slice(&run(0)), [2, 0, 0, 0]);
    // Once a day.
    assert_eq!(run(0)["sources"], json!([]));

    disk.rot("photo");
    days_later(&machine);
    let said = run(0);
    assert_eq!(slice(&said), [2, 1, 0, 0], "{said}");
    days_later(&machine);
    let said = run(13);
    assert_eq!(slice(&said), [2, 0, 1, 0], "{said}");
    assert!(
        said["sources"][0]["changed_silently"][0]
            .as_str()
            .unwrap()
            .ends_with("/photo")
    );
    assert_eq!(said["events"][0]["kind"], "damage", "{said}");
    assert_eq!(
        said["events"][0]["cause"],
        json!({ "code": 13, "class": "source" })
    );
    let status = machine.sprat(&["status", "--offline"]);
    assert_eq!(status.code, 13, "{}", status.whole());
    assert!(
        status
            .stdout
            .contains("1 source file changed although nobody"),
        "{}",
        status.whole()
    );

    // The file goes, and with it the old content from the newer snapshots.
    let snapshots = || {
        let listed = machine.ok(&["snapshots", "nas", "--json"]).json();
        let all = listed["snapshots"].as_array().unwrap();
        let names = all
            .iter()
            .map(|one| one["folder"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    let old = snapshots();
    assert_eq!(old.len(), 1);
    fs::remove_file(disk.at.join("photo")).unwrap();
    run(0);
    assert_eq!(
        snapshots()[..1],
        old,
        "the one with the old content is kept"
    );
    assert_eq!(snapshots().len(), 2);
    let table = machine
        .ok(&["prune", "nas", "--job", "home", "--dry-run"])
        .stdout;
    assert!(
        table.contains("from before its content changed silently"),
        "{table}"
    );
    let remove = ["remove", "nas", &*format!("home/{}", old[0]), "--yes"];
    machine.sprat(&remove).failed_with(2);
    machine.ok(&["accept", "home@nas"]);
    assert_eq!(machine.sprat(&["status", "--offline"]).code, 0);
    run(0);
    assert!(!snapshots().contains(&old[0]));

    // A file that is whole again closes its event.
    for code in [0, 13] {
        if code == 0 {
            disk.rot("film");
        }
        days_later(&machine);
        run(code);
    }
    disk.rot("film");
    days_later(&machine);
    assert_eq!(run(0)["events"], json!([]));

    // Somebody wrote to it.
    let film = disk.at.join("film");
    let modified = fs::metadata(&film).unwrap().modified().unwrap();
    let file = File::options().write(true).open(&film).unwrap();
    file.write_all_at(b"!", 7).unwrap();
    file.set_times(FileTimes::new().set_modified(modified))
        .unwrap();
    days_later(&machine);
    assert_eq!(slice(&run(0)), [1, 0, 0, 1]);
    config("never");
    days_later(&machine);
    assert_eq!(run(0)["sources"], json!([]));
    drop(disk);
    machine.nothing_is_left();
}
