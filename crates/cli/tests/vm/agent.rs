//! Past states that `sprat-agent` kept on a server, opened with stock tools on a stock kernel after an intruder with
//! the key and the login destroyed the container: sshfs, cryptsetup, mount.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::SeekFrom;
use sprat_testkit::client_and_server::ClientAndServer;
use sprat_testkit::dice::Dice;
use sprat_testkit::needs;
use sprat_testkit::program::{sprat, system};
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit::ssh_server::OpenSshOptions;

use crate::qemu::guest;

/// Every session begins a generation, and nothing else does.
const POLICY: &str = "new = burst 1000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\n";

pub fn agent() -> PathBuf {
    sprat().with_file_name("sprat-agent")
}

/// A client whose server runs the agent.
pub struct Kept {
    pub pair: ClientAndServer,
    // The agent's script.
    _scripts: tempfile::TempDir,
    pub states: String,
}

impl Kept {
    fn new() -> Self {
        Self::with(POLICY, |_| {})
    }

    /// With another policy. The server's folder is prepared first.
    pub fn with(policy: &str, prepare: impl FnOnce(&ClientAndServer)) -> Self {
        let scripts = tempfile::tempdir().unwrap();
        let script = scripts.path().join("agent");
        let pair = ClientAndServer::with(OpenSshOptions::forced(script.to_str().unwrap()));
        prepare(&pair);
        let (agent, root) = (agent(), pair.server());
        let text = format!(
            "#!/bin/sh\nexec {} serve --root {}\n",
            agent.display(),
            root.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let words = ["adopt".as_ref(), "--root".as_ref(), root.as_os_str()];
        system(agent.to_str().unwrap(), &words);
        fs::write(root.join(".sprat-agent/policy"), policy).unwrap();
        Self {
            pair,
            _scripts: scripts,
            states: String::new(),
        }
    }

    pub fn source(&self) -> PathBuf {
        self.pair.path("source")
    }

    pub fn make_source(&self, small_files: u64) {
        let shape = Shape {
            small_files,
            middle_files: 6,
            large_files: 0,
        };
        source_tree::make(&self.source().join("plain"), shape, 20_261_130);
    }

    pub fn give_keys(&self) {
        guest::give_keys(&self.pair);
        let key = fs::read(self.pair.key_file()).unwrap();
        guest::give(&self.pair, "key", key, 0o600);
    }

    /// A backup of what is in the source now, which is expected of it later.
    pub fn back_up(&self, name: &str) {
        self.pair.backup("job", &self.source());
        let listing = crate::qemu::tool("listing").arg(self.source()).output();
        let listing = listing.unwrap().stdout;
        guest::give(&self.pair, &format!("expected/{name}"), listing, 0o600);
    }

    /// The state that the last session began with has this backup as its newest one.
    pub fn newest_has(&mut self, backup: &str, kind: &str) -> String {
        let folder = self.pair.server().join(".sprat-agent/laptop.luks");
        let names = fs::read_dir(&folder).unwrap().filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_prefix("g.")?.parse::<u32>().ok()
        });
        let newest = names.max().unwrap();
        let head = fs::read_to_string(folder.join(format!("g.{newest}/head"))).unwrap();
        let name = head.lines().find_map(|line| line.strip_prefix("name "));
        let name = name.unwrap().to_owned();
        let _ = writeln!(self.states, "{name} {backup} {kind}");
        // A client that is done says so, and does not wait for an answer.
        let clean = head.contains("\nclean true\n");
        assert!(!clean || kind == "clean", "{head}");
        name
    }

    /// Every process of the client is killed while its bytes are on their way.
    fn kill_a_backup_half_way(&self) {
        let noise = source_tree::random(&mut Dice::new(5), 24 << 20);
        let big = self.source().join("big");
        fs::write(&big, noise).unwrap();
        let blocks = || fs::metadata(self.pair.container()).unwrap().blocks();
        let before = blocks();
        let source = self.source().display().to_string();
        let mut backup = self.pair.sprat();
        backup.args(["backup", self.pair.target(), "--name", "job", &source]);
        let mut backup = backup.spawn().unwrap();
        while blocks() < before + (8 << 11) {
            assert!(backup.try_wait().unwrap().is_none(), "it ended before");
            std::thread::sleep(Duration::from_millis(1));
        }
        for process in self.pair.processes() {
            if let Some(pid) = rustix::process::Pid::from_raw(process.pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        backup.wait().unwrap();
        self.pair.assert_nothing_is_left();
        fs::remove_file(big).unwrap();
    }

    /// Somebody with the key and the login overwrites everything.
    fn destroy(&self) {
        let at = self.pair.path("intruder");
        fs::create_dir(&at).unwrap();
        let config = self.pair.sshd.path("ssh_config");
        let paths = [config.to_str().unwrap(), at.to_str().unwrap()];
        system("sshfs", &["-F", paths[0], "any.host:/", paths[1]]);
        let done = overwrite(&self.pair.container(), &at.join("laptop.luks"));
        system("umount", &[paths[1]]);
        done.unwrap();
    }
}

/// Writes garbage through `path` wherever the container has data.
fn overwrite(container: &Path, path: &Path) -> std::io::Result<()> {
    let known = fs::File::open(container)?;
    let file = fs::File::options().read(true).write(true).open(path)?;
    let garbage = source_tree::random(&mut Dice::new(9), 1 << 20);
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&known, SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&known, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let len = garbage.len().min(usize::try_from(end - at).unwrap());
            file.write_all_at(&garbage[..len], at)?;
            at += len as u64;
        }
    }
    file.sync_all()
}

#[test]
fn past_states_open_with_sshfs_cryptsetup_and_mount_after_the_container_is_destroyed() {
    sprat_testkit::requires!(crate::qemu::missing(), needs::built(&agent()));
    let mut kept = Kept::new();
    kept.make_source(100);
    kept.pair.init(1);
    kept.give_keys();

    kept.back_up("first");
    fs::write(kept.source().join("new"), "second").unwrap();
    kept.back_up("second");
    kept.newest_has("first", "clean");
    kept.kill_a_backup_half_way();
    fs::write(kept.source().join("new"), "third").unwrap();
    kept.back_up("third");
    kept.newest_has("second", "journal");
    kept.destroy();
    kept.newest_has("third", "clean");

    let status = Command::new(agent())
        .args(["status", "--root"])
        .arg(kept.pair.server())
        .output()
        .unwrap();
    assert_eq!(status.status.code(), Some(3), "{status:?}");
    guest::give(&kept.pair, "states", &kept.states, 0o600);
    let source = format!("source={}\n", kept.source().display());
    let script = source + &guest::script("guest-past");
    guest::run_until_done(&kept.pair, &script, "guest-agent", Duration::from_secs(900));
    kept.pair.assert_nothing_is_left();
}
