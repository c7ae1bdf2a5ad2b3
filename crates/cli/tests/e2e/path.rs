//! The main job from end to end: a real tree, a real sshd, the real program, and stock cryptsetup.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sprat_testkit::client_and_server::{self, ClientAndServer};
use sprat_testkit::dice::Dice;
use sprat_testkit::leftovers::contains;
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Bytes that a file uses on its disk.
fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("the container is there").blocks() * 512
}

#[test]
fn thousands_of_files_and_much_data_come_back_identical() {
    sprat_testkit::requires!(client_and_server::missing());
    let mut pair = ClientAndServer::new();
    let source = pair.path("source");
    // In `make torture` more than 50,000 files and a GiB.
    let tenths = if std::env::var("SPRAT_TORTURE_ROUNDS").is_ok() {
        10
    } else {
        2
    };
    let shape = Shape {
        small_files: 4_600 * tenths,
        middle_files: 400 * tenths,
        large_files: 2 + tenths,
    };
    source_tree::make(&source, shape, 20_261_123);
    let should = Manifest::of(&source);
    let (files, bytes) = should.files();
    let times = usize::try_from(tenths).unwrap();
    assert!(
        files >= 5_000 * times && bytes >= tenths * (1 << 30) / 10,
        "{files} files, {bytes} bytes"
    );
    let (with_xattrs, links, sparse) = should.specials();
    assert!(
        with_xattrs > 90 * times && links > 0 && sparse > 0,
        "the odd ones are there"
    );

    pair.init(20);
    let begun = Instant::now();
    pair.backup("big", &source);
    let backup = begun.elapsed();
    let begun = Instant::now();
    let back = pair.restore("big", &source);
    let restore = begun.elapsed();
    assert_same(&should, &back, "what came back");
    pair.assert_nothing_is_left();
    println!("{files} files, {bytes} bytes: backup {backup:.1?}, restore {restore:.1?}");
}

#[test]
fn second_run_links_unchanged_files_and_leaves_a_clean_volume() {
    sprat_testkit::requires!(client_and_server::missing());
    let mut pair = ClientAndServer::new();
    let source = pair.path("source");
    let shape = Shape {
        small_files: 400,
        middle_files: 20,
        large_files: 1,
    };
    source_tree::make(&source, shape, 7);
    let should = Manifest::of(&source);
    pair.init(2);
    pair.backup("links", &source);
    let after_first = allocated_bytes(&pair.container());
    std::thread::sleep(Duration::from_millis(1100));
    pair.backup("links", &source);
    let grown = allocated_bytes(&pair.container()) - after_first;
    assert!(grown < 8 << 20, "the second run took {grown} bytes");

    let plain = PlainVolume::export(&pair.container(), &pair.key_file(), &pair.path("plain"));
    plain.assert_clean();
    let mounted = plain.mount(&pair.path("offline"));
    let job = pair.path("offline/links");
    let mut snapshots: Vec<_> = fs::read_dir(&job)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("20"))
        .map(|entry| entry.path())
        .collect();
    snapshots.sort();
    assert_eq!(snapshots.len(), 2, "{snapshots:?}");
    let inside = source.strip_prefix("/").unwrap();
    for snapshot in &snapshots {
        assert_same(
            &should,
            &snapshot.join(inside),
            "a snapshot, decrypted offline",
        );
    }
    let latest = fs::read_link(job.join("latest")).unwrap();
    assert_eq!(job.join(latest), snapshots[1]);
    let file = inside.join("small/000/small file 1");
    let inode = |snapshot: &Path| fs::metadata(snapshot.join(&file)).unwrap().ino();
    assert_eq!(inode(&snapshots[0]), inode(&snapshots[1]));
    drop(mounted);
    pair.assert_nothing_is_left();
}

#[test]
fn five_tebibytes_are_made_with_at_most_70_mib_sent() {
    sprat_testkit::requires!(client_and_server::missing());
    let mut pair = ClientAndServer::new();
    let size = pair.choose_size(5 << 10).to_string();
    let output = pair.ok(
        &[
            "--cheap-kdf-for-tests",
            "init",
            pair.target(),
            "--size",
            &size,
        ],
        Duration::from_secs(100),
    );
    let container = pair.container();
    let about = fs::metadata(&container).unwrap();
    assert_eq!(
        about.len().to_string(),
        size,
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let allocated = allocated_bytes(&container);
    assert!(allocated <= 70 << 20, "{allocated} bytes allocated");
    pair.assert_nothing_is_left();
}

/// Runs cryptsetup; `input` is typed at its prompt (its standard input).
fn cryptsetup(arguments: &[&str], container: &Path, input: Option<&str>) -> (bool, String) {
    let mut child = Command::new("cryptsetup")
        .args(arguments)
        .arg(container)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cryptsetup starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // It may end without having read.
    let _ = stdin.write_all(input.unwrap_or_default().as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("cryptsetup ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// The recovery key on a sheet: groups of four characters joined by dashes.
fn recovery_key(sheet: &str) -> Option<&str> {
    sheet.split_whitespace().find(|word| {
        let groups: Vec<_> = word.split('-').collect();
        groups.len() >= 8
            && groups.iter().all(|group| {
                group.len() == 4 && group.bytes().all(|byte| byte.is_ascii_alphanumeric())
            })
    })
}

#[test]
fn cryptsetup_opens_the_container_file_of_the_server() {
    sprat_testkit::requires!(client_and_server::missing());
    let mut pair = ClientAndServer::new();
    let size = pair.choose_size(1).to_string();
    // The real key derivation: what a user gets is what is tried here.
    let output = pair.ok(
        &["init", pair.target(), "--size", &size],
        Duration::from_secs(100),
    );
    let source = pair.path("source");
    fs::write(source.join("file"), "content").unwrap();
    pair.backup("job", &source);

    let sheet = String::from_utf8_lossy(&output.stdout).into_owned();
    let container = pair.container();
    let (done, dump) = cryptsetup(&["luksDump"], &container, None);
    assert!(done, "{dump}");
    assert!(dump.contains("aes-xts-plain64"), "{dump}");
    assert!(dump.contains("sector: 4096"), "{dump}");
    let uuid = dump
        .lines()
        .find_map(|line| line.strip_prefix("UUID:"))
        .expect("luksDump shows the UUID")
        .trim();
    assert!(sheet.contains(uuid), "the sheet shows {uuid}: {sheet}");

    let test = ["open", "--test-passphrase"];
    let key_file = format!("--key-file={}", pair.key_file().display());
    let (done, text) = cryptsetup(&[test[0], test[1], &key_file], &container, None);
    assert!(done, "the key file: {text}");
    let key = recovery_key(&sheet).unwrap_or_else(|| panic!("no recovery key: {sheet}"));
    let (done, text) = cryptsetup(&test, &container, Some(&format!("{key}\n")));
    assert!(done, "the recovery key {key}: {text}");
    let (done, _) = cryptsetup(&test, &container, Some("something else\n"));
    assert!(
        !done,
        "cryptsetup took a wrong passphrase: the test proves nothing"
    );
}

#[test]
fn no_name_or_content_reaches_the_server_during_a_backup() {
    sprat_testkit::requires!(client_and_server::missing());
    let mut pair = ClientAndServer::new();
    let source = pair.path("source");
    // Names and contents, in many places: at a block's beginning, across blocks, in an inode.
    let marker = "Zk9-marker-that-nobody-else-writes";
    let dice = &mut Dice::new(11);
    for number in 0..40_u64 {
        let folder = source.join(format!("{marker} folder {number}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(format!("{number} {marker}")), marker).unwrap();
        let mut content = source_tree::random(dice, 600_000);
        for at in (0..content.len() - marker.len()).step_by(40_001) {
            content[at..at + marker.len()].copy_from_slice(marker.as_bytes());
        }
        fs::write(folder.join("content"), content).unwrap();
    }
    std::os::unix::fs::symlink(marker, source.join("link")).unwrap();
    pair.init(2);

    let mut command = pair.sprat();
    // The job's name must stay unknown to the server, too.
    command
        .args(["backup", pair.target(), "--name", marker])
        .arg(&source);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut reads = 0;
    let status = loop {
        let ended = child.try_wait().unwrap();
        reads += 1;
        assert_no_marker(&pair.server(), marker);
        if let Some(status) = ended {
            break status;
        }
    };
    assert!(status.success());
    assert!(reads > 1, "the server's folder was read only after the end");

    // The search finds what is there: the same bytes, decrypted.
    let plain = PlainVolume::export(&pair.container(), &pair.key_file(), &pair.path("plain"));
    assert!(file_contains(&pair.path("plain"), marker.as_bytes()));
    drop(plain);
    pair.assert_nothing_is_left();
    println!("read {reads} times while the backup ran");
}

/// The marker is in no name of the server's folder and in no byte of its files.
fn assert_no_marker(folder: &Path, marker: &str) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(!name.contains(marker), "a file is called {name}");
        // A lock may be gone by now.
        if entry.path().is_file() && file_contains(&entry.path(), marker.as_bytes()) {
            panic!("{name} holds the marker");
        }
    }
}

/// Searches what a file has allocated; holes are skipped.
fn file_contains(path: &Path, marker: &[u8]) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    let mut buffer = vec![0; 4 << 20];
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let got = file.read_at(&mut buffer, data).unwrap();
        if contains(&buffer[..got], marker) {
            return true;
        }
        if got < buffer.len() {
            return false;
        }
        // A marker may lie across two reads.
        at = data + (got - marker.len()) as u64;
    }
    false
}
