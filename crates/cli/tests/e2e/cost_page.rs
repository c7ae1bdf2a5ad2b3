//! The page of `sprat analyze --html`, as a browser shows it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

use crate::browser;

const LIGHT: [&str; 2] = [
    "--window-size=1000,1400",
    "--blink-settings=preferredColorScheme=1",
];
const DARK: [&str; 2] = [
    "--window-size=1000,1400",
    "--blink-settings=preferredColorScheme=0",
];

#[test]
fn page_shows_hostile_names_as_text_in_light_and_dark() {
    requires!(needs::root(), needs::program("chromium"));
    let machine = TestMachine::with_container();
    let big = "x".repeat(100 << 10);
    let script = "<script>document.title='taken'</script>";
    for name in [
        "tree/quotes/\"onmouseover='1'.txt".to_owned(),
        format!("tree/{script}/file"),
        "tree/<img src=x onerror=\"document.title='taken'\">/file".to_owned(),
        "tree/plain".to_owned(),
    ] {
        machine.write(&name, &big);
    }
    let odd = OsStr::from_bytes(b"odd\n\xe9");
    fs::rename(machine.path("tree/plain"), machine.path("tree").join(odd)).unwrap();
    for content in ["one", "two, longer"] {
        machine.write("tree/changed", content);
        machine.ok(&["backup", CONTAINER, "--name", "home", "tree", "-q"]);
    }
    let page = machine.path("cost.html");
    machine.ok(&["analyze", CONTAINER, "home/latest", "--html", "cost.html"]);
    assert_eq!(fs::metadata(&page).unwrap().mode() & 0o777, 0o600);

    let shown = browser::elements(&machine, &page);
    assert!(
        !shown.contains("<script") && !shown.contains("<img"),
        "{shown}"
    );
    assert!(shown.contains("<title>Cost of snapshots: "), "{shown}");
    let escaped = script.replace('<', "&lt;").replace('>', "&gt;");
    for name in [
        &*escaped,
        "onmouseover='1'.txt</th>",
        "odd\\#012\\#351",
        "Growth",
        "Most often changed",
    ] {
        assert!(shown.contains(name), "{name}: {shown}");
    }
    assert_eq!(shown.matches("<polyline").count(), 1);
    // Each folder that is drawn is a link to a row that is there.
    let links: Vec<&str> = shown.split("href=\"#").skip(1).collect();
    assert!(links.len() >= 4, "{shown}");
    for link in links {
        let id = link.split('"').next().unwrap();
        assert!(shown.contains(&format!("id=\"{id}\"")), "{id}");
    }

    let brightness = |options: &[&str]| {
        let (_, _, grey) = browser::rendered(&machine, &page, options);
        grey.iter().map(|one| u64::from(*one)).sum::<u64>() / grey.len() as u64
    };
    let (light, dark) = (brightness(&LIGHT), brightness(&DARK));
    assert!(light > 180 && dark < 80, "light {light}, dark {dark}");

    // No file is overwritten, and none is left by a command that failed.
    let again = machine.sprat(&["analyze", CONTAINER, "--html", "cost.html"]);
    assert!(again.failed_with(2).contains("exists already"));
    let failed = ["analyze", CONTAINER, "home/2020", "--html", "other.html"];
    machine.sprat(&failed).failed_with(1);
    assert!(!machine.path("other.html").exists());
    machine.nothing_is_left();
}
