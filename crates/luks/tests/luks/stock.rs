//! The stock `cryptsetup` command, and container files made by it and by sprat.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use sprat_luks::{
    FormatOptions, Header, HeaderWrite, NewContainer, RecoveryKey, Secret, SlotKind, Turn, format,
};
use tempfile::TempDir;

/// Whether `cryptsetup` is installed. If not, the test is skipped, or fails if `CI` is set.
pub fn cryptsetup_is_here() -> bool {
    let found = Command::new("cryptsetup").arg("--version").output().is_ok();
    // Empty counts as not set, as in `scripts/test` without it.
    let in_ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty());
    assert!(found || !in_ci, "cryptsetup is missing, and CI is set");
    if !found {
        println!("skipped: the cryptsetup command is not installed");
    }
    found
}

pub struct Files {
    dir: TempDir,
}

impl Files {
    pub fn new() -> Self {
        // In memory if possible, because cryptsetup writes whole key slot areas.
        let base = Path::new("/dev/shm");
        let dir = if base.is_dir() {
            tempfile::tempdir_in(base)
        } else {
            tempfile::tempdir()
        };
        Self {
            dir: dir.expect("a temporary folder"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A sparse file of `len` bytes.
    pub fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path)
            .and_then(|file| file.set_len(len))
            .unwrap();
        path
    }

    /// A file with these bytes, readable by its owner only.
    pub fn holding(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(bytes))
            .unwrap();
        path
    }
}

/// Runs `cryptsetup`, with `input` on its standard input.
pub fn cryptsetup(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new("cryptsetup")
        .args(args)
        // `reencrypt` writes a temporary header in the working folder.
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("LC_ALL", "C")
        .spawn()
        .unwrap();
    // It may refuse before it reads its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Runs `cryptsetup`, which must succeed. Returns its output.
pub fn cryptsetup_ok(args: &[&str], input: &[u8]) -> String {
    let output = cryptsetup(args, input);
    assert!(
        output.status.success(),
        "cryptsetup {args:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a container with `cryptsetup luksFormat`, with cheap key derivation and `extra` options.
pub fn their_container(files: &Files, passphrase: &[u8], extra: &[&str]) -> PathBuf {
    let path = files.sparse("theirs.luks", 64 << 20);
    let name = path.to_str().unwrap();
    let mut args = vec!["luksFormat", "--type", "luks2", "--batch-mode"];
    let cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    if !extra.contains(&"--pbkdf") {
        args.extend(cheap);
    }
    args.extend(extra);
    args.extend([name, "-"]);
    cryptsetup_ok(&args, passphrase);
    path
}

/// The first session that changes keys.
pub const FIRST: Turn = Turn {
    lease: 1,
    after_takeover: false,
};

pub const PAYLOAD_BYTES: u64 = 1 << 20;

/// A container made by sprat, and what opens it.
pub struct Ours {
    pub made: NewContainer,
    pub key_file: Vec<u8>,
    pub recovery: RecoveryKey,
}

impl Ours {
    pub fn make() -> Self {
        let key_file: Vec<u8> = (0..4096_u32).map(|n| (n * 31 % 251) as u8).collect();
        let recovery = RecoveryKey::generate().unwrap();
        let secrets = [
            (Secret::key_file(key_file.clone()), SlotKind::KeyFile),
            (recovery.secret(), SlotKind::Recovery),
        ];
        let options = FormatOptions {
            fast_kdf_for_tests: true,
            ..FormatOptions::default()
        };
        let made = format(&secrets, &options).unwrap();
        Self {
            made,
            key_file,
            recovery,
        }
    }

    /// The container file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let len = self.made.payload_offset_bytes + PAYLOAD_BYTES;
        let mut bytes = vec![0; len as usize];
        for extent in &self.made.header {
            bytes[extent.offset as usize..][..extent.bytes.len()].copy_from_slice(&extent.bytes);
        }
        bytes
    }

    pub fn file(&self, files: &Files) -> PathBuf {
        let len = self.made.payload_offset_bytes + PAYLOAD_BYTES;
        let path = files.sparse("ours.luks", len);
        let file = File::options().write(true).open(&path).unwrap();
        for extent in &self.made.header {
            file.write_all_at(&extent.bytes, extent.offset).unwrap();
        }
        path
    }

    pub fn key(&self) -> Secret {
        Secret::key_file(self.key_file.clone())
    }
}

/// Does the first `count` steps of a change.
pub fn apply(writes: &[HeaderWrite], count: usize, bytes: &mut [u8]) {
    for write in &writes[..count] {
        if let HeaderWrite::Write(extent) = write {
            bytes[extent.offset as usize..][..extent.bytes.len()].copy_from_slice(&extent.bytes);
        }
    }
}

pub fn opens(bytes: &[u8], secret: &Secret) -> bool {
    Header::load(&bytes)
        .and_then(|header| header.unlock(&bytes, secret))
        .is_ok()
}
