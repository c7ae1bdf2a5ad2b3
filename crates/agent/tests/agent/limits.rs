//! Memory, space, system calls, and the same answers as OpenSSH's server.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use sprat_testkit::dice::Dice;
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::{LoopDisk, fill};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, CREATE_NEW, Client, EAGER, READ, READ_WRITE, Served, agent, blocks};
use crate::days::cost_of_reading;
use crate::drops::other_boot;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

/// The most memory that a process ever had, in KiB.
pub fn peak_kib(client: &Client) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", client.child.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn memory_is_bounded_whatever_a_client_sends_and_reads() {
    const BLOCKS: u64 = 9_000;
    let served = Served::with_container(EAGER, &blocks(usize::try_from(BLOCKS).unwrap(), 1));
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    // All of it, in the worst order.
    let mut dice = Dice::new(1);
    let mut order: Vec<u64> = (0..BLOCKS).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, usize::try_from(dice.below(at as u64 + 1)).unwrap());
    }
    for group in order.chunks(40) {
        let writes: Vec<_> = group
            .iter()
            .map(|number| (block(*number), vec![3; BLOCK]))
            .collect();
        assert_eq!(client.write_all(&handle, &writes), writes.len());
    }
    // Many answers that nobody reads for a while.
    let past = client.open(&served.past_path(1), READ).unwrap();
    for number in 0..200 {
        client.read(&past, block(number * 40), 255 * 1024).unwrap();
    }
    let peak = peak_kib(&client);
    assert!(peak <= 32 * 1024, "{peak} KiB");
    client.end();
    assert!(served.past(1) == blocks(usize::try_from(BLOCKS).unwrap(), 1));
}

/// As many past states as may be open. First with a quarter of the longest log, then with the longest map.
#[test]
fn memory_is_bounded_with_many_past_states_that_are_open() {
    const ENTRIES: usize = 1 << 16;
    let state = blocks(60, 1);
    let served = Served::with_container(EAGER, &state);
    let file = fs::File::options().write(true).open(served.path("x.luks"));
    file.unwrap().set_len(block(1 << 20)).unwrap();
    served.overwrite(&[(0, vec![9; 40 * BLOCK])]);
    // Behind that, blocks of zeros. In the place of some of what was saved: the first entry of a block counts.
    let (log, secret) = (served.own_file("logs/1"), served.head(1, "secret"));
    let secret = u64::from_str_radix(&secret, 16).unwrap();
    let all: Vec<u64> = (20..).step_by(2).take(ENTRIES).collect();
    for numbers in all.chunks(200) {
        let at = log.metadata().unwrap().len();
        let mut header = [&b"sprlog1\n"[..], &secret.to_le_bytes(), &at.to_le_bytes()].concat();
        header.extend(u32::try_from(numbers.len()).unwrap().to_le_bytes());
        header.resize(32, 0);
        for number in numbers {
            header.extend(number.to_le_bytes());
            header.extend(crc32fast::hash(&[0; BLOCK]).to_le_bytes());
            header.extend([0; 4]);
        }
        header.resize(BLOCK - 4, 0);
        header.extend(crc32fast::hash(&header).to_le_bytes());
        log.write_all_at(&[&header[..], &header].concat(), at)
            .unwrap();
    }
    let mut expected = state;
    expected.truncate(50 * BLOCK);
    for number in (40..50).step_by(2) {
        expected[number * BLOCK..][..BLOCK].fill(0);
    }
    let path = served.past_path(1);
    let open_all = || {
        let mut client = served.connect();
        let mut open = 0;
        while let Ok(handle) = client.open(&path, READ) {
            assert!(client.read(&handle, 0, 50 * 4096).unwrap() == expected);
            open += 1;
        }
        let peak = peak_kib(&client);
        assert!(peak <= 32 * 1024, "{open} open, {peak} KiB");
        client.end();
        open
    };
    assert_eq!(open_all(), 8);
    let mut map = [0_u64, 60].map(u64::to_le_bytes).concat();
    for number in 100..100 + (1 << 18) - 1 {
        map.extend([number * 2, number * 2 + 1].map(u64::to_le_bytes).concat());
    }
    map.extend(crc32fast::hash(&map).to_le_bytes());
    fs::write(served.path(".sprat-agent/x.luks/g.1/map"), map).unwrap();
    assert!(open_all() >= 3);
}

/// The container is read in large pieces, and a log in one for each piece that was saved. What is the same in all
/// generations is checked as seldom.
#[test]
fn a_past_state_is_read_with_few_calls() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(2048, 1));
    let state = served.live();
    for generation in 0..10 {
        let pieces = (0..3).map(|n| (block(generation * 100 + n * 20), vec![7; 8 * BLOCK]));
        served.overwrite(&pieces.collect::<Vec<_>>());
    }
    assert!(served.past(1) == state);
    let live = cost_of_reading(&served, "x.luks");
    let past = cost_of_reading(&served, &served.past_path(1));
    println!("calls and bytes: {live:?} live, {past:?} of the oldest state");
    assert!(
        past.0 <= 2 * live.0 && past.1 <= 2 * live.1,
        "{past:?} for {live:?}"
    );
}

/// A block of zeros takes no space in a log, but memory in who reads it.
#[test]
fn a_log_with_many_entries_ends_however_short_it_is() {
    let state = vec![0; 64 * BLOCK];
    let served = Served::with_container(EAGER, &state);
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[1; 3 * BLOCK]), 0);
    let tail = served.own_file("g.1/tail");
    let mut entries = [0; 8];
    tail.read_exact_at(&mut entries, 32).unwrap();
    assert_eq!(u64::from_le_bytes(entries), 3);
    tail.write_all_at(&(1_u64 << 18).to_le_bytes(), 32).unwrap();
    let before = served.live();
    assert_eq!(client.write(&handle, block(9), &[1; BLOCK]), 0);
    assert_eq!(served.numbers(), [1, 2]);
    assert_eq!(served.head(2, "reason"), "size");
    assert!(served.past(2) == before && served.past(1) == state);
    client.end();
}

#[test]
fn a_serving_process_gains_no_privileges_and_has_limits() {
    let served = Served::with_container(EAGER, &blocks(2, 1));
    let mut client = served.connect();
    // After an answer it is past its start.
    client.path_request(17, "x.luks");
    let of =
        |file: &str| fs::read_to_string(format!("/proc/{}/{file}", client.child.id())).unwrap();
    let status = of("status");
    for line in ["NoNewPrivs:\t1\n", "Umask:\t0077\n"] {
        assert!(status.contains(line), "{status}");
    }
    let limits = of("limits");
    for (name, limit) in [
        ("Max open files", "512"),
        ("Max core file size", "0"),
        ("Max address space", "1073741824"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let words: Vec<&str> = line[name.len()..].split_whitespace().collect();
        assert_eq!(words[..2], [limit, limit], "{line}");
    }
    client.end();
}

/// The intruder filled the disk. What gets out of that needs no space.
#[test]
fn on_a_full_disk_the_past_is_read_and_written_back_and_a_lock_released() {
    requires!(needs::root(), needs::devices(), needs::program("mkfs.ext4"));
    let folder = TestFolder::new("sprat-ext4-");
    let at = folder.path().join("disk");
    fs::create_dir(&at).unwrap();
    let _disk = LoopDisk::mount(&folder.path().join("image"), &at, 64);
    let served = Served::in_folder(&at, EAGER);
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(block(4000)).unwrap();
    file.write_all_at(&blocks(3000, 1), 0).unwrap();
    let first = served.live();
    served.overwrite(&[(block(5), blocks(3, 2))]);
    let second = served.live();
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    for at in (0..4000).step_by(40) {
        assert_eq!(client.write(&handle, block(at), &blocks(40, 99)), 0);
    }
    let lease = "x.luks.lock.1000001";
    fs::write(served.path(lease), vec![b'x'; BLOCK]).unwrap();
    served.run(&["tidy"]);
    fill(&at);

    let names = [1, 2].map(|number| served.head(number, "name"));
    let refused = served
        .command(&["revert", "x.luks", &names[1], "--yes"])
        .output();
    let refused = String::from_utf8(refused.unwrap().stderr).unwrap();
    assert!(refused.contains("--discard-present"), "{refused}");
    assert!(served.past(1) == first && served.past(2) == second);
    let back = [(&names[1], &second), (&names[0], &first)];
    for (step, (name, state)) in (0..).zip([back, back].concat()) {
        // Since a reboot of the server nobody has written.
        if step >= 2 {
            other_boot(&served);
            let bits = served.own_file("g.2/bits");
            bits.write_all_at(&[0xff; 500], 0).unwrap();
        }
        served.run(&["revert", "x.luks", name, "--yes", "--discard-present"]);
        assert!(served.live() == *state);
        assert!(served.past(1) == first && served.past(2) == second);
        fill(&at);
    }
    assert_eq!(served.numbers(), [1, 2]);
    assert_ne!(client.write(&handle, 0, &[1; 10]), 0);
    client.end_anyhow();

    served.run(&["unlock", "x.luks", "--yes"]);
    let lease = fs::read_to_string(served.path("x.luks.lock.1000002")).unwrap();
    assert!(lease.len() == BLOCK && lease.contains("\"free\":true"));
    served.run(&["check", "--read-data"]);
    served.run(&["expire", "x.luks", &names[0], "--yes"]);
    assert!(served.past(2) == second);
}

/// Every path that is opened, renamed or removed is one name below a folder that is open already.
#[test]
fn no_system_call_of_a_client_leaves_the_folder() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(8, 1));
    served.overwrite(&[(0, vec![1; 10])]);
    let trace = served.path("trace");
    let calls = "trace=open,openat,openat2,unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat,symlink,\
                 symlinkat,link,linkat,chmod,fchmodat,chown,fchownat,truncate,execve,connect,socket";
    let mut command = Command::new("strace");
    command
        .args(["-qq", "-o", trace.to_str().unwrap(), "-e", calls])
        .arg(agent());
    command.arg("serve").arg("--root").arg(served.path(""));
    let mut client = Client::start(command);
    for path in [
        "../a.luks",
        "/etc/passwd",
        "x.luks",
        "a/b.luks",
        ".generations/x.luks/../../a",
        "y.luks.new",
        "/../x.luks",
    ] {
        for flags in [READ, READ_WRITE, CREATE_NEW, 0x1a] {
            let _ = client.open(path, flags);
        }
        for kind in [7, 11, 13, 14, 15, 16, 17] {
            client.path_request(kind, path);
        }
        client.rename("y.luks.new", path);
    }
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, 0, &[5; 5000]), 0);
    let _ = client.content(&served.past_path(1));
    client.end();
    let text = fs::read_to_string(trace).unwrap();
    // What comes before the root is open belongs to the program's start.
    let root = served.path("");
    let start = format!(
        "\"{}\", O_RDONLY",
        root.to_str().unwrap().trim_end_matches('/')
    );
    let start = text.find(&start).unwrap();
    let mut seen = 0;
    for line in text[start..]
        .lines()
        .skip(1)
        .filter(|line| line.contains('"'))
    {
        seen += 1;
        if line.contains("\"/proc/sys/kernel/random/boot_id\"") {
            continue;
        }
        for quoted in line.split('"').skip(1).step_by(2) {
            assert!(!quoted.contains('/') && quoted != "..", "{line}");
        }
        assert!(!line.contains("AT_FDCWD"), "{line}");
    }
    assert!(seen > 30, "{seen}");
}

/// The same requests to OpenSSH's server: the same answers, and the same bytes.
#[test]
fn allowed_requests_are_answered_as_openssh_answers_them() {
    requires!(needs::sftp_server_missing());
    let content = blocks(32, 1);
    let served = Served::with_container(EAGER, &content);
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("x.luks"), &content).unwrap();
    let mut openssh = Command::new(needs::plain_sftp_server().unwrap());
    openssh.arg("-d").arg(other.path());
    let mut clients = [served.connect(), Client::start(openssh)];
    let mut dice = Dice::new(3);
    let names = [
        "x.luks",
        "x.luks.new-0123456789abcdef",
        "x.luks.reserve",
        "x.luks.lock.1000001",
    ];
    let mut handles: Vec<[Vec<u8>; 2]> = Vec::new();
    for step in 0..600 {
        let name = names[usize::try_from(dice.below(4)).unwrap()];
        let (kind, draw) = (dice.below(8), dice.any());
        let flags = [READ, READ_WRITE, CREATE_NEW][usize::try_from(draw % 3).unwrap()];
        let chosen =
            (!handles.is_empty()).then(|| usize::try_from(draw % handles.len() as u64).unwrap());
        let offset = draw / 7 % block(31);
        let mut opened = Vec::new();
        let mut answers = Vec::new();
        for (index, client) in clients.iter_mut().enumerate() {
            let handle = chosen
                .map(|chosen| handles[chosen][index].clone())
                .unwrap_or_default();
            answers.push(match kind {
                0 if handles.len() < 50 => match client.open(name, flags) {
                    Ok(handle) => {
                        opened.push(handle);
                        (0, Vec::new())
                    }
                    Err(status) => (status, Vec::new()),
                },
                1 => client
                    .read(&handle, offset, 9000)
                    .map_or_else(|status| (status, Vec::new()), |data| (0, data)),
                // A lease is at most 4,096 bytes here.
                2 if !name.contains("lock") => {
                    let status = client.write(&handle, offset % 1000, &draw.to_le_bytes());
                    (u32::from(status != 0), Vec::new())
                }
                3 => (client.path_request(17, name), Vec::new()),
                4 if chosen.is_some() && draw % 5 == 0 => (client.close(&handle), Vec::new()),
                5 if chosen.is_some() => {
                    (client.extended("fsync@openssh.com", &[&handle]), Vec::new())
                }
                6 if name.contains("reserve") => (client.path_request(13, name), Vec::new()),
                7 => {
                    let mut list = client.list(".");
                    list.retain(|name| !name.starts_with('.'));
                    (0, list.join(" ").into_bytes())
                }
                _ => (0, Vec::new()),
            });
        }
        assert_eq!(
            answers[0], answers[1],
            "step {step}, request {kind} {name} {flags}"
        );
        if let [one, two] = opened.as_slice() {
            handles.push([one.clone(), two.clone()]);
        }
        if let Some(chosen) = chosen.filter(|_| kind == 4 && draw % 5 == 0) {
            handles.remove(chosen);
        }
    }
    for client in clients {
        client.end();
    }
    let own: BTreeSet<_> = fs::read_dir(served.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    for entry in fs::read_dir(other.path()).unwrap() {
        let entry = entry.unwrap();
        assert!(own.contains(&entry.file_name()));
        let same = fs::read(entry.path()).unwrap()
            == fs::read(served.path(entry.file_name().to_str().unwrap())).unwrap();
        assert!(same, "{}", entry.path().display());
    }
}
