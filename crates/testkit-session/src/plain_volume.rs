//! Decrypts a container offline, without dm-crypt and without a session.
//!
//! This is an independent way to the plaintext: it needs only the header, the key file, and AES-XTS
//! over the blocks that the container has on its disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::SeekFrom;
use sprat_luks::{Header, HeaderRead, Secret, SectorCipher};
use sprat_testkit::program::system;

struct Container(File);

impl HeaderRead for Container {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

/// Where btrfs has its magic (`BTRFS_SUPER_INFO_OFFSET`, `struct btrfs_super_block`).
const BTRFS_MAGIC: (u64, &[u8; 8]) = (0x1_0040, b"_BHRfS_M");

/// The decrypted volume as a sparse file, its journal replayed; removed on drop.
#[derive(Debug)]
pub struct PlainVolume {
    image: PathBuf,
    is_btrfs: bool,
    /// Bytes that the container has on its disk for the volume.
    pub allocated_bytes: u64,
    /// What `e2fsck -E journal_only` printed. A btrfs has no journal.
    pub journal: String,
}

impl PlainVolume {
    /// Decrypts what `container` has allocated into `image`, and replays the journal there.
    ///
    /// # Panics
    /// When a step fails.
    #[must_use]
    pub fn export(container: &Path, key_file: &Path, image: &Path) -> Self {
        let source = Container(File::open(container).expect("the container is there"));
        let header = Header::load(&source).expect("the header is whole");
        let secret = Secret::key_file(std::fs::read(key_file).expect("the key file is there"));
        let key = header
            .unlock(&source, &secret)
            .expect("the key file opens it");
        let cipher = SectorCipher::new(&key, &header).expect("a cipher");
        let payload = header
            .geometry(source.len().expect("a length"))
            .expect("a payload");

        let plain = File::create(image).expect("a new file");
        plain.set_len(payload.len_bytes).expect("a sparse file");
        let end = payload.offset_bytes + payload.len_bytes;
        let mut at = payload.offset_bytes;
        let mut allocated_bytes = 0;
        let mut buffer = vec![0; 1 << 20];
        while let Some((from, to)) = data_after(&source.0, at, end) {
            // The disk's blocks may be smaller than ours; each of ours is whole or missing.
            let mut offset = from - from % 4096;
            let to = to.next_multiple_of(4096).min(end);
            while offset < to {
                let len =
                    usize::try_from(to - offset).map_or(buffer.len(), |len| len.min(buffer.len()));
                let part = &mut buffer[..len];
                source
                    .0
                    .read_exact_at(part, offset)
                    .expect("the container reads");
                let in_payload = offset - payload.offset_bytes;
                cipher.decrypt(in_payload, part).expect("the cipher works");
                plain
                    .write_all_at(part, in_payload)
                    .expect("the image is written");
                offset += len as u64;
                allocated_bytes += len as u64;
            }
            at = to;
        }
        drop(plain);
        let mut magic = [0; 8];
        let read = File::open(image).and_then(|file| file.read_exact_at(&mut magic, BTRFS_MAGIC.0));
        let is_btrfs = read.is_ok() && magic == *BTRFS_MAGIC.1;
        let journal = match is_btrfs {
            true => String::new(),
            false => replayed(image),
        };
        Self {
            image: image.to_owned(),
            is_btrfs,
            allocated_bytes,
            journal,
        }
    }

    /// Whether the super block of a btrfs is torn. Then it is repaired from its copy, as `btrfs rescue` does it.
    ///
    /// # Panics
    /// When the copy is damaged, too.
    #[must_use]
    pub fn repair_torn_super_block(&self) -> bool {
        if !self.is_btrfs {
            return false;
        }
        let (code, text) = run("btrfs", &["inspect-internal", "dump-super"], &self.image);
        assert_eq!(code, 0, "no super block:\n{text}");
        if !text.contains("DON'T MATCH") {
            return false;
        }
        let (code, text) = run("btrfs", &["rescue", "super-recover", "-y"], &self.image);
        // 2: it was repaired (btrfs-rescue(8)).
        assert_eq!(code, 2, "the super block can't be repaired:\n{text}");
        true
    }

    /// Checks that `e2fsck -fn`, or `btrfs check`, finds nothing.
    ///
    /// # Panics
    /// With its findings.
    pub fn assert_clean(&self) {
        let (code, text) = match self.is_btrfs {
            true => run("btrfs", &["check", "--readonly"], &self.image),
            false => run("e2fsck", &["-fn"], &self.image),
        };
        assert_eq!(code, 0, "the check found something:\n{text}");
    }

    /// Mounts it, read-only, at `dir`, until the guard is dropped.
    ///
    /// # Panics
    /// When it can't be mounted.
    #[must_use]
    pub fn mount(&self, dir: &Path) -> Mounted {
        std::fs::create_dir_all(dir).expect("a folder");
        let paths = [self.image.as_os_str(), dir.as_os_str()];
        let options = match self.is_btrfs {
            true => ["-t", "btrfs", "-o", "loop,ro"],
            false => ["-t", "ext4", "-o", "loop,ro,noload"],
        };
        let options = options.map(std::ffi::OsStr::new);
        system("mount", &[&options[..], &paths[..]].concat());
        Mounted(dir.to_owned())
    }
}

impl Drop for PlainVolume {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.image);
    }
}

/// A mounted image; unmounted on drop.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.0).status();
        assert!(
            std::thread::panicking() || status.is_ok_and(|status| status.success()),
            "umount {}",
            self.0.display()
        );
    }
}

/// The next run of allocated bytes from `at` on, cut at `end`.
///
/// # Panics
/// When the file system does not know its holes.
#[must_use]
pub fn data_after(file: &File, at: u64, end: u64) -> Option<(u64, u64)> {
    if at >= end {
        return None;
    }
    let from = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(from) => from,
        // No data behind `at`.
        Err(rustix::io::Errno::NXIO) => return None,
        Err(error) => panic!("SEEK_DATA: {error}"),
    };
    let to = rustix::fs::seek(file, SeekFrom::Hole(from)).expect("a hole, or the end");
    (from < end).then_some((from, to.min(end)))
}

fn replayed(image: &Path) -> String {
    let (code, text) = run("e2fsck", &["-fy", "-E", "journal_only"], image);
    assert!(code <= 1, "journal replay: exit {code}\n{text}");
    text
}

fn run(program: &'static str, options: &[&str], image: &Path) -> (i32, String) {
    let program = sprat_testkit::needs::find_program(program).expect("checked by missing()");
    let output = Command::new(program)
        .args(options)
        .arg(image)
        .output()
        .expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text)
}
