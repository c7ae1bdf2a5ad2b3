//! A server that is away for a while: down, or up again before its keys or its accounts are there.

use sprat_testkit::dice::Dice;

use super::*;

#[derive(Debug, Clone, Copy)]
enum Away {
    Down,
    /// It refuses the login.
    Login,
    /// It shows another host key, as one that asks for its disk's passphrase.
    HostKey,
}

const AWAY: [Away; 3] = [Away::Down, Away::Login, Away::HostKey];

impl Away {
    /// Loses all connections; new ones come up again a few attempts later, when this ends.
    fn happens(self, remote: &mut RemoteMachine) {
        let sshd = &mut remote.sshd;
        let keys = sshd.path(match self {
            Self::Down | Self::Login => "authorized_keys",
            Self::HostKey => "known_hosts",
        });
        let before = fs::read_to_string(&keys).unwrap();
        match self {
            Self::Down => sshd.stop(),
            Self::Login => fs::write(&keys, "").unwrap(),
            Self::HostKey => {
                let host = before.split(' ').next().unwrap();
                let other = fs::read_to_string(sshd.path("other_key.pub")).unwrap();
                fs::write(&keys, format!("{host} {other}")).unwrap();
            }
        }
        sshd.kill_sessions();
        std::thread::sleep(Duration::from_secs(5));
        fs::write(&keys, before).unwrap();
        if matches!(self, Self::Down) {
            sshd.restart().unwrap();
        }
    }
}

const COMMANDS: [&str; 4] = ["backup", "mount --rw", "mount", "copy"];

fn bears(command: &str, away: Away) {
    let at = format!("{command}, {away:?}");
    let mut remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.init();
    remote.machine.write("src/large", noise(40 << 20, 3));
    let machine_path = |remote: &RemoteMachine, name: &str| remote.machine.path(name);
    let patient = ["--reconnect-max", "90", "--quiet-time", "1"];
    if command != "backup" {
        let ran = remote.backup();
        assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
    }
    let mnt = machine_path(&remote, "mnt");
    if let Some(rw) = command.strip_prefix("mount") {
        fs::create_dir(&mnt).unwrap();
        let mut words = patient.to_vec();
        words.extend(["mount", "TARGET", mnt.to_str().unwrap()]);
        words.extend((!rw.is_empty()).then_some("--rw"));
        let ran = remote.sprat(&words);
        assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
        let inside = mnt.clone();
        let writes = !rw.is_empty();
        let using = std::thread::spawn(move || {
            // A command waits in the middle of it.
            std::thread::sleep(Duration::from_secs(2));
            if writes {
                fs::write(inside.join("new"), noise(200_000, 8)).unwrap();
                fs::File::open(inside.join("new"))
                    .unwrap()
                    .sync_all()
                    .unwrap();
            }
            fs::read_dir(inside.join("home/latest/")).unwrap().count()
        });
        away.happens(&mut remote);
        assert!(using.join().unwrap() > 0, "{at}");
        if !writes {
            let large = machine_path(&remote, "src/large");
            let back = mnt
                .join("home/latest")
                .join(large.strip_prefix("/").unwrap());
            assert!(fs::read(back).unwrap() == noise(40 << 20, 3), "{at}");
        }
        let ran = remote.sprat(&["umount", mnt.to_str().unwrap()]);
        assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
    } else {
        let mut words = patient.to_vec();
        let grows = match command {
            "copy" => {
                words.extend(["copy", "TARGET", "copy.luks"]);
                remote.machine.folder().to_owned()
            }
            _ => {
                words.extend(["--write-buffer-bytes-max", "2097152"]);
                words.extend(["backup", "TARGET", "--name", "home", "src"]);
                machine_path(&remote, "store")
            }
        };
        let taken = || -> u64 {
            let entries = fs::read_dir(&grows).unwrap().flatten();
            let files = entries.filter(|entry| entry.path().is_file());
            let blocks = files.filter_map(|entry| entry.metadata().ok());
            blocks
                .map(|about| std::os::unix::fs::MetadataExt::blocks(&about))
                .sum()
        };
        let begun = taken();
        let mut child = remote.command(&words);
        child.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = child.spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while taken() < begun + (2 << 20) / 512 {
            assert!(Instant::now() < until, "{at}: nothing is sent");
            std::thread::sleep(Duration::from_millis(1));
        }
        away.happens(&mut remote);
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(0), "{at}: {said}");
        assert!(said.contains("connection lost"), "{at}: {said}");
    }
    remote.machine.nothing_is_left();
}

/// The long form (`SPRAT_STRIKES`) combines each with each.
#[test]
fn a_server_that_is_away_for_a_while_is_waited_for_by_each_command() {
    requires!(openssh::missing(), needs::root());
    if std::env::var_os("SPRAT_STRIKES").is_some() {
        for command in COMMANDS {
            for away in AWAY {
                bears(command, away);
            }
        }
        return;
    }
    let mut dice = Dice::new(sprat_testkit::dice::seed());
    let mut one = |of: usize| usize::try_from(dice.below(of as u64)).unwrap();
    let (command, away) = (COMMANDS[one(4)], AWAY[one(3)]);
    println!("{command}, {away:?}");
    bears(command, away);
}
