//! The recovery sheet's page as a browser shows it: its QR code is the key.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

use crate::browser;

fn decoded(machine: &TestMachine, page: &Path) -> Vec<String> {
    let (width, height, grey) = browser::rendered(machine, page, &["--window-size=900,1300"]);
    let mut image =
        rqrr::PreparedImage::prepare_from_greyscale(width, height, |x, y| grey[y * width + x]);
    let grids = image.detect_grids();
    grids.iter().map(|grid| grid.decode().unwrap().1).collect()
}

#[test]
fn the_qr_code_on_the_page_is_a_key_that_opens_the_container() {
    requires!(needs::root(), needs::program("chromium"));
    let machine = TestMachine::new();
    let page = machine.path("sheet.html");
    let recovery = machine.init(&[CONTAINER, "--size", "64M", "--html", "sheet.html"]);
    assert_eq!(fs::metadata(&page).unwrap().mode() & 0o777, 0o600);
    assert_eq!(decoded(&machine, &page), std::slice::from_ref(&recovery));
    // A new one, printed by `key add` and, from what is read off it, again by `key sheet`.
    let add = [
        "key",
        "add",
        CONTAINER,
        "--cheap-kdf-for-tests",
        "--new-recovery",
    ];
    let ran = machine.ok(&[&add[..], &["--html", "second.html"]].concat());
    assert!(!ran.whole().contains(&recovery));
    let codes = decoded(&machine, &machine.path("second.html"));
    assert_eq!(codes.len(), 1);
    assert_ne!(codes[0], recovery);
    machine.write("scanned", &codes[0]);
    machine.ok(&["key", "rehearse", CONTAINER, "--passphrase-file", "scanned"]);
    let again = [
        "key",
        "sheet",
        CONTAINER,
        "--passphrase-file",
        "scanned",
        "--html",
    ];
    machine.ok(&[&again[..], &["third.html"]].concat());
    assert_eq!(decoded(&machine, &machine.path("third.html")), codes);
    let ran = machine.sprat(&[&again[..], &["third.html"]].concat());
    assert!(ran.failed_with(2).contains("sprat overwrites no file"));
}

#[test]
fn a_sheet_without_its_secret_has_no_code_and_asks_for_nothing() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let recovery = machine.init(&[CONTAINER, "--size", "64M"]);
    let sheet = ["key", "sheet", CONTAINER, "--without-secret"];
    let ran = machine.ok(&sheet);
    assert!(ran.stdout.contains("RECOVERY KEY   ____-____") && !ran.stdout.contains(&recovery));
    machine.ok(&[&sheet[..], &["--html", "sheet.html"]].concat());
    let page = fs::read_to_string(machine.path("sheet.html")).unwrap();
    assert!(!page.contains("<svg") && !page.contains(&recovery));
    // What does not open is not printed.
    let other = sprat_luks::RecoveryKey::generate().unwrap();
    machine.write("other", other.text());
    let ran = machine.sprat(&["key", "sheet", CONTAINER, "--passphrase-file", "other"]);
    assert_eq!(ran.code, 12, "{}", ran.whole());
    assert!(!ran.whole().contains(other.text()));
}
