//! `one_file_system` with mounts that come and go inside a source.

use super::*;

struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Self {
        run("mount", &["-t", "tmpfs", "disk", at.to_str().unwrap()]);
        Self(at)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-lq").arg(&self.0).status();
    }
}

#[test]
fn folder_that_became_a_mount_point_is_empty_and_comes_back_after_it() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::create_dir_all(volume.source("mnt/sub/named")).unwrap();
    for name in ["keep", "mnt/file", "mnt/sub/file", "mnt/sub/named/file"] {
        fs::write(volume.source(name), "monday").unwrap();
    }
    let mut spec = volume.bench.spec();
    spec.one_file_system = true;
    let first = volume.try_take(&spec).unwrap();
    assert!(volume.kept(&first, "mnt/sub/file").exists());

    let disk = Disk::mount(volume.source("mnt"));
    fs::create_dir_all(volume.source("mnt/sub/named")).unwrap();
    for name in ["mnt/file", "mnt/sub/named/file"] {
        fs::write(volume.source(name), "tuesday").unwrap();
    }
    let second = volume.try_take(&spec).unwrap();
    assert_eq!(
        fs::read_dir(volume.kept(&second, "mnt")).unwrap().count(),
        0
    );
    assert!(volume.kept(&second, "keep").exists());
    assert!(second.record.complete, "{:?}", second.record);
    let list = lines(&list_of(&volume.bench.job(), second.name));
    let change = changed(&list).remove(&volume.source("mnt/file"));
    assert_eq!(change.as_deref(), Some("gone"), "{list:?}");

    // A source of its own on that disk.
    spec.sources.push(volume.source("mnt/sub/named"));
    let third = volume.try_take(&spec).unwrap();
    let third = volume.try_take(&spec).map(|again| [third, again]).unwrap();
    for report in third {
        let mnt = fs::read_dir(volume.kept(&report, "mnt")).unwrap();
        assert_eq!(mnt.count(), 1);
        let named = fs::read(volume.kept(&report, "mnt/sub/named/file")).unwrap();
        assert_eq!(named, b"tuesday");
    }

    drop(disk);
    spec.sources.pop();
    let last = volume.try_take(&spec).unwrap();
    assert_same(&volume.bench.source(), &volume.kept(&last, ""));
}

#[test]
fn disk_that_is_mounted_during_the_run_leaves_nothing_old() {
    requires!(missing());
    let volume = OnBtrfs::new();
    fs::create_dir(volume.source("mnt")).unwrap();
    for name in ["keep", "mnt/file"] {
        fs::write(volume.source(name), "monday").unwrap();
    }
    let mut spec = volume.bench.spec();
    spec.one_file_system = true;
    volume.try_take(&spec).unwrap();
    let _disk = Disk(volume.source("mnt"));
    let mount = format!(
        "mountpoint -q '{0}' || mount -t tmpfs disk '{0}'",
        volume.source("mnt").display()
    );
    spec.rsync = volume.bench.rsync_script(&mount, "rsync");
    let report = volume.try_take(&spec).unwrap();
    assert_eq!(
        fs::read_dir(volume.kept(&report, "mnt")).unwrap().count(),
        0
    );
    assert!(volume.kept(&report, "keep").exists());
}
