//! Checks that the comparison, on which the tests of the whole path rely, finds every difference.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::Path;

use rustix::fs::XattrFlags;

use super::{Manifest, assert_same};
use crate::program::system;
use crate::source_tree::{self, Shape};
use crate::tree::set_time;

/// What is done to a copy, and how.
type Damage = (&'static str, fn(&Path));

const DAMAGES: [Damage; 13] = [
    ("one byte of a small file", |root| {
        let path = root.join("odd/names/plain");
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"S", 0).unwrap();
        file.set_modified(time).unwrap();
    }),
    ("a file's last byte is gone", |root| {
        let file = root.join("middle/000/middle file 1");
        let file = fs::File::options().write(true).open(file).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    }),
    ("mode", |root| {
        fs::set_permissions(
            root.join("odd/contents/empty"),
            PermissionsExt::from_mode(0o640),
        )
        .unwrap();
    }),
    ("owner", |root| {
        chown(root.join("odd/contents/empty"), Some(3), None).unwrap();
    }),
    ("group", |root| {
        chown(root.join("odd/attributes/folder 1777"), None, Some(3)).unwrap();
    }),
    ("a nanosecond of a file's time", |root| {
        set_time(&root.join("small/000/small file 2"), 1_400_000_002, 1).unwrap();
    }),
    ("a folder's time", |root| {
        set_time(&root.join("odd"), 1, 0).unwrap();
    }),
    ("a further xattr", |root| {
        rustix::fs::setxattr(
            root.join("odd/contents/empty"),
            "user.x",
            b"y",
            XattrFlags::empty(),
        )
        .unwrap();
    }),
    ("an ACL", |root| {
        let path = root.join("odd/attributes/acl file").display().to_string();
        system("setfacl", &["-m", "u:1000:r", &path]);
    }),
    ("a hard link that became a copy", |root| {
        let (link, plain) = (root.join("odd/links/a/two"), root.join("odd/links/a/one"));
        fs::remove_file(&link).unwrap();
        system("cp", &["-a".as_ref(), plain.as_os_str(), link.as_os_str()]);
    }),
    ("a symbolic link's target", |root| {
        fs::remove_file(root.join("odd/times/link")).unwrap();
        symlink("1971", root.join("odd/times/link")).unwrap();
        set_time(&root.join("odd/times/link"), 12345, 678).unwrap();
    }),
    ("a file that should not be there", |root| {
        fs::write(root.join("odd/folders/empty/x"), "").unwrap();
    }),
    ("a missing fifo", |root| {
        fs::remove_file(root.join("odd/specials/fifo")).unwrap();
    }),
];

#[test]
fn comparison_finds_every_damage_of_a_copy() {
    crate::requires!(crate::client_and_server::missing());
    let folder = tempfile::TempDir::with_prefix("sprat-manifest-").unwrap();
    let [source, copy] = ["source", "copy"].map(|name| folder.path().join(name));
    fs::create_dir(&source).unwrap();
    let shape = Shape {
        small_files: 60,
        middle_files: 3,
        large_files: 0,
    };
    source_tree::make(&source, shape, 1);
    let should = Manifest::of(&source);
    let make_copy = || {
        let from = format!("{}/", source.display());
        let to = copy.display().to_string();
        system(
            "rsync",
            &[
                "-aHAXS",
                "--numeric-ids",
                "--modify-window=-1",
                "--delete",
                "--checksum",
                &from,
                &to,
            ],
        );
    };
    for (what, damage) in DAMAGES {
        make_copy();
        assert_same(&should, &copy, "a copy by rsync");
        damage(&copy);
        let differences = should.differences(&Manifest::of(&copy));
        assert!(!differences.is_empty(), "not found: {what}");
    }
}

#[test]
fn file_with_the_size_and_time_of_another_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["wrong", "right", "longer", "younger"] {
        fs::write(at(name), "content").unwrap();
        set_time(&at(name), 1_400_000_000, 5).unwrap();
    }
    let source = Manifest::of(folder.path());
    for (name, content, nanosecond) in [
        ("wrong", "CONTENT", 5),
        ("longer", "longer content", 5),
        ("younger", "CONTENT", 6),
    ] {
        fs::write(at(name), content).unwrap();
        set_time(&at(name), 1_400_000_000, nanosecond).unwrap();
    }
    let found = Manifest::of(folder.path());
    assert_eq!(found.mistaken_for(&source), [Path::new("wrong")]);
}
