//! Kill -9 of any of the processes, alone and together, at any moment, leaves nothing behind.
//!
//! `SPRAT_KILL_ROUNDS` sets the number of rounds, `SPRAT_SEED` the seed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::chain::{Chain, ChainOptions, wait};
use crate::support::{Place, can_attach};
use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::requires;

const NAMES: [&str; 4] = ["session", "volume", "outer worker", "inner worker"];

/// A small generator (splitmix64) for repeatable random moments.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % limit
    }
}

fn number_from(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A place whose image has a file system.
fn place_with_file_system() -> Place {
    let place = Place::new(256);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain.ask_worker("mkfs test").unwrap();
    assert!(chain.end().success());
    place
}

/// Writes, syncs, renames, links and deletes without end, in several processes.
fn load(place: &Place) -> String {
    let dir = place.dir.display();
    format!(
        "cd {dir}; (while :; do rsync -a /etc/ {dir}/copy/; mv {dir}/copy {dir}/copy2; rm -rf \
         {dir}/copy2; done) & i=0; while :; do i=$((i+1)); head -c 3000000 /dev/urandom > \
         {dir}/f$((i % 20)); ln -f {dir}/f$((i % 20)) {dir}/g$((i % 7)); \
         [ $((i % 5)) = 0 ] && sync {dir}/f$((i % 20)); done"
    )
}

struct TestSession {
    process: Child,
    pids: [u32; 4],
    lines: BufReader<std::process::ChildStdout>,
}

impl TestSession {
    fn start(place: &Place, slow_writes_ms: u64) -> Self {
        let mut process = Command::new(crate::chain::roles())
            .args(["session", place.image.to_str().unwrap()])
            .args([place.dir.to_str().unwrap(), &slow_writes_ms.to_string()])
            .arg(load(place))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let mut pids = [process.id(), 0, 0, 0];
        for (slot, word) in pids[1..].iter_mut().zip(line.split_whitespace()) {
            *slot = word.parse().unwrap();
        }
        assert!(pids.iter().all(|&pid| pid > 1), "{line:?}");
        Self {
            process,
            pids,
            lines,
        }
    }

    fn wait_until_mounted(&mut self) {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert_eq!(line, "mounted\n");
    }
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // It may have died with another one.
    let _ = kill_process(pid, Signal::KILL);
}

#[test]
fn after_kill_9_of_any_of_the_processes_nothing_stays_behind() {
    if !can_attach() {
        return;
    }
    let seed = number_from("SPRAT_SEED", 2026);
    let rounds = number_from("SPRAT_KILL_ROUNDS", 30);
    println!("SPRAT_SEED={seed} SPRAT_KILL_ROUNDS={rounds}");
    let mut dice = Dice(seed);
    let place = place_with_file_system();
    for round in 0..rounds {
        // Every set of victims in turn.
        let set = 1 + round % 15;
        let mut victims: Vec<usize> = (0..4).filter(|i| set & (1 << i) != 0).collect();
        let turn = usize::try_from(dice.below(4)).unwrap() % victims.len();
        victims.rotate_left(turn);
        // In the last round the connection is down for longer than anything waits.
        let slow_writes_ms = [0, 0, 3, 30, 100_000][usize::try_from(dice.below(5)).unwrap()];
        let mut session = TestSession::start(&place, slow_writes_ms);
        // One round in five while it is still attaching and mounting.
        let early = dice.below(5) == 0;
        let delay_ms = if early {
            dice.below(40)
        } else {
            dice.below(400)
        };
        if !early {
            session.wait_until_mounted();
        }
        sleep(Duration::from_millis(delay_ms));
        let names: Vec<&str> = victims.iter().map(|&i| NAMES[i]).collect();
        let what = format!(
            "round {round}, seed {seed}: {names:?} killed {delay_ms} ms after {}, writes of \
             {slow_writes_ms} ms",
            if early { "the start" } else { "the mount" }
        );
        for &victim in &victims {
            kill(session.pids[victim]);
        }
        wait(&mut session.process);
        place.assert_nothing_remains(&what);
        println!("{what}: clean");
    }
    // On a busy machine the load may have done nothing yet. It has, if the file exists that it creates
    // after its first sync.
    let mut session = TestSession::start(&place, 0);
    session.wait_until_mounted();
    let inside = format!("/proc/{}/root{}", session.pids[3], place.dir.display());
    let until = Instant::now() + Duration::from_secs(100);
    while !std::fs::exists(format!("{inside}/f6")).unwrap() {
        assert!(Instant::now() < until, "the load writes nothing");
        sleep(Duration::from_millis(20));
    }
    session.pids.into_iter().for_each(kill);
    wait(&mut session.process);
    place.assert_nothing_remains("after the last round");
    // The journal must repair whatever was left.
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain
        .ask_worker(&format!("mount {}", place.dir.display()))
        .unwrap();
    let files = chain.sh(&format!("ls {} | wc -l", place.dir.display()));
    assert!(
        files.unwrap().parse::<u32>().unwrap() > 5,
        "the load wrote nothing"
    );
    assert!(chain.end().success());
    place.fsck();
}

#[test]
fn the_terminals_ctrl_c_reaches_no_process_of_a_session() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let chain = Chain::start(&place.image, &ChainOptions::default());
    // Field 6 of proc_pid_stat(5), not getsid(2): for a leader outside this pid namespace (usual for a
    // test that is a container's first process) getsid returns 0, which rustix does not accept as a Pid.
    let session_of = |pid: u32| -> u32 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, after_name) = stat.rsplit_once(") ").unwrap();
        after_name.split(' ').nth(3).unwrap().parse().unwrap()
    };
    let ours = session_of(std::process::id());
    let pids = chain.pids();
    for pid in [pids.volume, pids.outer, pids.inner] {
        assert_ne!(session_of(pid), ours);
    }
    assert_ne!(session_of(pids.volume), session_of(pids.outer));
    drop(chain);
    place.assert_nothing_remains("after the control sockets closed");
}

#[test]
fn limits_left_on_a_loop_device_are_reset_by_the_next_session() {
    if !can_attach() {
        return;
    }
    let free_devices = || {
        let mut free: Vec<_> = std::fs::read_dir("/sys/block")
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|device| is_loop(device))
            .filter(|device| !device.join("loop/backing_file").exists())
            .collect();
        free.sort();
        free
    };
    fn is_loop(device: &std::path::Path) -> bool {
        let name = device.file_name().unwrap().as_encoded_bytes();
        name.starts_with(b"loop")
    }
    // The session uses the first of them, so the limit of the last one belongs to no session.
    let free = free_devices();
    requires!(
        free.is_empty()
            .then(|| "there is no unused loop device".to_owned())
    );
    let last = &free[free.len() - 1];
    let strict_limit = last.join("bdi/strict_limit");
    let written = std::fs::write(&strict_limit, "1");
    requires!(
        written
            .err()
            .map(|error| format!("{}: {error}", strict_limit.display()))
    );
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    let device_is_ours = last.join("loop/backing_file").exists();
    let after = std::fs::read_to_string(&strict_limit).unwrap();
    assert!(device_is_ours || after.trim() == "0", "{after}");
}

#[test]
fn the_worker_has_its_own_namespaces_and_its_status_is_passed_on() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain.ask_worker("mkfs test").unwrap();
    let dir = place.dir.display();
    chain.ask_worker(&format!("mount {dir}")).unwrap();
    assert!(
        chain
            .sh(&format!("grep -q {dir} /proc/self/mountinfo"))
            .is_ok()
    );
    let here = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!here.contains(&dir.to_string()));
    // $PPID of a shell started by pid 1 of the namespace.
    assert_eq!(chain.sh("echo $PPID").unwrap(), "1");
    let inner = chain.pids().inner;
    kill(inner);
    assert_eq!(wait(&mut chain.worker).code(), Some(128 + 9));
    assert!(
        wait(&mut chain.volume).success(),
        "the end of FUSE is a clean end"
    );
    place.assert_nothing_remains("after the inner worker was killed");
}

/// A mount of the test. It is unmounted however the test ends.
struct SharedMount(std::path::PathBuf);

impl SharedMount {
    fn new(dir: std::path::PathBuf) -> Self {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        std::fs::create_dir_all(&dir).unwrap();
        mount("test", &dir, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(&dir, MountPropagationFlags::SHARED).unwrap();
        Self(dir)
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn mounts_of_the_worker_stay_inside_and_later_ones_outside_appear() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let shared = SharedMount::new(place.folder.path().join("shared"));
    let inside = shared.0.join("inside");
    std::fs::create_dir(&inside).unwrap();
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain.ask_worker("mkfs test").unwrap();
    chain
        .ask_worker(&format!("mount {}", inside.display()))
        .unwrap();
    let here = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!here.contains(inside.to_str().unwrap()), "the mount leaked");
    let later = SharedMount::new(shared.0.join("later"));
    let look = format!("grep -c {} /proc/self/mountinfo", later.0.display());
    assert_eq!(chain.sh(&look).unwrap(), "1");
    drop(later);
    assert!(
        chain.sh(&look).is_err(),
        "a disk unmounted outside is kept inside"
    );
    assert!(chain.end().success());
    drop(shared);
    place.assert_nothing_remains("after shared mounts");
}

#[test]
fn a_worker_without_volume_process_gets_an_error_and_does_not_hang() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.begin().unwrap();
    chain.volume.kill().unwrap();
    chain.volume.wait().unwrap();
    let refused = chain.ask_worker("loop").unwrap_err();
    assert!(
        refused.contains("the volume process no longer serves"),
        "{refused}"
    );
    drop(chain);
    place.assert_nothing_remains("after the volume process died early");
}
