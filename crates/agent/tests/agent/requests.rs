//! Which requests are carried out, and which ones are refused whatever lies on the disk.

use std::fs;
use std::os::unix::fs::symlink;

use crate::client::{CREATE_NEW, EAGER, READ, READ_WRITE, Served, blocks};

const NO_SUCH_FILE: u32 = 2;
const DENIED: u32 = 3;
const FAILURE: u32 = 4;
const UNSUPPORTED: u32 = 8;

fn string(text: &str) -> Vec<u8> {
    [
        &u32::try_from(text.len()).unwrap().to_be_bytes()[..],
        text.as_bytes(),
    ]
    .concat()
}

#[test]
fn a_container_is_never_removed_renamed_replaced_or_made_shorter() {
    let content = blocks(4, 1);
    let served = Served::with_container(EAGER, &content);
    let mut client = served.connect();
    assert_eq!(client.path_request(13, "x.luks"), DENIED);
    for to in [
        "y.luks",
        "x.luks.new",
        "x.luks.trim-0123456789abcdef",
        "x.luks",
    ] {
        assert_ne!(client.rename("x.luks", to), 0, "{to}");
    }
    let half = client
        .open("x.luks.new-0123456789abcdef", CREATE_NEW)
        .unwrap();
    let trim = client
        .open("x.luks.trim-0123456789abcdef", CREATE_NEW)
        .unwrap();
    for from in [
        "x.luks.new-0123456789abcdef",
        "x.luks.trim-0123456789abcdef",
    ] {
        assert_ne!(client.rename(from, "x.luks"), 0, "{from}");
    }
    // TRUNC, APPEND, CREAT without EXCL.
    for flags in [0x13, 0x1b, 0x1a, 0x07, 0x0b, 0x0a, 0x3b, 0x02] {
        assert_eq!(client.open("x.luks", flags), Err(DENIED), "{flags:#x}");
    }
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    for len in [0, 1, content.len() as u64 - 1] {
        assert_eq!(client.set_len(&handle, len), DENIED, "{len}");
    }
    assert_eq!(client.set_len(&handle, 1 << 60), DENIED);
    // SETSTAT, MKDIR, RMDIR, SYMLINK; FSETSTAT of the mode; a hard link; a copy.
    assert_eq!(
        client.status(9, &[&string("x.luks")[..], &[0, 0, 0, 1], &[0; 8]].concat()),
        DENIED
    );
    for kind in [14, 15] {
        assert_eq!(
            client.status(kind, &[&string("a")[..], &[0; 4]].concat()),
            DENIED
        );
    }
    assert_eq!(
        client.status(20, &[string("/etc/passwd"), string("y.luks")].concat()),
        DENIED
    );
    let mode = [&[0, 0, 0, 4][..], &handle, &[0, 0, 0, 4], &[0, 0, 1, 255]].concat();
    assert_eq!(client.status(10, &mode), DENIED);
    assert_eq!(
        client.extended("hardlink@openssh.com", &[b"x.luks", b"y.luks"]),
        UNSUPPORTED
    );
    assert_eq!(
        client.extended("copy-data", &[&handle, &handle]),
        UNSUPPORTED
    );
    // Outside of the present length.
    for offset in [
        content.len() as u64 - 1,
        content.len() as u64,
        1 << 62,
        u64::MAX - 1,
        u64::MAX,
    ] {
        assert_eq!(client.write(&handle, offset, b"xy"), DENIED, "{offset}");
    }
    assert_eq!(client.write(&half, u64::MAX, b"xy"), DENIED);
    client.close(&trim);
    client.end();
    assert_eq!(served.live(), content);
    assert!(!served.path("y.luks").exists());
}

#[test]
fn names_that_are_not_the_clients_do_not_exist() {
    let served = Served::with_container(EAGER, &blocks(1, 1));
    fs::write(served.path("authorized_keys"), "x").unwrap();
    fs::write(served.path("secret.txt"), "x").unwrap();
    let mut client = served.connect();
    let long = format!("{}.luks", "x".repeat(300));
    for path in [
        "authorized_keys",
        "secret.txt",
        "../x.luks",
        "/etc/passwd",
        ".sprat-agent/format",
        ".sprat-agent",
        ".sprat-agent/x.luks/g.1/head",
        ".generations/../secret.txt",
        ".generations/x.luks/../../secret.txt",
        "x.luks.lock.99999999999999999999999",
        ".luks",
        "x.luks\0",
        &long,
    ] {
        for flags in [READ, READ_WRITE, CREATE_NEW] {
            client.open(path, flags).unwrap_err();
        }
        for kind in [7, 11, 13, 16, 17] {
            assert_ne!(client.path_request(kind, path), 0, "{path}, request {kind}");
        }
        assert_ne!(client.rename("x.luks.new", path), 0, "{path}");
    }
    assert_eq!(client.list("."), [".generations", "x.luks"]);
    let full = served.path("x.luks");
    assert_eq!(client.path_request(17, full.to_str().unwrap()), 0);
    client.end();
}

#[test]
fn what_is_no_plain_file_is_not_opened_and_does_not_block() {
    let served = Served::new(EAGER);
    fs::write(served.path("secret.txt"), "x").unwrap();
    symlink(served.path("secret.txt"), served.path("link.luks")).unwrap();
    fs::hard_link(served.path("secret.txt"), served.path("hard.luks")).unwrap();
    fs::create_dir(served.path("dir.luks")).unwrap();
    rustix_mkfifo(&served.path("fifo.luks"));
    let mut client = served.connect();
    for name in ["link.luks", "hard.luks", "dir.luks", "fifo.luks"] {
        for flags in [READ, READ_WRITE, CREATE_NEW] {
            client.open(name, flags).unwrap_err();
        }
        assert_ne!(client.path_request(17, name), 0, "{name}");
    }
    assert_eq!(client.list("/"), [".generations"]);
    client.end();
}

fn rustix_mkfifo(path: &std::path::Path) {
    let made = std::process::Command::new("mkfifo")
        .arg(path)
        .status()
        .unwrap();
    assert!(made.success());
}

#[test]
fn leases_are_numbered_in_order_and_the_highest_stays() {
    let served = Served::with_container(EAGER, &blocks(1, 1));
    let mut client = served.connect();
    let lease = |number: u64| format!("x.luks.lock.{number}");
    for number in [2, 7, 1_000_000, 1_000_002, 99_999_999] {
        assert_eq!(
            client.open(&lease(number), CREATE_NEW),
            Err(DENIED),
            "{number}"
        );
    }
    let first = client.open(&lease(1_000_001), CREATE_NEW).unwrap();
    assert_eq!(client.write(&first, 0, &[7; 4096]), 0);
    assert_eq!(client.write(&first, 4095, &[7; 2]), DENIED);
    assert_eq!(client.open(&lease(1_000_001), CREATE_NEW), Err(FAILURE));
    assert_eq!(client.open(&lease(1_000_003), CREATE_NEW), Err(DENIED));
    client.open(&lease(1_000_002), CREATE_NEW).unwrap();
    assert_eq!(client.path_request(13, &lease(1_000_002)), DENIED);
    assert_eq!(client.path_request(13, &lease(1_000_001)), 0);
    client.end();
}

#[test]
fn handles_names_and_lengths_are_bounded() {
    let served = Served::with_container(EAGER, &blocks(200, 1));
    let mut client = served.connect();
    let handle = client.open("x.luks", READ).unwrap();
    assert_eq!(client.read(&handle, 0, u32::MAX).unwrap().len(), 255 * 1024);
    assert_eq!(client.read(&handle, 1 << 63, 10), Err(FAILURE));
    assert_eq!(client.read(&handle, 1 << 40, 10), Err(1));
    assert_eq!(client.write(&handle, 0, b"x"), DENIED);
    for wrong in [
        &b""[..],
        b"\0\0\0",
        b"\0\0\0\xff",
        b"\0\0\0\0\0\0\0\0",
        &[1; 300],
    ] {
        assert_ne!(client.close(wrong), 0);
        client.read(wrong, 0, 1).unwrap_err();
    }
    let open = (0..1000)
        .filter(|_| client.open("x.luks", READ).is_ok())
        .count();
    assert_eq!(open, 255);
    client.end();

    let mut client = served.connect();
    let mut made = 0;
    for number in 0..100 {
        made += u32::from(
            client
                .open(&format!("x.luks.copying-{number:016x}"), CREATE_NEW)
                .is_ok(),
        );
    }
    assert_eq!(made, 63);
    client.end();
    // No packet is longer than 256 KiB.
    let mut client = served.connect();
    client.send_raw(&[0x40, 0, 0, 0, 3]);
    assert_eq!(client.receive(), None);
    client.end_anyhow();
    // Bytes that mean nothing.
    let mut client = served.connect();
    for (kind, body) in [
        (3, vec![0xff; 40]),
        (5, vec![]),
        (6, vec![0, 0, 0, 9]),
        (77, vec![1, 2, 3]),
        (200, vec![0; 4]),
    ] {
        assert_ne!(client.status(kind, &body), 0);
    }
    client.end();
}

#[test]
fn past_states_are_read_only() {
    let served = Served::with_container(EAGER, &blocks(8, 1));
    served.overwrite(&[(0, vec![9; 4096])]);
    let past = served.past_path(1);
    let mut client = served.connect();
    for flags in [READ_WRITE, CREATE_NEW] {
        assert_eq!(client.open(&past, flags), Err(DENIED));
    }
    let handle = client.open(&past, READ).unwrap();
    assert_eq!(client.write(&handle, 0, b"x"), DENIED);
    assert_eq!(client.set_len(&handle, 1 << 20), DENIED);
    assert_eq!(client.path_request(13, &past), DENIED);
    assert_eq!(client.rename("x.luks.new", &past), DENIED);
    assert_eq!(
        client.open(".generations/x.luks/none.luks", READ),
        Err(NO_SUCH_FILE)
    );
    assert_eq!(client.list(".generations"), ["x.luks"]);
    client.end();
}

/// A handle of the half-made file is still open when the file becomes the container.
#[test]
fn a_handle_from_before_the_birth_of_a_container_is_kept_like_any_other() {
    let served = Served::new(EAGER);
    let (mut one, mut other) = (served.connect(), served.connect());
    let name = "x.luks.new-0123456789abcdef";
    let made = one.open(name, CREATE_NEW).unwrap();
    assert_eq!(one.set_len(&made, 8 * 4096), 0);
    assert_eq!(one.set_len(&made, 4096), DENIED);
    let content = blocks(8, 3);
    assert_eq!(one.write(&made, 0, &content), 0);
    let late = other.open(name, READ_WRITE).unwrap();
    assert_eq!(one.rename(name, "x.luks"), 0);
    one.close(&made);
    one.end();
    // Both a write and a shortening through the old handle.
    assert_eq!(other.set_len(&late, 4096), DENIED);
    assert_eq!(other.write(&late, 4096, &[1; 4096]), 0);
    other.end();
    assert_eq!(served.past(1), content);
    assert_eq!(served.live()[4096..8192], [1; 4096]);
}

#[test]
fn a_read_only_connection_changes_nothing() {
    let served = Served::with_container(EAGER, &blocks(2, 1));
    let mut client = crate::client::Client::start(served.command(&["serve", "--read-only"]));
    assert_eq!(client.open("x.luks", READ_WRITE), Err(DENIED));
    assert_eq!(client.open("x.luks.lock.1000001", CREATE_NEW), Err(DENIED));
    assert_eq!(client.content("x.luks").unwrap(), served.live());
    client.end();
}

#[test]
fn a_folder_that_is_not_adopted_is_not_served() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new(crate::client::agent());
    let output = command
        .args(["serve", "--root"])
        .arg(folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("sprat-agent adopt --root"),
        "{output:?}"
    );
    let mut command = std::process::Command::new(crate::client::agent());
    command
        .env("SSH_ORIGINAL_COMMAND", "sh -c id")
        .args(["serve", "--root"])
        .arg(folder.path());
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
}
