//! What a person needs to build the system again, below `@system/`: packages, units, crontabs, firewall,
//! partitions, LVM, crypttab, fstab, EFI.
//!
//! A tool that is missing or fails is a line in `@system/notes.txt`, and never a failure of the backup.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sprat_session::Failure;
use sprat_snapshot::StagedFile;

use super::Staging;
use crate::config::SYSTEM_FOLDER;
use crate::hooks::pipeline::Pipeline;

/// What is noted of tools and files.
const NOTES: &str = "notes.txt";
/// How long a tool may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// A larger file is no configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How many files of a folder are copied.
const FILES_MAX: usize = 1000;

/// Each file, and the tool that writes it. Its output is the same each time if nothing changed, so that the
/// file is stored once.
const TOOLS: &[(&str, &str)] = &[
    ("packages/dpkg.txt", "dpkg-query -W"),
    ("packages/apt-manual.txt", "apt-mark showmanual"),
    ("packages/apt-hold.txt", "apt-mark showhold"),
    ("packages/rpm.txt", "rpm -qa"),
    ("packages/pacman.txt", "pacman -Q"),
    ("packages/pacman-explicit.txt", "pacman -Qqe"),
    ("packages/apk.txt", "apk info -v"),
    ("packages/xbps.txt", "xbps-query -l"),
    (
        "packages/flatpak.txt",
        "flatpak list --system --columns=application,branch,origin",
    ),
    ("packages/snap.txt", "snap list"),
    (
        "units/unit-files.txt",
        "systemctl list-unit-files --no-pager --no-legend --plain",
    ),
    ("firewall/nftables.txt", "nft --stateless list ruleset"),
    ("firewall/iptables.txt", "iptables-save"),
    ("firewall/ip6tables.txt", "ip6tables-save"),
    ("firewall/ufw.txt", "ufw status verbose"),
    ("firewall/firewalld.txt", "firewall-cmd --list-all-zones"),
    (
        "disks/lsblk.txt",
        "lsblk --output NAME,SIZE,TYPE,FSTYPE,LABEL,UUID,PARTLABEL,PARTUUID,MODEL",
    ),
    ("disks/mdadm.txt", "mdadm --detail --scan"),
    (
        "lvm/pvs.txt",
        "pvs --options pv_name,pv_uuid,vg_name,pv_size,pe_start --units b",
    ),
    (
        "lvm/vgs.txt",
        "vgs --options vg_name,vg_uuid,vg_size,vg_extent_size --units b",
    ),
    (
        "lvm/lvs.txt",
        "lvs --options lv_name,lv_uuid,vg_name,lv_size,segtype --units b",
    ),
    ("efi/efibootmgr.txt", "efibootmgr -v"),
    ("kernel.txt", "uname -a"),
];
/// Files and folders that are copied as they are.
const FILES: &[&str] = &[
    "/etc/fstab",
    "/etc/crypttab",
    "/etc/crontab",
    "/etc/cron.d",
    "/var/spool/cron",
    "/etc/systemd/system",
    "/etc/lvm/backup",
    "/etc/os-release",
    "/proc/cmdline",
    "/proc/mdstat",
];

/// What is there to be copied, and why the rest is not.
#[derive(Debug, Default)]
struct Found {
    files: Vec<(PathBuf, Vec<u8>)>,
    notes: Vec<String>,
}

impl Staging<'_> {
    /// Writes the state of the system.
    ///
    /// # Errors
    /// The volume failed, or an interrupt came.
    pub(super) fn stage_system_state(&mut self) -> Result<Vec<StagedFile>, Failure> {
        let mut staged = Vec::new();
        let mut notes = Vec::new();
        let tools = TOOLS
            .iter()
            .map(|(name, words)| ((*name).to_owned(), *words));
        for (name, words) in tools {
            staged.extend(self.stage_tool(&name, &split(words), &mut notes)?);
        }
        for disk in disks() {
            let name = format!("disks/{disk}.sfdisk");
            let words = ["sfdisk", "--dump", &format!("/dev/{disk}")].map(OsString::from);
            staged.extend(self.stage_tool(&name, &words, &mut notes)?);
        }
        let mut found = Found::default();
        for path in FILES {
            found.read(Path::new(path));
        }
        notes.append(&mut found.notes);
        notes.sort();
        let text = notes
            .iter()
            .map(|note| format!("{note}\n"))
            .collect::<String>();
        found.files.push((NOTES.into(), text.into_bytes()));
        for (path, content) in found.files {
            let path = Path::new(SYSTEM_FOLDER).join(path);
            let (file, written) = self.stage(&path, |mut to, _| to.write_all(&content))?;
            written.map_err(|error| {
                Failure::failed("can't write the state of the system").caused_by(&error)
            })?;
            staged.push(file);
        }
        Ok(staged)
    }

    fn stage_tool(
        &mut self,
        name: &str,
        words: &[OsString],
        notes: &mut Vec<String>,
    ) -> Result<Option<StagedFile>, Failure> {
        let pipeline = Pipeline {
            stages: vec![words.to_vec()],
            timeout: PATIENCE,
            user: None,
        };
        let path = Path::new(SYSTEM_FOLDER).join(name);
        let (file, report) = self.stage_output(&path, &pipeline)?;
        match report.end {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(file)),
            Err(failure) => {
                notes.push(format!("{name}: {}", failure.in_one_line()));
                Ok(None)
            }
        }
    }
}

fn split(words: &str) -> Vec<OsString> {
    words.split(' ').map(OsString::from).collect()
}

/// The disks of this machine that have partitions.
fn disks() -> Vec<String> {
    let names = std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let has_partitions = |name: &String| {
        let parts = std::fs::read_dir(Path::new("/sys/block").join(name));
        let mut parts = parts.into_iter().flatten().flatten();
        parts.any(|part| part.path().join("partition").exists())
    };
    let mut disks: Vec<String> = names.filter(has_partitions).collect();
    disks.sort();
    disks
}

impl Found {
    /// Reads a file, or all files below a folder. Their place is `files`, with their whole path.
    fn read(&mut self, path: &Path) {
        let mut todo = vec![path.to_owned()];
        while let Some(path) = todo.pop() {
            let note = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
            let about = match std::fs::symlink_metadata(&path) {
                Ok(about) => about,
                Err(error) => {
                    self.notes.push(note(&error));
                    continue;
                }
            };
            if self.files.len() >= FILES_MAX {
                self.notes.push(note(&"too many files"));
                return;
            }
            if about.is_dir() {
                let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
                todo.extend(entries.map(|entry| entry.path()));
                todo.sort();
            } else if about.is_symlink() && path.starts_with("/etc/systemd") {
                // An enabled unit: the list of unit files has it.
            } else if about.len() > FILE_BYTES_MAX {
                self.notes.push(note(&"too large"));
            } else if std::fs::metadata(&path).is_ok_and(|about| about.is_file()) {
                match std::fs::read(&path) {
                    Ok(content) => {
                        let below = path.strip_prefix("/").unwrap_or(&path);
                        self.files.push((Path::new("files").join(below), content));
                    }
                    Err(error) => self.notes.push(note(&error)),
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test panics")]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_what_is_missing_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("deep")).unwrap();
        std::fs::write(folder.path().join("deep/file"), "content").unwrap();
        let large = std::fs::File::create(folder.path().join("large")).unwrap();
        large.set_len(FILE_BYTES_MAX + 1).unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from(0o600)).unwrap();
        let mut found = Found::default();
        found.read(folder.path());
        found.read(&folder.path().join("none"));
        let below = folder.path().strip_prefix("/").unwrap();
        let expected = Path::new("files").join(below).join("deep/file");
        assert_eq!(found.files, [(expected, b"content".to_vec())]);
        assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
    }

    #[test]
    fn no_two_tools_write_one_file() {
        let mut names: Vec<&str> = TOOLS.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TOOLS.len());
    }
}
