//! A volume attached with the kernel's real FUSE, loop and ext4: files are read back as they were
//! written.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::chain::{Chain, ChainOptions, wait};
use crate::support::{Place, can_attach, run};
use sprat_attach::{AttachError, MkfsOptions, MountState};
use sprat_testkit::leftovers::{self, LIMIT};

/// A chain with a new file system, mounted.
fn mounted(place: &Place) -> Chain {
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain.ask_worker("mkfs test").unwrap();
    mount(&mut chain, place);
    chain
}

fn mount(chain: &mut Chain, place: &Place) {
    chain
        .ask_worker(&format!("mount {}", place.dir.display()))
        .unwrap();
}

#[test]
fn a_tree_copied_by_rsync_is_read_back_identical_after_a_remount() {
    if !can_attach() {
        return;
    }
    let place = Place::new(512);
    let source = "/usr/share/perl5/";
    let source = if fs::exists(source).unwrap() {
        source
    } else {
        "/etc/"
    };
    let mut chain = mounted(&place);
    let copy = format!(
        "rsync -aHAXS --numeric-ids {source} {}/copy/",
        place.dir.display()
    );
    chain.sh(&copy).unwrap();
    assert!(chain.count("flushes") > 0);
    assert!(chain.end().success());
    place.assert_nothing_remains("after the first session");
    place.fsck();

    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    mount(&mut chain, &place);
    let compare = format!("{copy} --checksum --dry-run --itemize-changes --delete");
    assert_eq!(chain.sh(&compare).unwrap(), "");
    assert!(chain.end().success());
    place.assert_nothing_remains("after the second session");
    place.fsck();
}

#[test]
fn five_tebibytes_are_made_with_at_most_70_mib_written() {
    if !can_attach() {
        return;
    }
    let place = Place::new(5 << 20);
    let mut chain = mounted(&place);
    let written = chain.count("written_bytes");
    assert!(chain.end().success());
    assert!(written <= 70 << 20, "{written} bytes written");
}

#[test]
fn the_loop_device_has_direct_io_and_blocks_of_4096_bytes() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    let device = chain.attach().unwrap();
    let name = device.trim_start_matches("/dev/");
    let show = |what: &str| {
        let value = fs::read_to_string(format!("/sys/block/{name}/{what}")).unwrap();
        value.trim().to_owned()
    };
    assert_eq!(show("loop/dio"), "1");
    assert_eq!(show("loop/autoclear"), "1");
    assert_eq!(show("queue/logical_block_size"), "4096");
    assert_eq!(show("queue/read_ahead_kb"), "4096");
    assert_eq!(show("queue/max_sectors_kb"), "512");
    assert_eq!(show("ro"), "0");
    assert!(chain.end().success());
    place.assert_nothing_remains("without a mount");
}

#[test]
fn fsync_in_the_file_system_flushes_the_device() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = mounted(&place);
    let file = place.dir.join("file");
    for _ in 0..3 {
        let before = chain.count("flushes");
        let write = format!(
            "dd if=/dev/zero of={} bs=4k count=1 conv=fsync",
            file.display()
        );
        chain.sh(&write).unwrap();
        assert!(chain.count("flushes") > before);
    }
    assert!(chain.end().success());
}

#[test]
fn discards_change_nothing_and_zeroed_ranges_read_as_zeros_on_a_device_full_of_noise() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let noise = vec![0xa5_u8; 1 << 20];
    let image = fs::File::options().write(true).open(&place.image).unwrap();
    let mut at = 0;
    while at < place.len_bytes {
        let end = usize::try_from((place.len_bytes - at).min(1 << 20)).unwrap();
        image.write_all_at(&noise[..end], at).unwrap();
        at += end as u64;
    }
    let mut chain = mounted(&place);
    let dir = place.dir.display();
    // Preallocated, then written in the middle: ext4 zeroes the rest by itself, or by a request to the
    // device.
    let script = format!(
        "cd {dir} && for i in 1 2 3 4 5 6 7 8; do fallocate -l 1M f$i && \
         printf x | dd of=f$i bs=1 seek=$((i * 100000)) conv=notrunc,fsync; done && \
         fallocate -p -o 8192 -l 65536 f1 && fallocate -z -o 300000 -l 100000 f2"
    );
    chain.sh(&script).unwrap();
    // Kernels differ in whether it succeeds. It must have no effect.
    let _ = chain.sh(&format!("fstrim {dir}"));
    assert!(chain.end().success());
    place.fsck();

    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    let device = chain.attach().unwrap();
    let before = fs::read(&place.image).unwrap();
    let _ = chain.sh(&format!("blkdiscard {device}"));
    assert!(
        fs::read(&place.image).unwrap() == before,
        "a discard changed the device"
    );
    mount(&mut chain, &place);
    for i in 1..=8 {
        let other = format!("tr -d '\\0' < {dir}/f{i} | od -An -c");
        assert_eq!(chain.sh(&other).unwrap().trim(), "x", "file f{i}");
    }
    assert!(chain.end().success());
}

#[test]
fn a_failing_device_gives_errors_never_zeros_and_flushes_stay_on() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    let device = chain.attach().unwrap();
    for broken in ["fail", "panic"] {
        chain.ask_volume(broken).unwrap();
        for dd in [
            format!("dd if={device} of=/dev/null bs=1M count=1 iflag=direct"),
            format!("dd if={device} of=/dev/null bs=4k count=1 skip=1000"),
            format!("dd if=/dev/zero of={device} bs=4k count=1 oflag=direct"),
            // Twice: if the first one let ENOSYS through, the second would succeed.
            format!("blockdev --flushbufs {device}; sync {device}"),
            format!("sync {device}"),
        ] {
            let refused = chain.sh(&dd).unwrap_err();
            assert!(refused.contains("Input/output error"), "{dd}: {refused}");
        }
    }
    drop(chain);
    place.assert_nothing_remains("after the failing device");
}

#[test]
fn slow_reads_delay_neither_each_other_nor_fast_ones() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    let device = chain.attach().unwrap();
    chain.ask_volume("slow 0 16777216 3000").unwrap();
    let dd = format!("dd if={device} of=/dev/null bs=4k count=1 iflag=direct status=none");
    let begun = Instant::now();
    let script = format!(
        "for i in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do {dd} skip=$i & done; sleep 0.1; \
         {dd} skip=8192; cut -d' ' -f1 /proc/uptime; wait; cut -d' ' -f1 /proc/uptime"
    );
    let said = chain.sh(&script).unwrap();
    let took = begun.elapsed();
    let times: Vec<f64> = said
        .split("; ")
        .map(|t| t.trim().parse().unwrap())
        .collect();
    assert!(
        times[1] - times[0] > 0.1,
        "the fast read came after the slow ones: {said}"
    );
    assert!(
        took < Duration::from_secs(24),
        "16 reads of 3 s took {took:?}"
    );
    assert!(chain.end().success());
}

#[test]
fn a_read_is_answered_while_more_writes_wait_than_there_are_threads() {
    if !can_attach() {
        return;
    }
    let place = Place::new(2048);
    let mut chain = mounted(&place);
    let dir = place.dir.display();
    let device = chain.sh(&format!("findmnt -no SOURCE {dir}")).unwrap();
    chain.ask_volume("slow-writes 20000").unwrap();
    // The writers' output is closed, so that a reader of the output does not wait for the shell.
    let load = format!(
        "for i in 1 2 3 4; do head -c 100000000 /dev/zero > {dir}/f$i & done; wait; sync {dir}/f1"
    );
    chain.sh(&format!("({load}) > /dev/null 2>&1 &")).unwrap();
    let begun = Instant::now();
    while chain.count("writing_max") < 16 {
        assert!(begun.elapsed() < LIMIT, "no load");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    for block in [100_000, 200_000, 300_000] {
        let dd = "dd of=/dev/null bs=4k count=1 iflag=direct status=none";
        chain.sh(&format!("{dd} if={device} skip={block}")).unwrap();
    }
    let took = begun.elapsed();
    // Each write takes 20 s.
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(chain.count("writing_max"), 16);
    drop(chain);
    place.assert_nothing_remains("with writes waiting");
}

#[test]
fn a_read_only_mount_replays_a_dirty_journal_into_the_overlay_only() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = mounted(&place);
    let dir = place.dir.display().to_string();
    chain
        .sh(&format!(
            "echo precious > {dir}/file && sync {dir}/file {dir}"
        ))
        .unwrap();
    // It dies when the journal is committed but not written back.
    chain.volume.kill().unwrap();
    chain.volume.wait().unwrap();
    drop(chain);
    place.assert_nothing_remains("after the kill");
    let header = run("dumpe2fs", &["-h", place.image.to_str().unwrap()]);
    assert!(header.contains("needs_recovery"), "the journal isn't dirty");
    let before = fs::read(&place.image).unwrap();

    let options = ChainOptions {
        overlay: true,
        ..ChainOptions::default()
    };
    let mut chain = Chain::start(&place.image, &options);
    chain.attach().unwrap();
    chain.ask_worker(&format!("mount-ro {dir}")).unwrap();
    assert_eq!(chain.sh(&format!("cat {dir}/file")).unwrap(), "precious");
    assert!(chain.sh(&format!("touch {dir}/new")).is_err());
    assert!(chain.count("writes") > 0, "nothing was replayed");
    assert!(chain.end().success());
    assert!(
        fs::read(&place.image).unwrap() == before,
        "the image was written to"
    );
}

/// Most of what it writes there is holes, so none of it is on the disk before.
#[test]
fn the_journal_of_a_large_file_system_fits_into_half_a_reserve() {
    if !can_attach() {
        return;
    }
    for gibibytes in [1, 2, 20, 300] {
        let place = Place::new(gibibytes << 10);
        sprat_attach::make_file_system(&place.image, &MkfsOptions::default()).unwrap();
        let header = run("dumpe2fs", &["-h", place.image.to_str().unwrap()]);
        let size = header.lines().find_map(|line| {
            let size = line.strip_prefix("Total journal size:")?;
            size.trim().strip_suffix('M')?.parse::<u32>().ok()
        });
        assert!(size.is_some_and(|mib| mib <= 32), "{gibibytes}: {size:?}");
    }
}

#[test]
fn a_new_file_system_has_only_features_that_old_systems_support() {
    if !can_attach() {
        return;
    }
    let place = Place::new(600);
    let chain = mounted(&place);
    assert!(chain.end().success());
    let header = run("dumpe2fs", &["-h", place.image.to_str().unwrap()]);
    let value = |name: &str| {
        let line = header.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].trim().to_owned()
    };
    assert_eq!(value("Filesystem volume name:"), "test");
    assert_eq!(value("Reserved block count:"), "0");
    assert_eq!(value("Block size:"), "4096");
    assert_eq!(value("Inode size:"), "256");
    let mut features: Vec<String> = value("Filesystem features:")
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    features.sort();
    let known = [
        "64bit",
        "dir_index",
        "dir_nlink",
        "ext_attr",
        "extent",
        "extra_isize",
        "filetype",
        "flex_bg",
        "has_journal",
        "huge_file",
        "large_file",
        "metadata_csum",
        "resize_inode",
        "sparse_super",
    ];
    assert_eq!(features, known);
}

#[test]
fn the_mount_options_are_those_that_make_a_crash_safe() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = mounted(&place);
    let options = chain
        .sh(&format!("grep {} /proc/mounts", place.dir.display()))
        .unwrap();
    for option in [
        "rw,noatime",
        "nodelalloc",
        "noinit_itable",
        "inode_readahead_blks=256",
    ] {
        assert!(options.contains(option), "{option} not in {options}");
    }
    assert!(chain.end().success());
}

#[test]
fn in_a_mount_to_browse_devices_and_set_uid_bits_have_no_effect() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = mounted(&place);
    let dir = place.dir.display();
    let script = format!("cd {dir} && mknod null c 1 3 && cp /usr/bin/id . && chmod 4755 id");
    chain.sh(&script).unwrap();
    chain.sh(&format!("echo x > {dir}/null")).unwrap();
    assert!(chain.end().success());
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain.ask_worker(&format!("mount-browse {dir}")).unwrap();
    let options = chain.sh(&format!("grep {dir} /proc/mounts")).unwrap();
    for option in ["nosuid", "nodev"] {
        assert!(options.contains(option), "{option} not in {options}");
    }
    let refused = chain.sh(&format!("echo x > {dir}/null")).unwrap_err();
    assert!(refused.contains("Permission denied"), "{refused}");
    // Both exist all the same, and can be copied.
    let listed = chain.sh(&format!("stat -c %F:%a {dir}/null {dir}/id"));
    let listed = listed.unwrap();
    assert!(listed.contains("character special file"), "{listed}");
    assert!(listed.contains(":4755"), "{listed}");
    assert!(chain.end().success());
}

/// A foreign image, mounted by the user.
#[test]
fn a_foreign_ext4_on_a_loop_device_is_not_unmounted() {
    if !can_attach() {
        return;
    }
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).output();
        }
    }
    let place = Place::new(64);
    run("mkfs.ext4", &["-q", place.image.to_str().unwrap()]);
    let (image, dir) = (place.image.to_str().unwrap(), place.dir.to_str().unwrap());
    run("mount", &["-o", "loop", image, dir]);
    let mounted = Mounted(place.dir.clone());
    let state = || sprat_attach::mount_state(&place.dir).unwrap();
    assert_eq!(state(), MountState::NotMounted);
    assert_eq!(sprat_attach::volume_id(&place.dir).unwrap(), None);
    for unmounted in [
        sprat_attach::unmount_at(&place.dir),
        sprat_attach::unmount_only(&place.dir),
        sprat_attach::unmount_dead(&place.dir),
    ] {
        let refused = unmounted.unwrap_err();
        assert!(
            matches!(refused, AttachError::NotMounted { .. }),
            "{refused:?}"
        );
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(mounts.contains(dir), "it was unmounted");
    drop(mounted);
    place.assert_nothing_remains("after the foreign mount");
}

#[test]
fn mounting_garbage_or_on_a_used_mount_point_is_refused() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    let empty = chain.ask_worker(&format!("mount {}", place.dir.display()));
    assert!(empty.unwrap_err().contains("no ext4 file system"));
    chain.ask_worker("mkfs test").unwrap();
    let taken = chain.ask_worker("mount /proc").unwrap_err();
    assert!(taken.contains("/proc: in use (EBUSY)"), "{taken}");
    let missing = chain.ask_worker("mount /no/such/folder").unwrap_err();
    assert!(missing.contains("isn't a folder"), "{missing}");
    mount(&mut chain, &place);
    assert!(chain.end().success());
    place.assert_nothing_remains("after refusals");
}

/// As for browsing: the worker leaves the mount in its caller's namespace and ends.
fn left_mounted(place: &Place) -> Chain {
    let options = ChainOptions {
        private: false,
        ..ChainOptions::default()
    };
    let mut chain = Chain::start(&place.image, &options);
    chain.attach().unwrap();
    chain.ask_worker("mkfs test").unwrap();
    mount(&mut chain, place);
    chain.ask_worker("leave").unwrap();
    chain
}

#[test]
fn a_mount_left_in_the_callers_namespace_lives_until_it_is_unmounted() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let state = |place: &Place| sprat_attach::mount_state(&place.dir).unwrap();
    assert_eq!(state(&place), MountState::NotMounted);
    let mut chain = left_mounted(&place);
    chain.worker.kill().unwrap();
    chain.worker.wait().unwrap();
    assert_eq!(state(&place), MountState::Alive);
    fs::write(place.dir.join("file"), "hello").unwrap();

    let user = fs::File::open(place.dir.join("file")).unwrap();
    let busy = sprat_attach::unmount_at(&place.dir).unwrap_err();
    let AttachError::Busy { users, .. } = &busy else {
        panic!("{busy:?}")
    };
    let us = format!("({})", std::process::id());
    assert!(users.iter().any(|user| user.ends_with(&us)), "{busy}");
    drop(user);

    sprat_attach::unmount_at(&place.dir).unwrap();
    assert!(wait(&mut chain.volume).success());
    assert_eq!(state(&place), MountState::NotMounted);
    let again = sprat_attach::unmount_at(&place.dir).unwrap_err();
    assert!(matches!(again, AttachError::NotMounted { .. }), "{again:?}");
    place.assert_nothing_remains("after the unmount");
    place.fsck();
}

#[test]
fn a_mount_without_volume_process_is_dead_and_detached_even_in_use() {
    if !can_attach() {
        return;
    }
    let place = Place::new(64);
    let mut chain = left_mounted(&place);
    fs::write(place.dir.join("file"), "hello").unwrap();
    let user = fs::File::open(place.dir.join("file")).unwrap();
    chain.volume.kill().unwrap();
    chain.volume.wait().unwrap();
    chain.worker.kill().unwrap();
    chain.worker.wait().unwrap();
    assert_eq!(
        sprat_attach::mount_state(&place.dir).unwrap(),
        MountState::Dead
    );
    let findings = sprat_attach::check_host();
    let hint = format!("sprat umount {}", place.dir.display());
    assert!(
        findings.iter().any(|f| f.hint.as_ref() == Some(&hint)),
        "{findings:#?}"
    );
    assert!(sprat_attach::unmount_at(&place.dir).is_err());
    sprat_attach::unmount_dead(&place.dir).unwrap();
    assert_eq!(
        sprat_attach::mount_state(&place.dir).unwrap(),
        MountState::NotMounted
    );
    drop(user);
    place.assert_nothing_remains("after the dead mount was taken away");
}

#[test]
fn this_machine_passes_the_checks_and_nothing_is_left_behind() {
    if !can_attach() {
        return;
    }
    let findings = sprat_attach::check_host();
    let missing: Vec<_> = findings
        .iter()
        .filter(|f| f.severity == sprat_attach::Severity::Missing)
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
    for what in [
        "kernel",
        "root",
        "fuse",
        "loop",
        "mkfs.ext4",
        "namespaces",
        "io flusher",
    ] {
        assert!(
            findings.iter().any(|f| f.what == what),
            "{what} is not checked"
        );
    }
    // Another test on this machine may be checking it right now.
    leftovers::assert_gone(|| {
        let held = Command::new("losetup").arg("-a").output().unwrap();
        let held = String::from_utf8_lossy(&held.stdout).into_owned();
        let left = held.lines().filter(|line| line.contains("sprat-doctor"));
        left.map(str::to_owned).collect()
    });
}
