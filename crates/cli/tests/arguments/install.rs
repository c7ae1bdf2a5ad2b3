//! The install script of the archive, which the packages and `make install` use, too.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every file and folder below, with a folder's name ending in `/`.
fn names(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if path.is_dir() {
                found.push(format!("{name}/"));
                walk(&path, root, found);
            } else {
                found.push(name);
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, folder, &mut found);
    found.sort();
    found
}

/// A tree as `scripts/stage` makes it, with little in it.
fn staged(folder: &Path) -> PathBuf {
    let tree = folder.join("staged");
    for (file, content) in [
        ("bin/sprat", "a program"),
        ("share/sprat/exclude/home.txt", "/home/*/.cache"),
        ("share/doc/sprat/README.md", "a page"),
    ] {
        let path = tree.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let units = tree.join("lib/systemd/system");
    fs::create_dir_all(&units).unwrap();
    for unit in fs::read_dir(repository().join("contrib/systemd")).unwrap() {
        let unit = unit.unwrap();
        fs::copy(unit.path(), units.join(unit.file_name())).unwrap();
    }
    fs::copy(
        repository().join("dist/install.sh"),
        tree.join("install.sh"),
    )
    .unwrap();
    tree
}

fn run(tree: &Path, root: &Path, arguments: &[&str]) {
    let mut install = Command::new(tree.join("install.sh"));
    install.env("DESTDIR", root).env("PREFIX", "/opt/tools");
    let output = install.args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn install_script_removes_exactly_what_it_installed() {
    let folder = tempfile::tempdir().unwrap();
    let (tree, root) = (staged(folder.path()), folder.path().join("root"));
    // What others have there, and what a user of sprat has.
    for file in [
        "opt/tools/bin/other",
        "opt/tools/share/doc/other/README",
        "etc/sprat/keys/nas.key",
    ] {
        fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        fs::write(root.join(file), "mine").unwrap();
    }
    run(&tree, &root, &[]);
    let mode = |file: &str| root.join(file).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode("opt/tools/bin/sprat"), 0o755);
    assert_eq!(mode("opt/tools/share/sprat/exclude/home.txt"), 0o644);
    let units = root.join("opt/tools/lib/systemd/system");
    let service = fs::read_to_string(units.join("sprat.service")).unwrap();
    assert!(
        service.contains("ExecStart=/opt/tools/bin/sprat run"),
        "{service}"
    );
    assert_eq!(fs::read_dir(&units).unwrap().count(), 4);

    run(&tree, &root, &["--uninstall"]);
    let files: Vec<_> = names(&root)
        .into_iter()
        .filter(|name| !name.ends_with('/'))
        .collect();
    let kept = [
        "etc/sprat/keys/nas.key",
        "opt/tools/bin/other",
        "opt/tools/share/doc/other/README",
    ];
    assert_eq!(files, kept);
    assert!(!root.join("opt/tools/share/sprat").exists());
    assert!(!root.join("opt/tools/share/doc/sprat").exists());
}

#[test]
fn install_script_makes_the_folder_of_the_keys_for_its_owner_only() {
    let folder = tempfile::tempdir().unwrap();
    let (tree, root) = (staged(folder.path()), folder.path().join("root"));
    run(&tree, &root, &[]);
    let mode = root
        .join("etc/sprat")
        .metadata()
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o700);
    let mut wrong = Command::new(tree.join("install.sh"));
    wrong.env("DESTDIR", &root).env("PREFIX", "relative");
    assert_eq!(wrong.output().unwrap().status.code(), Some(2));
}
