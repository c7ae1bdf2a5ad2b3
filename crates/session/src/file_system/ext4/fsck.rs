//! Runs e2fsck on the attached device: first the journal replay that any mount does, then a full check.

use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sprat_snapshot::Cancel;

use crate::Failure;
use crate::file_system::FileSystemCheck;
use crate::file_system::ext4::metadata;

/// How much of e2fsck's output is kept. The output is unbounded if everything is damaged.
const REPORT_BYTES_MAX: usize = 16 << 10;

/// How often a cancel is checked.
const CANCEL_INTERVAL: Duration = Duration::from_millis(20);

/// Bits of e2fsck's exit code (e2fsck(8)): errors corrected, corrected and a reboot is needed, left
/// uncorrected, operational error. A device that can't be read gives the last one.
const FOUND: i32 = 1 | 2 | 4 | 8;

/// What e2fsck prints about a journal with wrong checksums. Its exit code is 0: it skips the rest of
/// the journal, and the kernel then refuses to mount. (e2fsck/unix.c, after the replay.)
const JOURNAL_DAMAGED: [&str; 2] = ["Journal checksum error found", "Journal corrupted in"];

/// What e2fsck prints if it lacks memory. Its exit code is the same as for a device that can't be read.
const NO_MEMORY: [&str; 2] = ["Memory allocation failed", "Cannot allocate memory"];

/// How one run of e2fsck ended.
struct FsckRun {
    /// `None`: by a signal.
    code: Option<i32>,
    output: String,
}

/// Replays the journal, then checks without changing anything. With a read-only volume the replay
/// writes to a local overlay. A cancel kills e2fsck.
pub(crate) fn check(device: &Path, cancel: &Cancel) -> Result<FileSystemCheck, Failure> {
    // Preen (`-p`): a plain replay ends with 0. `-y` would repair a file system whose journal can't be
    // found, and the check after it would find nothing.
    let ahead = read_ahead(device, cancel)?;
    let replay = e2fsck(&["-p", "-E", "journal_only"], device, cancel)?;
    let found = e2fsck(&["-f", "-n"], device, cancel)?;
    drop(ahead);
    judge(&replay, &found)
}

/// See [`metadata::read_ahead`]. A cancel does not wait for a read that hangs.
fn read_ahead(device: &Path, cancel: &Cancel) -> Result<Option<File>, Failure> {
    let device = device.to_owned();
    let reading = std::thread::spawn(move || metadata::read_ahead(&device));
    while !reading.is_finished() {
        require_uncancelled(cancel)?;
        std::thread::sleep(CANCEL_INTERVAL);
    }
    Ok(reading.join().unwrap_or_default())
}

fn require_uncancelled(cancel: &Cancel) -> Result<(), Failure> {
    match cancel.is_cancelled() {
        true => Err(Failure::interrupted().with_hint("nothing was changed")),
        false => Ok(()),
    }
}

/// What e2fsck found is damage. If it could not finish, that is a failure.
fn judge(replay: &FsckRun, check_run: &FsckRun) -> Result<FileSystemCheck, Failure> {
    let output = format!("{}{}", replay.output, check_run.output);
    for run in [replay, check_run] {
        let worked = run.code.is_some_and(|code| code & !FOUND == 0);
        let no_memory = NO_MEMORY.iter().any(|said| run.output.contains(said));
        if !worked || no_memory {
            let how = run.code.map_or("by a signal".to_owned(), |code| {
                format!("with exit status {code}")
            });
            return Err(Failure::failed(format!("e2fsck ended {how}"))
                .because(output)
                .with_hint(
                    "nothing was changed, and the state of the file system is unknown. Perhaps e2fsck \
                     had too little memory; its output is above",
                ));
        }
    }
    let replayed = !JOURNAL_DAMAGED.iter().any(|it| replay.output.contains(it));
    Ok(FileSystemCheck {
        clean: replayed && replay.code == Some(0) && check_run.code == Some(0),
        output,
    })
}

fn e2fsck(arguments: &[&str], device: &Path, cancel: &Cancel) -> Result<FsckRun, Failure> {
    let cannot = |error: io::Error| {
        Failure::failed("can't run e2fsck")
            .caused_by(&error)
            .with_hint("install e2fsprogs")
    };
    let (output, to) = io::pipe().map_err(cannot)?;
    let mut command = Command::new("e2fsck");
    command
        .args(arguments)
        .arg(device)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(to.try_clone().map_err(cannot)?)
        .stderr(to);
    let mut child = command.spawn().map_err(cannot)?;
    tracing::debug!(program = "e2fsck", pid = child.id(), "started");
    // The command has the pipe's other end open.
    drop(command);
    let reading = std::thread::spawn(move || first_bytes(output));
    let status = loop {
        if let Some(status) = child.try_wait().map_err(cannot)? {
            break status;
        }
        if let Err(cancelled) = require_uncancelled(cancel) {
            child.kill().map_err(cannot)?;
            child.wait().map_err(cannot)?;
            return Err(cancelled);
        }
        std::thread::sleep(CANCEL_INTERVAL);
    };
    Ok(FsckRun {
        code: status.code(),
        output: reading.join().unwrap_or_default(),
    })
}

/// Reads to the end, and keeps the first [`REPORT_BYTES_MAX`] bytes.
fn first_bytes(mut output: PipeReader) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(some @ 1..) = output.read(&mut buffer) {
        let room = REPORT_BYTES_MAX.saturating_sub(kept.len());
        kept.extend(&buffer[..some.min(room)]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    use sprat_testkit::{needs, requires};

    use super::*;

    fn run_of(code: i32, output: &str) -> FsckRun {
        FsckRun {
            code: Some(code),
            output: output.to_owned(),
        }
    }

    fn clean(replay: i32, check_run: i32) -> Option<bool> {
        judge(&run_of(replay, ""), &run_of(check_run, ""))
            .ok()
            .map(|check| check.clean)
    }

    #[test]
    fn clean_needs_replay_and_check_without_findings() {
        assert_eq!(clean(0, 0), Some(true));
        for (replay, check_run) in [(0, 4), (0, 8), (0, 12), (1, 0), (4, 0), (8, 0), (8, 8)] {
            assert_eq!(
                clean(replay, check_run),
                Some(false),
                "{replay}, {check_run}"
            );
        }
        let journal = run_of(0, "Journal checksum error found in /dev/loop0\n");
        assert!(!judge(&journal, &run_of(0, "")).unwrap().clean);
    }

    #[test]
    fn e2fsck_that_could_not_work_is_a_failure_and_no_damage() {
        for (replay, check_run) in [(0, 16), (0, 128), (16, 0), (0, 32)] {
            assert_eq!(clean(replay, check_run), None, "{replay}, {check_run}");
        }
        let killed = FsckRun {
            code: None,
            output: String::new(),
        };
        assert!(judge(&run_of(0, ""), &killed).is_err());
        let memory = "Error allocating block bitmap: Memory allocation failed\n";
        assert!(judge(&run_of(0, ""), &run_of(8, memory)).is_err());
    }

    /// An ext4 in a file, with a transaction in its journal that was not yet replayed.
    fn with_dirty_journal(folder: &Path) -> PathBuf {
        let image = folder.join("image");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        tool(
            "mkfs.ext4",
            &["-q", "-F", "-b", "4096", image.to_str().unwrap()],
        );
        // What the last block is to hold.
        let block = folder.join("block");
        std::fs::write(&block, [0xAB; 4096]).unwrap();
        let script = folder.join("script");
        let write = format!("jo -c\njw -b 16000 {}\njc\n", block.display());
        std::fs::write(&script, write).unwrap();
        let script = script.to_str().unwrap();
        tool("debugfs", &["-w", "-f", script, image.to_str().unwrap()]);
        image
    }

    fn tool(name: &str, arguments: &[&str]) -> String {
        let ran = Command::new(name).args(arguments).output().unwrap();
        assert!(ran.status.success(), "{name}: {ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    }

    /// The block number that debugfs prints after `before`.
    fn block_of(image: &Path, request: &str, before: &str) -> u64 {
        let said = tool("debugfs", &["-R", request, image.to_str().unwrap()]);
        let (_, after) = said.split_once(before).unwrap();
        let number: String = after.chars().take_while(char::is_ascii_digit).collect();
        number.parse().unwrap()
    }

    fn missing() -> Option<String> {
        ["e2fsck", "mkfs.ext4", "debugfs"]
            .into_iter()
            .find_map(needs::program)
    }

    #[test]
    fn dirty_journal_is_replayed_and_is_no_damage() {
        requires!(missing());
        let dir = tempfile::tempdir().unwrap();
        let image = with_dirty_journal(dir.path());
        let check = check(&image, &Cancel::new()).unwrap();
        assert!(check.clean, "{}", check.output);
        assert!(check.output.contains("recovering journal"), "{check:?}");
        let file = File::open(&image).unwrap();
        let mut replayed = [0; 4096];
        file.read_exact_at(&mut replayed, 16000 * 4096).unwrap();
        assert!(replayed == [0xAB; 4096]);
    }

    #[test]
    fn garbled_structures_are_reported_and_not_repaired() {
        requires!(missing());
        let dir = tempfile::tempdir().unwrap();
        let image = with_dirty_journal(dir.path());
        let copy = dir.path().join("copy");
        let inodes = block_of(&image, "imap <8>", "located at block ");
        let journal = block_of(&image, "blocks <8>", "");
        for (what, block) in [
            ("super block", 0),
            ("group descriptors", 1),
            ("inode table", inodes),
            ("journal's super block", journal),
            ("what the journal holds", journal + 2),
        ] {
            std::fs::copy(&image, &copy).unwrap();
            let file = File::options().write(true).open(&copy).unwrap();
            file.write_all_at(&[0x55; 4096], block * 4096).unwrap();
            let check = check(&copy, &Cancel::new()).unwrap();
            assert!(!check.clean, "{what}: {}", check.output);
        }
    }

    #[test]
    fn cancel_ends_reads_and_e2fsck() {
        requires!(missing());
        let dir = tempfile::tempdir().unwrap();
        // Opening a FIFO for reading waits for a writer.
        let pipe = dir.path().join("pipe");
        tool("mkfifo", &[pipe.to_str().unwrap()]);
        type Step = fn(&Path, &Cancel) -> Result<(), Failure>;
        let steps: [Step; 2] = [
            |device, cancel| read_ahead(device, cancel).map(|_| ()),
            |device, cancel| e2fsck(&["-f", "-n"], device, cancel).map(|_| ()),
        ];
        for step in steps {
            let cancel = Cancel::new();
            let wish = cancel.clone();
            let wisher = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                wish.cancel();
            });
            let failure = step(&pipe, &cancel).unwrap_err();
            wisher.join().unwrap();
            assert_eq!(failure.exit, crate::Exit::Interrupted, "{failure:?}");
        }
    }
}
