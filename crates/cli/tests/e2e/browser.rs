//! A page as Chromium shows it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use sprat_testkit::machine::TestMachine;
use sprat_testkit::needs;

fn run(machine: &TestMachine, page: &Path, options: &[&str], what: &str) -> Output {
    let browser = needs::find_program("chromium").unwrap();
    let shown = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
        ])
        .args(options)
        .arg(format!(
            "--user-data-dir={}",
            machine.path("browser").display()
        ))
        .arg(what)
        .arg(format!("file://{}", page.display()))
        .env("HOME", machine.path("home"))
        .output()
        .unwrap();
    assert!(shown.status.success(), "{shown:?}");
    shown
}

/// What the page looks like: width, height, and brightness by row and column.
pub fn rendered(machine: &TestMachine, page: &Path, options: &[&str]) -> (usize, usize, Vec<u8>) {
    let picture = machine.path("page.png");
    let shoot = format!("--screenshot={}", picture.display());
    let shown = run(machine, page, options, &shoot);
    assert!(picture.exists(), "{shown:?}");
    let file = std::io::BufReader::new(fs::File::open(picture).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    let bytes = info.color_type.samples();
    let grey = pixels
        .chunks(bytes)
        .map(|pixel| pixel[usize::from(bytes > 2)]);
    (info.width as usize, info.height as usize, grey.collect())
}

/// The page's elements, as the browser has read them.
pub fn elements(machine: &TestMachine, page: &Path) -> String {
    let shown = run(machine, page, &[], "--dump-dom");
    String::from_utf8(shown.stdout).unwrap()
}
