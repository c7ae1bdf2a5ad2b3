//! What is in the containers of the year: the snapshots, their content, and what they take and cost.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use sprat_testkit::manifest::assert_same;
use sprat_testkit_session::plain_volume::PlainVolume;

use super::world::{World, parse, size_mib, stamp};

impl World {
    /// The names of a job's finished snapshots.
    pub fn list(&self, container: &str, job: &str) -> Vec<i64> {
        let listed = self
            .sprat(&["snapshots", container, "--json"])
            .succeeded()
            .json();
        let all = listed["snapshots"].as_array().unwrap().iter();
        let finished = all.filter(|one| {
            let kind = one["kind"].as_str().unwrap();
            one["job"] == job && matches!(kind, "good" | "unread")
        });
        finished
            .map(|one| parse(one["name"].as_str().unwrap()))
            .collect()
    }

    /// Exactly the expected snapshots are there.
    pub fn compare_names(&self) {
        for copy in &self.copies {
            if copy.container == "usb" && self.disk.is_none() || copy.snaps.is_empty() {
                continue;
            }
            let found = self.list(copy.container, copy.job);
            let shown = |names: &[i64]| names.iter().map(|name| stamp(*name)).collect::<Vec<_>>();
            assert_eq!(
                shown(&found),
                shown(&copy.names()),
                "{} on {}",
                copy.name(),
                self.shown_now()
            );
        }
    }

    /// Each snapshot is what the source was. Returns how many were compared.
    pub fn compare_contents(&mut self) -> usize {
        self.plug_in();
        fs::create_dir(self.machine.path("mnt")).unwrap();
        let mut compared = 0;
        for container in ["nas", "usb"] {
            self.ok(&["mount", container, "mnt"]);
            let of_it = self
                .copies
                .iter()
                .filter(|copy| copy.container == container);
            for (copy, snap) in
                of_it.flat_map(|copy| copy.snaps.iter().map(move |snap| (copy, snap)))
            {
                let name = stamp(snap.name);
                let tree = self.machine.path("mnt").join(copy.job).join(&name);
                for (folder, was) in snap.content.iter() {
                    let source = self.machine.path(folder);
                    let back = tree.join(source.strip_prefix("/").unwrap());
                    assert_same(was, &back, &format!("{}/{name}", copy.name()));
                }
                compared += 1;
            }
            self.ok(&["umount", "mnt"]);
        }
        compared
    }

    /// Each container is clean to its last byte. Prints what it takes, and what the runs cost.
    pub fn check_containers(&mut self) {
        for (container, file_system) in self.containers.each() {
            self.ok(&["check", container, "--read-data"]);
            let file = match container {
                "nas" => self.machine.path("store/nas.luks"),
                _ => self.machine.path("usb/usb.luks"),
            };
            let key = self.machine.path(format!("config/keys/{container}.key"));
            let plain = PlainVolume::export(&file, &key, &self.machine.path("plain"));
            plain.assert_clean();
            let taken = fs::metadata(&file).unwrap().blocks() * 512;
            println!(
                "{container}: {} takes {} of {} MiB",
                file_system.name(),
                taken >> 20,
                size_mib(file_system)
            );
        }
        let mean = |runs: &[Duration]| runs.iter().sum::<Duration>() / 20;
        // The first copy is no update.
        if let (Some(first), Some(last)) = (self.cost.get(1..21), self.cost.last_chunk::<20>()) {
            let (first, last) = (mean(first), mean(last));
            let ratio = last.as_secs_f64() / first.as_secs_f64();
            println!(
                "a run takes {first:.2?} of a processor at first, and {last:.2?} at last: {ratio:.2} times"
            );
        }
    }
}
