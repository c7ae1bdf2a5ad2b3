//! The command line of rsync for a snapshot.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::Run;
use crate::job::Folder;
use crate::mounts::pattern_for;
use crate::recent;
use crate::rsync::{Invocation, Side, TRANSFER_OPTIONS};
use crate::sources::argument;

impl Run<'_> {
    /// The command line. rsync runs in the job's folder, so that the path of the mount point is not in
    /// it.
    pub(super) fn invocation(&self, inflight: Folder) -> Invocation {
        if self.sources.list.is_empty() {
            return self.run_into_volume(Vec::new());
        }
        let mut arguments = TRANSFER_OPTIONS.map(OsString::from).to_vec();
        arguments.extend(["--delete", "--delete-excluded"].map(OsString::from));
        if self.recent.all || self.spec.checksum {
            arguments.push("--checksum".into());
        }
        // A relative path is relative to the destination.
        let linked_from = match self.in_work {
            true => {
                // Without it one unread folder would keep all files that are gone.
                arguments.push("--ignore-errors".into());
                arguments.extend(self.attribute_filters());
                arguments.extend(self.filters_of_top());
                &[][..]
            }
            false => &self.linked_from,
        };
        arguments.extend(
            linked_from
                .iter()
                .map(|(folder, _)| OsString::from(format!("--link-dest=../{folder}"))),
        );
        let copy = self.copy.iter();
        arguments.extend(copy.map(|copy| {
            let folder = Path::new("..").join(&copy.link_dest);
            argument("--link-dest=", folder.as_os_str())
        }));
        arguments.extend(self.sources.arguments(self.spec));
        arguments.push(format!("./{inflight}/").into());
        let mut invocation = self.run_into_volume(arguments);
        invocation.input = self.sources.input();
        invocation
    }

    /// Attributes that a btrfs volume must not get: `btrfs.compression` would change how the volume itself
    /// stores a file. Any such filter switches off rsync's own rule against `system.*`, where ACLs are: they
    /// are hidden and protected, because rsync copies ACLs by another way, and would remove them again.
    pub(super) fn attribute_filters(&self) -> Vec<OsString> {
        match self.in_work {
            true => [
                "--filter=Hx btrfs.*",
                "--filter=Hx system.*",
                "--filter=Px system.*",
            ]
            .map(OsString::from)
            .to_vec(),
            false => Vec::new(),
        }
    }

    /// What is at the top of `work` and no part of the source `/`: the folders of hosts, and begun files.
    fn filters_of_top(&self) -> Vec<OsString> {
        let mut sources = self.sources.list.iter();
        if !sources.any(|source| source.path == Path::new("/")) {
            return Vec::new();
        }
        let hosts = self.sources.pulled.hosts.iter();
        let places = hosts.map(|host| Path::new("/").join(host.folder()));
        let protect = |place: PathBuf| {
            let mut filter = OsString::from("--filter=P ");
            filter.push(pattern_for(&place, false));
            filter
        };
        let begun = OsString::from("--filter=P /20*Z.begun");
        places.map(protect).chain(std::iter::once(begun)).collect()
    }

    pub(super) fn run_into_volume(&self, arguments: Vec<OsString>) -> Invocation {
        let job = &self.folder.job.path;
        let mut invocation = Invocation::new(arguments, job, job, Side::IntoVolume);
        invocation.recent_from = Some(recent::from_text(self.started));
        invocation.listener = self.spec.listener.clone();
        invocation
    }
}
