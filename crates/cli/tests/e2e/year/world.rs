//! The laptop of the year: its clock, its files, a container on a server and one on a disk, and what the
//! timers do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use jiff::tz::TimeZone;
use jiff::{Timestamp, civil};
use serde_json::Value;
use sprat_testkit::agent_server;
use sprat_testkit::client_and_server::FileSystem;
use sprat_testkit::dice::Dice;
use sprat_testkit::fake_clock::FakeClock;
use sprat_testkit::machine::{CHEAP, Ran, TestMachine};
use sprat_testkit::manifest::Manifest;
use sprat_testkit::notice_servers::{NoticeServer, Wire};
use sprat_testkit::program::{children_cpu, system};

use super::model::{Content, Copy, DAY, HOUR, Lost, MINUTE, Rules, Snap, When, local};

pub const ZONE: &str = "Europe/Berlin";

const HOME_RULES: &str = "keep_daily = 7\nkeep_weekly = 4\nkeep_monthly = 12\n";
const TYPO_RULES: &str = "keep_daily = 1\n";

/// The file systems in the two containers.
#[derive(Debug, Clone, Copy)]
pub struct Containers {
    pub server: FileSystem,
    pub disk: FileSystem,
}

impl Containers {
    pub fn each(self) -> [(&'static str, FileSystem); 2] {
        [("nas", self.server), ("usb", self.disk)]
    }
}

/// The size of a container, in MiB.
pub fn size_mib(file_system: FileSystem) -> u64 {
    match file_system {
        FileSystem::Ext4 => 96,
        FileSystem::Btrfs => 256,
    }
}

pub struct World {
    pub machine: TestMachine,
    pub containers: Containers,
    pub clock: FakeClock,
    pub zone: TimeZone,
    pub copies: Vec<Copy>,
    notices: NoticeServer,
    noticed: usize,
    /// When each notice came, and what it says.
    pub alarms: Vec<(i64, String)>,
    pub disk: Option<Disk>,
    /// The next run is killed while a hook runs.
    pub kill_next: bool,
    /// The container on the server is full.
    pub is_full: bool,
    /// Until a time service or the server confirms the clock.
    pub clock_in_doubt: bool,
    dice: Dice,
    changed_on: i64,
    home_rules: &'static str,
    web_is_there: bool,
    pub runs: u32,
    pub sessions: u32,
    /// Processor time of each run that made the copy `home@nas`.
    pub cost: Vec<Duration>,
}

/// A disk that is plugged in; unplugged on drop.
pub struct Disk(PathBuf);

impl Disk {
    fn plug_in(image: &Path, folder: &Path) -> Self {
        let words = [
            "-o".as_ref(),
            "loop".as_ref(),
            image.as_os_str(),
            folder.as_os_str(),
        ];
        system("mount", &words);
        Self(folder.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mut umount = std::process::Command::new("umount");
        let _ = umount.arg(&self.0).status();
    }
}

impl World {
    /// Everything is there, and nothing is backed up.
    pub fn new(begin: civil::DateTime, containers: Containers, dice: Dice) -> Self {
        let zone = TimeZone::get(ZONE).unwrap();
        let machine = TestMachine::new();
        let clock = FakeClock::new(machine.folder(), moment(begin, &zone));
        let home = Rules {
            daily: 7,
            weekly: 4,
            monthly: 12,
            ..Rules::default()
        };
        let mail = Rules {
            hourly: 12,
            daily: 5,
            weekly: 3,
            ..Rules::default()
        };
        let mut copies = vec![
            Copy::new("mail", "nas", When::Every(HOUR), mail),
            Copy::new("home", "nas", When::At(20, 30), home),
            Copy::new("home", "usb", When::At(20, 30), home),
        ];
        copies[0].prune_every = 0;
        let mut world = Self {
            machine,
            containers,
            clock,
            zone,
            copies,
            notices: NoticeServer::http(Wire::Plain),
            noticed: 0,
            alarms: Vec::new(),
            disk: None,
            kill_next: false,
            is_full: false,
            clock_in_doubt: false,
            dice,
            changed_on: 0,
            home_rules: HOME_RULES,
            web_is_there: true,
            runs: 0,
            sessions: 0,
            cost: Vec::new(),
        };
        world.set_up();
        world
    }

    fn set_up(&mut self) {
        let folder = self.machine.folder().display().to_string();
        // Files only: a request for a shell would wait for an answer that never comes. `trim` gets one.
        let script = format!(
            "#!/bin/sh\nfor last; do :; done\n[ ! -e {folder}/shell ] || [ \"$last\" = sftp ] || exec sh\n\
             [ \"$last\" = sftp ] || exit 1\n\
             if [ -e {folder}/no-server ]; then echo 'No route to host' >&2; exit 255; fi\n\
             exec {}\n",
            agent_server::sftp_server(&self.machine.path("store"))
                .unwrap()
                .display()
        );
        let hook = format!(
            "#!/bin/sh\necho \"$SPRAT_HOOK $SPRAT_JOB@$SPRAT_CONTAINER $SPRAT_EXIT\" >> {folder}/hooks\n\
             [ \"$SPRAT_HOOK\" = after ] || exit 0\n\
             while [ -e {folder}/block ]; do touch {folder}/blocked; sleep 0.05; done\n"
        );
        for (name, text) in [("ssh", script), ("hook", hook)] {
            let path = self.machine.write(name, text);
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let image = self.machine.path("disk.img");
        fs::File::create(&image)
            .unwrap()
            .set_len((size_mib(self.containers.disk) + 64) << 20)
            .unwrap();
        system(
            "mkfs.ext4",
            &["-q".as_ref(), "-F".as_ref(), image.as_os_str()],
        );
        fs::create_dir(self.machine.path("usb")).unwrap();
        for number in 0..24 {
            self.write_source(&format!("home/folder{}/file{number}", number % 6), 4000);
        }
        self.write_source("photos/one", 50_000);
        self.write_source("mail/inbox", 20_000);
        self.configure();
        self.plug_in();
        for (container, file_system) in self.containers.each() {
            let size = format!("{}M", size_mib(file_system));
            let kind = ["--file-system", file_system.name(), CHEAP];
            self.ok(&[&["init", container, "--size", &size][..], &kind].concat());
        }
        self.unplug();
    }

    fn configure(&self) {
        let folder = self.machine.folder().display();
        let home_rules = self.home_rules;
        // Nothing listens at port 1.
        let port = if self.web_is_there {
            self.notices.port
        } else {
            1
        };
        let text = format!(
            "time_zone = \"{ZONE}\"\n\
             [container.nas]\ntarget = \"nas:{folder}/store/nas.luks\"\nssh_command = \"{folder}/ssh\"\n\
             min_free = \"1 MiB\"\ncheck_every = \"never\"\ndrill_every = \"never\"\n\
             [container.usb]\ntarget = \"{folder}/usb/usb.luks\"\nmin_free = \"1 MiB\"\ncheck_every = \"never\"\ndrill_every = \"never\"\n\
             [job.mail]\ncontainer = \"nas\"\nsources = \"{folder}/mail\"\nevery = \"1 h\"\n\
             keep_hourly = 12\nkeep_daily = 5\nkeep_weekly = 3\nprune_every = \"0 s\"\nalert_after = \"3 days\"\n\
             [job.home]\ncontainer = [\"nas\", \"usb\"]\nsources = [\"{folder}/home\", \"{folder}/photos\"]\n\
             at = \"20:30\"\n{home_rules}alert_after = \"10 days\"\n\
             before = \"{folder}/hook\"\nafter = \"{folder}/hook\"\nfinally = \"{folder}/hook\"\n\
             [notify]\nwebhook = \"http://127.0.0.1:{port}/hook\"\nremind_after = \"7 days\"\ndigest = \"weekly\"\n"
        );
        self.machine.write("config/sprat.toml", text);
    }

    /// A typing error in the rules of the job `home`, or none.
    pub fn mistype(&mut self, mistyped: bool) {
        self.home_rules = if mistyped { TYPO_RULES } else { HOME_RULES };
        self.configure();
        let right = Rules {
            daily: 7,
            weekly: 4,
            monthly: 12,
            ..Rules::default()
        };
        let typo = Rules {
            daily: 1,
            ..Rules::default()
        };
        for copy in self.copies.iter_mut().filter(|copy| copy.job == "home") {
            copy.rules = if mistyped { typo } else { right };
        }
    }

    /// The web server that takes the notices.
    pub fn set_web(&mut self, is_there: bool) {
        self.web_is_there = is_there;
        self.configure();
    }

    pub fn copy(&mut self, name: &str) -> &mut Copy {
        let mut copies = self.copies.iter_mut();
        copies.find(|copy| copy.name() == name).unwrap()
    }

    pub fn set_server(&self, is_there: bool) {
        let sign = self.machine.path("no-server");
        match is_there {
            true => fs::remove_file(sign).unwrap(),
            false => fs::write(sign, "").unwrap(),
        }
    }

    pub fn plug_in(&mut self) {
        self.disk.get_or_insert_with(|| {
            Disk::plug_in(&self.machine.path("disk.img"), &self.machine.path("usb"))
        });
    }

    pub fn unplug(&mut self) {
        self.disk = None;
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        // After a kill the next session waits until nothing of the killed one can arrive any more.
        let all = [&["--quiet-time", "1"], arguments].concat();
        self.clock.command(&self.machine, &all)
    }

    pub fn sprat(&self, arguments: &[&str]) -> Ran {
        self.machine.run(&mut self.command(arguments))
    }

    /// Runs a command by hand.
    pub fn ok(&mut self, arguments: &[&str]) -> Ran {
        let ran = self.sprat(arguments).succeeded();
        self.listen();
        ran
    }
}

/// The files.
impl World {
    fn write_source(&mut self, name: &str, bytes: u64) {
        let len = usize::try_from(1 + self.dice.below(bytes)).unwrap();
        let content = sprat_testkit::tree::bytes(&mut self.dice, len);
        let path = self.machine.write(name, content);
        self.date(&path);
    }

    /// Gives a file the time of the year, which the kernel does not know.
    fn date(&self, path: &Path) {
        let now = Duration::from_secs(u64::try_from(self.clock.now_s()).unwrap());
        let file = fs::File::open(path).unwrap();
        file.set_modified(UNIX_EPOCH + now).unwrap();
    }

    /// What people do with their files: new mail all day, and other changes each day.
    pub fn change_files(&mut self) {
        let number = self.clock.now_s() / MINUTE % 40;
        self.write_source("mail/inbox", 20_000);
        self.write_source(&format!("mail/letter{number}"), 2000);
        if self.clock.now_s() - self.changed_on < 12 * HOUR {
            return;
        }
        self.changed_on = self.clock.now_s();
        let home = self.machine.path("home");
        let day = self.clock.now_s() / DAY;
        let folder = format!("home/folder{}", self.dice.below(6));
        self.write_source(&format!("{folder}/new{day}"), 8000);
        let number = self.dice.below(24);
        self.write_source(&format!("home/folder{}/file{number}", number % 6), 4000);
        let old = home.join(format!("folder{}/new{}", self.dice.below(6), day - 30));
        let _ = fs::remove_file(old);
        let number = self.dice.below(24);
        let file = home.join(format!("folder{}/file{number}", number % 6));
        let mode = u32::try_from(0o600 + self.dice.below(0o200)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        // The same file at another place.
        let place = |number: i64| home.join(format!("folder{}/wanderer", number % 6));
        match (0..6).find(|number| place(*number).exists()) {
            Some(was) => fs::rename(place(was), place(day)).unwrap(),
            None => self.write_source("home/folder0/wanderer", 9000),
        }
    }

    /// A file that is larger than the container, or none.
    pub fn fill(&mut self, fill: bool) {
        self.is_full = fill;
        let path = self.machine.path("home/huge");
        match fill {
            true => {
                let size = usize::try_from(size_mib(self.containers.server)).unwrap() + 14;
                let content = sprat_testkit::tree::bytes(&mut self.dice, size << 20);
                fs::write(&path, content).unwrap();
                self.date(&path);
            }
            false => fs::remove_file(path).unwrap(),
        }
    }

    pub fn photos_are_there(&self, there: bool) {
        let (here, away) = (
            self.machine.path("photos"),
            self.machine.path("photos-away"),
        );
        match there {
            true => fs::rename(away, here).unwrap(),
            false => fs::rename(here, away).unwrap(),
        }
    }

    fn content(&self, job: &str) -> Content {
        let folders: &[&'static str] = match job {
            "mail" => &["mail"],
            _ => &["home", "photos"],
        };
        let there = folders
            .iter()
            .filter(|name| self.machine.path(name).exists());
        Rc::new(
            there
                .map(|name| (*name, Manifest::of(&self.machine.path(name))))
                .collect(),
        )
    }
}

/// What the timers start.
impl World {
    /// `sprat run --scheduled`: exactly the copies that are due are made.
    pub fn run(&mut self) {
        self.runs += 1;
        let now = self.clock.shown_s();
        let due: Vec<usize> = (0..self.copies.len())
            .filter(|one| self.copies[*one].is_due(now, &self.zone))
            .collect();
        if self.kill_next && due.iter().any(|one| self.copies[*one].job == "home") {
            self.kill_a_run(&due);
            return;
        }
        let may_wait: Vec<bool> = self.copies.iter().map(|copy| copy.may_wait(now)).collect();
        let contents: BTreeMap<&str, Content> = (0..self.copies.len())
            .filter(|one| due.contains(one) || may_wait[*one])
            .map(|one| self.copies[one].job)
            .map(|job| (job, self.content(job)))
            .collect();
        let before = children_cpu();
        let ran = self.sprat(&["run", "--scheduled", "--json"]);
        let cost = children_cpu().saturating_sub(before);
        let said = ran.json();
        let is_away = self.machine.path("no-server").exists();
        let mut expected_code = 0;
        for one in 0..self.copies.len() {
            let name = self.copies[one].name();
            let found = copy_of(&said, &name);
            let at = format!("{} {name}: {}", self.shown_now(), ran.whole());
            let code = found["result"]["code"].as_i64();
            let is_usb = self.copies[one].container == "usb";
            let attempted = found["attempted"] == true;
            let is_due = due.contains(&one) && !(is_usb && self.disk.is_none());
            assert!(may_wait[one] || attempted == is_due, "{at}");
            if !attempted {
                continue;
            }
            if !is_usb && is_away {
                assert_eq!(code, Some(14), "{at}");
                self.copies[one].lost(now, Lost::NotReached);
                expected_code = 14;
            } else if self.is_full && name == "home@nas" {
                assert_eq!(code, Some(1), "{at}");
                self.copies[one].lost(now, Lost::Failed);
                let zone = self.zone.clone();
                self.copies[one].prune_for_room(now, &zone);
                expected_code = 1;
            } else {
                let content = &contents[self.copies[one].job];
                let complete = self.copies[one].job == "mail" || content.contains_key("photos");
                assert_eq!(code, Some(if complete { 0 } else { 3 }), "{at}");
                if !complete {
                    expected_code = 3;
                }
                let snapshot = parse(found["snapshot"].as_str().unwrap());
                self.made(one, snapshot, complete, content.clone(), &at);
                self.sessions += 1;
                if name == "home@nas" {
                    self.cost.push(cost);
                }
            }
        }
        if expected_code == 0 {
            assert!(
                matches!(ran.code, 0 | 4),
                "{} {}",
                self.shown_now(),
                ran.whole()
            );
        }
        self.listen();
    }

    fn made(&mut self, one: usize, snapshot: i64, complete: bool, content: Content, at: &str) {
        let now = self.clock.shown_s();
        let (doubt, zone) = (self.clock_in_doubt, self.zone.clone());
        let wanted = self.copies[one].next_name(now);
        assert!((wanted..wanted + 10 * MINUTE).contains(&snapshot), "{at}");
        let snap = Snap {
            name: snapshot,
            complete,
            pinned: false,
            content,
        };
        let after = |mut copy: Copy, killed: Option<Snap>| {
            copy.snaps.extend(killed);
            copy.made(now, snap.clone());
            if !doubt {
                copy.prune(now, &zone);
            }
            copy
        };
        let mut copy = self.copies[one].clone();
        let Some(mut killed) = copy.killed.take() else {
            self.copies[one] = after(copy, None);
            return;
        };
        let listed = self.list(copy.container, copy.job);
        let mut close = listed
            .iter()
            .filter(|name| (killed.name..killed.name + 10 * MINUTE).contains(*name));
        killed.name = close.next().copied().unwrap_or(killed.name);
        let (with, without) = (after(copy.clone(), Some(killed)), after(copy, None));
        self.copies[one] = if with.names() == listed {
            with
        } else {
            without
        };
    }

    /// Ends a run with `kill -9` after it read the sources.
    fn kill_a_run(&mut self, due: &[usize]) {
        self.kill_next = false;
        let (home, mail) = (self.content("home"), self.content("mail"));
        fs::write(self.machine.path("block"), "").unwrap();
        let mut command = self.command(&["run", "--scheduled"]);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !self.machine.path("blocked").exists() {
            assert!(Instant::now() < until, "the hook did not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.machine.kill_all();
        child.wait().unwrap();
        for sign in ["block", "blocked"] {
            fs::remove_file(self.machine.path(sign)).unwrap();
        }
        let now = self.clock.shown_s();
        for one in due.iter().copied() {
            if self.copies[one].container != "nas" {
                continue;
            }
            let content = if self.copies[one].job == "home" {
                home.clone()
            } else {
                mail.clone()
            };
            self.copies[one].killed = Some(Snap {
                name: now,
                complete: true,
                pinned: false,
                content,
            });
        }
    }

    /// `sprat status --alert`.
    pub fn alert(&mut self) {
        let ran = self.sprat(&["status", "--alert", "--offline"]);
        assert!(
            matches!(ran.code, 0 | 1 | 3 | 4 | 14),
            "{} {}",
            self.shown_now(),
            ran.whole()
        );
        self.listen();
    }

    /// Reads what the web server received.
    fn listen(&mut self) {
        let received = self.notices.received();
        for request in &received[self.noticed..] {
            let body = request["body"].as_str().unwrap();
            let notice: Value = serde_json::from_str(body).unwrap();
            let field = |name: &str| notice[name].as_str().map(str::to_owned);
            let about = field("copy")
                .or(field("container"))
                .unwrap_or_else(|| "-".to_owned());
            let (kind, state) = (field("kind").unwrap(), field("state").unwrap());
            self.alarms
                .push((self.clock.now_s(), format!("{kind} {state} {about}")));
        }
        self.noticed = received.len();
    }
}

/// What a person does.
impl World {
    /// Both containers release what is free.
    pub fn trim(&mut self) {
        self.plug_in();
        fs::write(self.machine.path("shell"), "").unwrap();
        for (container, _) in self.containers.each() {
            self.ok(&["trim", container]);
        }
        fs::remove_file(self.machine.path("shell")).unwrap();
    }

    /// Pins the newest snapshot of a copy.
    pub fn pin(&mut self, copy: &str) -> i64 {
        let snap = self.copy(copy).snaps.last_mut().unwrap();
        snap.pinned = true;
        let name = snap.name;
        let (what, container) = path_of(copy, name);
        self.ok(&["pin", &container, &what, "--reason", "before the move"]);
        name
    }

    pub fn unpin(&mut self, copy: &str, name: i64) {
        let mut snaps = self.copy(copy).snaps.iter_mut();
        snaps.find(|snap| snap.name == name).unwrap().pinned = false;
        let (what, container) = path_of(copy, name);
        self.ok(&["unpin", &container, &what]);
    }

    /// The ISO week of a time.
    pub fn week(&self, at: i64) -> String {
        local(at, &self.zone).strftime("%G-%V").to_string()
    }

    pub fn hooks(&self) -> Vec<String> {
        let text = fs::read_to_string(self.machine.path("hooks")).unwrap();
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    pub fn shown_now(&self) -> String {
        let now = local(self.clock.now_s(), &self.zone);
        now.strftime("%Y-%m-%d %H:%M").to_string()
    }
}

fn copy_of<'v>(said: &'v Value, name: &str) -> &'v Value {
    let is_it = |copy: &&Value| {
        let part = |key: &str| copy[key].as_str().unwrap().to_owned();
        format!("{}@{}", part("job"), part("container")) == name
    };
    said["copies"]
        .as_array()
        .unwrap()
        .iter()
        .find(is_it)
        .unwrap()
}

/// A snapshot and its container, as arguments.
fn path_of(copy: &str, name: i64) -> (String, String) {
    let (job, container) = copy.split_once('@').unwrap();
    (format!("{job}/{}", stamp(name)), container.to_owned())
}

/// A local time as seconds since 1970.
pub fn moment(at: civil::DateTime, zone: &TimeZone) -> i64 {
    let moment = zone.to_ambiguous_timestamp(at);
    moment.compatible().unwrap().as_second()
}

/// `2032-01-02T03-04-05Z` as seconds since 1970.
pub fn parse(name: &str) -> i64 {
    let (date, time) = name.split_once('T').unwrap();
    let at: Timestamp = format!("{date}T{}", time.replace('-', ":"))
        .parse()
        .unwrap();
    at.as_second()
}

pub fn stamp(at: i64) -> String {
    Timestamp::from_second(at)
        .unwrap()
        .to_string()
        .replace(':', "-")
}
