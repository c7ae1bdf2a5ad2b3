//! Checks the house: crate edges, file heads and sizes, `unsafe`, links, and what the docs promise.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/plain_text.rs"]
mod plain_text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// "About 600 lines" with some margin, so that a fix need not begin with a move.
const FILE_LINES_MAX: usize = 700;

/// Module names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 8] = [
    "util", "utils", "common", "helper", "helpers", "manager", "misc", "shared",
];

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .expect("crates/cli lies two levels below the root")
        .to_owned()
}

/// Every file of the repository, as paths relative to its root; builds and git's own data left out.
fn files() -> Vec<PathBuf> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("the repository is readable") {
            let path = entry.expect("the repository is readable").path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if kind.is_dir() && !["target", ".git"].contains(&name.as_str()) {
                walk(&path, root, found);
            } else if kind.is_file() && name != ".git" {
                found.push(path.strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    let root = root();
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    found.sort();
    found
}

fn files_ending(suffix: &str) -> Vec<PathBuf> {
    let ends = |path: &PathBuf| path.to_string_lossy().ends_with(suffix);
    files().into_iter().filter(ends).collect()
}

fn text(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Fails with every finding at once: one run of the test shows all there is to do.
fn none(findings: &[String], rule: &str) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

/// The map in the root manifest: crate folder -> the crates it may use, in the order of the lines.
fn map() -> Vec<(String, BTreeSet<String>)> {
    let manifest = text("Cargo.toml");
    let lines = manifest
        .lines()
        .skip_while(|line| !line.starts_with("members"));
    let mut map = Vec::new();
    for line in lines.skip(1).take_while(|line| !line.starts_with(']')) {
        let (_, rest) = line.split_once("\"crates/").expect("one crate a line");
        let (name, rest) = rest.split_once('"').expect("one crate a line");
        let (_, uses) = rest
            .split_once("uses:")
            .unwrap_or_else(|| panic!("crate {name} doesn't say what it uses"));
        let uses = uses.split_whitespace().filter(|name| *name != "nothing");
        map.push((name.to_owned(), uses.map(str::to_owned).collect()));
    }
    map
}

/// Our own crates among the dependencies in `table` of a crate's manifest, by folder name.
fn own_dependencies(crate_folder: &str, table: &str) -> BTreeSet<String> {
    let manifest: toml::Table = text(format!("crates/{crate_folder}/Cargo.toml"))
        .parse()
        .expect("a crate's manifest is TOML");
    let Some(dependencies) = manifest.get(table).and_then(toml::Value::as_table) else {
        return BTreeSet::new();
    };
    let own = dependencies.keys().filter_map(|name| match name.as_str() {
        "sprat" => Some("cli"),
        name => name.strip_prefix("sprat-"),
    });
    own.map(str::to_owned).collect()
}

#[test]
fn every_crate_is_on_the_map_and_uses_only_what_the_map_says() {
    let map = map();
    let on_map: BTreeSet<_> = map.iter().map(|(name, _)| name.clone()).collect();
    let on_disk: BTreeSet<_> = files_ending("Cargo.toml")
        .iter()
        .filter_map(|path| {
            path.to_string_lossy()
                .strip_prefix("crates/")?
                .strip_suffix("/Cargo.toml")
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(on_map, on_disk, "the members list and the folders differ");

    let mut findings = Vec::new();
    for (place, (name, may_use)) in map.iter().enumerate() {
        let uses = own_dependencies(name, "dependencies");
        if uses != *may_use {
            findings.push(format!("{name} uses {uses:?}, the map says {may_use:?}"));
        }
        for used in &uses {
            let used_place = map.iter().position(|(other, _)| other == used);
            // The test kits are beside the path, not in it.
            let is_kit = |name: &str| name.starts_with("testkit");
            if !is_kit(name) && used_place.is_none_or(|used_place| used_place <= place) {
                findings.push(format!("{name} uses {used}, which isn't below it"));
            }
            if is_kit(used) && !is_kit(name) {
                findings.push(format!("{name} ships {used}"));
            }
        }
    }
    none(&findings, "crates keep to the map in Cargo.toml");
}

#[test]
fn every_rust_file_names_its_job_first_and_stays_short() {
    let mut findings = Vec::new();
    for path in files_ending(".rs") {
        let source = text(&path);
        let shown = path.display();
        let first = source.lines().next().unwrap_or_default();
        if !first.starts_with("//! ") || first.len() < 20 {
            findings.push(format!("{shown}: the first line doesn't say its job"));
        }
        let lines = source.lines().count();
        if lines > FILE_LINES_MAX {
            findings.push(format!("{shown}: {lines} lines"));
        }
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        let folder = path.parent().and_then(Path::file_name);
        let folder = folder.map(|name| name.to_string_lossy().into_owned());
        for name in [Some(stem), folder].into_iter().flatten() {
            if EMPTY_NAMES.contains(&name.as_str()) {
                findings.push(format!("{shown}: {name} names no job"));
            }
        }
    }
    none(&findings, "one job a file, said first");
}

#[test]
fn every_library_names_its_callers_its_uses_and_its_invariants() {
    let mut findings = Vec::new();
    for path in files_ending("src/lib.rs") {
        let source = text(&path);
        let head: Vec<_> = source
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect();
        for part in ["Above:", "Below:", "Always true:"] {
            if !head.iter().any(|line| line.contains(part)) {
                findings.push(format!("{}: no {part:?}", path.display()));
            }
        }
    }
    none(&findings, "a library's head names its neighbours");
}

#[test]
fn unsafe_code_lives_in_one_file() {
    let mut findings = Vec::new();
    for (name, _) in map() {
        let crate_roots = ["lib.rs", "main.rs"].map(|file| format!("crates/{name}/src/{file}"));
        for crate_root in crate_roots
            .iter()
            .filter(|path| root().join(path).is_file())
        {
            let forbids = text(crate_root).contains("#![forbid(unsafe_code)]");
            if name != "attach" && !forbids {
                findings.push(format!("{crate_root} doesn't forbid unsafe code"));
            }
        }
    }
    let word = concat!("un", "safe");
    for path in files_ending(".rs") {
        if path.ends_with("attach/src/sys.rs") {
            continue;
        }
        for (number, line) in text(&path).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let opens = ["{", " {", " fn", " impl", " extern", "(no_mangle"]
                .iter()
                .any(|next| code.contains(&format!("{word}{next}")));
            if opens {
                findings.push(format!(
                    "{}:{}: {}",
                    path.display(),
                    number + 1,
                    line.trim()
                ));
            }
        }
    }
    none(&findings, "unsafe only in attach/src/sys.rs");
}

/// Who runs a server reads the agent before trusting it: it stands alone and brings little with it.
#[test]
fn the_agent_stands_alone_with_at_most_eight_crates() {
    for table in ["dependencies", "build-dependencies"] {
        assert!(own_dependencies("agent", table).is_empty(), "{table}");
    }
    let kits: BTreeSet<String> = own_dependencies("agent", "dev-dependencies");
    let mut others = kits.iter().filter(|name| !name.starts_with("testkit"));
    assert_eq!(others.next(), None, "tests of the agent use test kits only");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments =
        "tree --locked --offline --package sprat-agent --edges normal,build --prefix none";
    let ran = std::process::Command::new(cargo)
        .args(arguments.split(' '))
        .current_dir(root())
        .output()
        .unwrap();
    let tree = String::from_utf8_lossy(&ran.stdout).into_owned();
    let crates: BTreeSet<&str> = tree
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert!(ran.status.success() && crates.contains("rustix"), "{ran:?}");
    assert!(crates.len() <= 8, "{crates:?}");
}

#[test]
fn no_test_is_switched_off() {
    let switch = concat!("#[", "ignore");
    let off = |path: &PathBuf| text(path).contains(switch);
    let findings: Vec<_> = files_ending(".rs")
        .into_iter()
        .filter(off)
        .map(|path| path.display().to_string())
        .collect();
    none(
        &findings,
        "long forms are asked for by an environment variable",
    );
}

#[test]
fn no_file_names_a_workplace_or_a_package_registry() {
    let words = [
        concat!("/work", "/main"),
        concat!("/work", "/shared"),
        concat!("/tmp", "/w/"),
        concat!("/root", "/.cargo"),
        concat!("/root", "/.rustup"),
        concat!("crates", ".io"),
        concat!("deb.", "debian.org"),
        concat!("archive.", "ubuntu.com"),
        concat!("py", "pi.org"),
        concat!("registry.", "npmjs"),
    ];
    let mut findings = Vec::new();
    for path in files() {
        // Cargo writes the lock files, and names its registry there.
        if path.file_name().is_some_and(|name| name == "Cargo.lock") {
            continue;
        }
        let Ok(source) = fs::read_to_string(root().join(&path)) else {
            continue;
        };
        for (number, line) in source.lines().enumerate() {
            for word in words.iter().filter(|word| line.contains(**word)) {
                findings.push(format!("{}:{}: {word}", path.display(), number + 1));
            }
        }
    }
    none(&findings, "what is tracked works on any machine");
}

/// The targets of a Markdown text's inline links, outside fenced blocks.
fn links(markdown: &str) -> Vec<String> {
    let mut links = Vec::new();
    let mut fenced = false;
    for line in markdown.lines() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        for part in line.split("](").skip(1) {
            links.extend(part.split(')').next().map(str::to_owned));
        }
    }
    links
}

/// The anchors that a Markdown text offers, as hosting sites make them from its headings.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let headings = markdown.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title
                .chars()
                .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn every_link_in_the_docs_leads_somewhere() {
    let mut findings = Vec::new();
    for path in files_ending(".md") {
        let source = text(&path);
        for link in links(&source) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() {
                path.clone()
            } else {
                path.parent().unwrap_or(Path::new("")).join(file)
            };
            if !root().join(&target).exists() {
                findings.push(format!("{}: {link}: no such file", path.display()));
            } else if !anchor.is_empty() && !anchors(&text(&target)).contains(anchor) {
                findings.push(format!("{}: {link}: no such heading", path.display()));
            }
        }
    }
    none(&findings, "links resolve");
}

#[test]
fn every_page_of_the_docs_is_reached_from_the_readme() {
    let readme = links(&text("README.md"));
    let findings: Vec<_> = files_ending(".md")
        .into_iter()
        .filter(|path| path.starts_with("docs"))
        .map(|path| path.display().to_string())
        .filter(|path| !readme.contains(path))
        .collect();
    none(&findings, "README.md links to every page");
}

/// The tests that a line of docs/semantics.md names: `file.rs` followed by `test_name`s, each in
/// back-quotes.
fn named_tests(line: &str) -> Vec<(String, String)> {
    let mut file = None;
    let mut tests = Vec::new();
    for quoted in line.split('`').skip(1).step_by(2) {
        if quoted.starts_with("crates/") && quoted.ends_with(".rs") {
            file = Some(quoted.to_owned());
        } else if let Some(file) = &file {
            tests.push((file.clone(), quoted.to_owned()));
        }
    }
    tests
}

#[test]
fn every_promise_in_the_semantics_page_names_a_test_that_exists() {
    let page = text("docs/semantics.md");
    let mut findings = Vec::new();
    let mut promises = 0;
    // A promise is a list item; its lines after the first are indented.
    let mut items: Vec<String> = Vec::new();
    for line in page.lines() {
        if line.starts_with("- ") {
            items.push(line.to_owned());
        } else if line.starts_with("  ") {
            let item = items
                .last_mut()
                .expect("an indented line belongs to an item");
            item.push(' ');
            item.push_str(line.trim());
        }
    }
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    for item in items {
        promises += 1;
        let tests = named_tests(&item);
        if tests.is_empty() {
            findings.push(format!("no test is named: {item}"));
        }
        for (file, test) in tests {
            if !root().join(&file).is_file() {
                findings.push(format!("{file} (named for {test}) doesn't exist"));
                continue;
            }
            let source = sources.entry(file.clone()).or_insert_with(|| text(&file));
            if !source.contains(&format!("fn {test}(")) {
                findings.push(format!("{file} has no test {test}"));
            }
        }
    }
    none(&findings, "each promise is proven");
    assert!(promises >= 20, "only {promises} promises were found");
}

#[test]
fn the_commands_that_the_docs_tell_to_type_exist() {
    let makefile = text("Makefile");
    let is_target = |word: &str| {
        makefile
            .lines()
            .any(|line| line.starts_with(&format!("{word}:")))
    };
    let mut findings = Vec::new();
    for path in files_ending(".md") {
        let source = text(&path);
        for command in source.split("`make ").skip(1) {
            let word: String = command
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '-')
                .collect();
            if !is_target(&word) {
                findings.push(format!("{}: make {word}", path.display()));
            }
        }
        for command in source.split("`scripts/").skip(1) {
            let word: String = command
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || ['-', '.'].contains(c))
                .collect();
            if !root().join("scripts").join(&word).is_file() {
                findings.push(format!("{}: scripts/{word}", path.display()));
            }
        }
    }
    none(&findings, "commands in the docs exist");
}

/// grep ends at its first hit; under pipefail the program before it is then a failure (SIGPIPE).
#[test]
fn no_script_pipes_into_a_grep_that_ends_early() {
    let mut findings = Vec::new();
    for folder in ["scripts", "tests/vm", ".ci", "bench"] {
        let entries = fs::read_dir(root().join(folder)).into_iter().flatten();
        for path in entries.flatten().map(|entry| entry.path()) {
            let Ok(source) = fs::read_to_string(&path) else {
                continue;
            };
            let is_bad = |line: &&str| {
                let code = line.split('#').next().unwrap_or_default();
                code.contains("| grep -q")
            };
            if source.contains("pipefail") {
                let bad = source.lines().filter(is_bad);
                findings.extend(bad.map(|line| format!("{}: {line}", path.display())));
            }
        }
    }
    none(&findings, "no pipe into a program that ends early");
}
