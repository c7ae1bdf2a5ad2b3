//! Checks what readers read: the page of the config's keys, and the words of docs and messages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::{files, none, root, text};

/// The keys in the tables of a page's section, first column.
fn keys_in_section(page: &str, heading: &str) -> BTreeSet<String> {
    let lines = page.lines().skip_while(|line| *line != heading).skip(1);
    let rows = lines
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    rows.map(str::to_owned).collect()
}

/// The program itself lists the keys that it knows, where a config has one that it does not know.
#[test]
fn config_page_has_every_key_of_the_config_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("sprat.toml");
    let unknown = "zzzzqq = 1\n[container.a]\nzzzzqq = 1\n[job.a]\nzzzzqq = 1\n\
                   [notify]\nzzzzqq = 1\n[watch.a]\nzzzzqq = 1\n";
    fs::write(&config, unknown).unwrap();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_sprat"))
        .args(["status", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let said = String::from_utf8(ran.stderr).unwrap();
    let page = text("docs/config.md");
    for (place, heading) in [
        ("at the top of the file", "## At the top"),
        ("in [container.a]", "## `[container.NAME]`"),
        ("in [job.a]", "## `[job.NAME]`"),
        ("in [notify]", "## `[notify]`"),
        ("in [watch.a]", "## `[watch.NAME]`"),
    ] {
        let (_, rest) = said
            .split_once(&format!("unknown setting `zzzzqq` {place}; known are "))
            .unwrap_or_else(|| panic!("no list of keys {place}: {said}"));
        let known: BTreeSet<String> = rest
            .lines()
            .next()
            .unwrap_or_default()
            .split(", ")
            .map(str::to_owned)
            .collect();
        assert_eq!(keys_in_section(&page, heading), known, "{heading}");
    }
}

#[test]
fn every_file_that_a_page_names_exists() {
    let mut findings = Vec::new();
    for path in files() {
        if path.extension().is_none_or(|end| end != "md") || path.ends_with("CHANGELOG.md") {
            continue;
        }
        for quoted in text(&path).split('`').skip(1).step_by(2) {
            let is_pattern = quoted.contains(['*', '<', ' ', '\n']);
            if quoted.starts_with("crates/") && !is_pattern && !root().join(quoted).exists() {
                findings.push(format!("{}: {quoted}", path.display()));
            }
        }
    }
    none(&findings, "pages name files that exist");
}

/// Words of a dialect that readers had to learn. docs/glossary.md has the words to use.
const DIALECT: &str = "tells, told, telling, look, looks, looked, looking, anew, whoever, settle, \
    settles, settled, unsettled, crew, besides, surely, suspects, hears, dear, lengthen, lengthens, \
    lengthened, wholeness, nobody any more, without a word, lost line, lost lines, \
    line is lost, line that is lost, lines are lost, line is away, slow line, over the line, \
    on the line, cross the line, crosses the line";

/// The files and folders whose text is plain: Markdown, and the string literals of Rust code.
const PLAIN: [&str; 12] = [
    "README.md",
    "CONTRIBUTING.md",
    "docs",
    "crates/cli/src",
    "crates/run/src",
    "crates/session/src",
    "crates/inside/src",
    "crates/snapshot/src",
    "crates/attach/src",
    "crates/luks/src",
    "crates/volume/src",
    "crates/store/src",
];

/// A shell's script, with words of its own, and the names of files in the state folder.
const EXEMPT: [&str; 2] = [
    "crates/store/src/sftp/punch.rs",
    "crates/session/src/state/paths.rs",
];

/// The prose of a Markdown text by lines: without fenced blocks, code in back-quotes, and the
/// tables that `make bench` writes.
fn prose(markdown: &str) -> Vec<String> {
    // The name of a page, in links.
    let markdown = markdown.replace("look-inside.md", "");
    let (mut fenced, mut generated) = (false, false);
    let mut lines = Vec::new();
    for line in markdown.lines() {
        fenced ^= line.trim_start().starts_with("```");
        if line.starts_with("<!-- ") {
            generated = line.contains("written by");
        }
        let skipped = fenced || generated;
        let kept = line.split('`').step_by(2).collect::<Vec<_>>().join(" ");
        lines.push(if skipped { String::new() } else { kept });
    }
    lines
}

/// The string literals of Rust code, one entry for each line of the source; what stands in
/// back-quotes inside them is left out.
fn literals(source: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut quoted: Option<usize> = None; // inside a literal: how many `#` end it
    let mut code = false; // inside back-quotes of a literal
    let mut chars = source.chars().peekable();
    let mut hashes = 0;
    while let Some(c) = chars.next() {
        if c == '\n' {
            lines.push(String::new());
            hashes = 0;
            continue;
        }
        match (quoted, c) {
            (None, '/') if chars.peek() == Some(&'/') => {
                while chars.peek().is_some_and(|c| *c != '\n') {
                    chars.next();
                }
            }
            // A character: neither `'"'` nor `'\"'` opens a literal.
            (None, '\'') if chars.peek() == Some(&'\\') => {
                chars.next();
                chars.next();
            }
            (None, '\'') if chars.peek() == Some(&'"') => {
                chars.next();
            }
            (None, '#') => hashes += 1,
            (None, '"') => (quoted, code) = (Some(hashes), false),
            (None, _) => hashes = 0,
            (Some(0), '\\') => {
                if chars.peek().is_some_and(|c| *c != '\n') {
                    chars.next();
                }
            }
            (Some(ends), '"') => {
                let mut found = 0;
                while found < ends && chars.peek() == Some(&'#') {
                    chars.next();
                    found += 1;
                }
                if found == ends {
                    (quoted, hashes) = (None, 0);
                    lines.last_mut().expect("one line at least").push(' ');
                }
            }
            (Some(_), '`') => code = !code,
            // What is put in by `format!`.
            (Some(_), '{') if !code => while chars.next_if(|c| *c != '}' && *c != '"').is_some() {},
            (Some(_), c) if !code => lines.last_mut().expect("one line at least").push(c),
            (Some(_), _) => {}
        }
    }
    lines
}

/// The words of the dialect in a line.
fn dialect_in(line: &str) -> Vec<&'static str> {
    let lower = line.to_lowercase();
    let words: Vec<_> = lower
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .collect();
    // Between blanks, so that only whole words are found.
    let spaced = format!(" {} ", words.join(" "));
    let found = |word: &&str| spaced.contains(&format!(" {word} "));
    DIALECT.split(", ").filter(found).collect()
}

#[test]
fn text_for_readers_has_no_word_of_a_dialect() {
    let mut findings = Vec::new();
    for path in files() {
        let is_plain = PLAIN.iter().any(|plain| path.starts_with(plain));
        if !is_plain || EXEMPT.iter().any(|exempt| path.ends_with(exempt)) {
            continue;
        }
        let lines = match path.extension().and_then(|end| end.to_str()) {
            Some("md") => prose(&text(&path)),
            Some("rs") => literals(&text(&path)),
            _ => continue,
        };
        for (number, line) in lines.iter().enumerate() {
            for word in dialect_in(line) {
                findings.push(format!("{}:{}: {word:?}", path.display(), number + 1));
            }
        }
    }
    none(&findings, "plain words, as in docs/glossary.md");
}

/// The help of a command, and the names of the commands that it lists.
fn help(command: &[&str]) -> (String, Vec<String>) {
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_sprat"))
        .args(command)
        .arg("--help")
        .output()
        .unwrap();
    let help = String::from_utf8(ran.stdout).unwrap();
    let named = help
        .lines()
        .take_while(|line| !["Options:", "Exit codes:"].contains(line))
        .filter(|line| {
            let name = line.strip_prefix("  ").unwrap_or_default();
            name.starts_with(|c: char| c.is_ascii_lowercase()) && name.contains("  ")
        })
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect();
    (help, named)
}

/// The help of every command, by its words; the first one is that of sprat itself.
fn all_helps() -> Vec<(String, String)> {
    let (top, commands) = help(&[]);
    let mut pages = vec![(String::new(), top)];
    for command in &commands {
        let (page, below) = help(&[command]);
        pages.push((command.clone(), page));
        for name in below {
            pages.push((format!("{command} {name}"), help(&[command, &name]).0));
        }
    }
    assert!(pages.len() > 20, "{} pages", pages.len());
    pages
}

#[test]
fn help_has_no_word_of_a_dialect() {
    let mut findings = Vec::new();
    for (command, page) in all_helps() {
        for line in page.lines() {
            let found = dialect_in(line);
            findings.extend(
                found
                    .iter()
                    .map(|word| format!("{command}: {word:?}: {line}")),
            );
        }
    }
    none(&findings, "plain words in help");
}

/// Options that `code`, a command line of sprat in a page, has and that command does not. `global`: what every command
/// has. `Err`: there is no such command.
fn unknown_options(
    code: &str,
    helps: &BTreeMap<String, String>,
    global: &str,
) -> Result<Vec<String>, String> {
    let is_word = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    let mut words = code.split_whitespace().skip(1);
    let command = words
        .next()
        .filter(is_word)
        .filter(|word| !word.starts_with('-'));
    let below = words.next().filter(is_word);
    let name = command.unwrap_or_default().to_owned();
    let long = format!("{name} {}", below.unwrap_or_default());
    let has_commands = helps.keys().any(|one| one.starts_with(&format!("{name} ")));
    let page = helps.get(&long).or_else(|| {
        let is_whole = !has_commands || below.is_none();
        helps.get(&name).filter(|_| is_whole)
    });
    let page = page.ok_or(long)?;
    let options = code
        .split(|c: char| !c.is_ascii_lowercase() && c != '-')
        .filter(|word| word.len() > 2 && word.starts_with("--"));
    let unknown = options.filter(|option| !page.contains(option) && !global.contains(option));
    Ok(unknown.map(str::to_owned).collect())
}

#[test]
fn pages_name_commands_and_options_that_exist() {
    let helps: BTreeMap<_, _> = all_helps().into_iter().collect();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_sprat"))
        .args(["help", "options"])
        .output()
        .unwrap();
    let global = String::from_utf8(ran.stdout).unwrap() + &helps[""];
    let (mut count, mut findings) = (0, Vec::new());
    for path in files() {
        let is_page = path.starts_with("docs") || path.ends_with("README.md");
        if !is_page || path.extension().is_none_or(|end| end != "md") {
            continue;
        }
        for (number, line) in text(&path).lines().enumerate() {
            let quoted = line.split('`').skip(1).step_by(2).chain([line]);
            for code in quoted.filter(|code| code.starts_with("sprat ")) {
                // Prose of a page that begins a line.
                let is_command = code != line || line.starts_with("sprat --");
                let named = code.split(' ').nth(1).unwrap_or_default();
                let is_hidden = line.contains(&format!("`{code}` (hidden)"));
                if !is_command && !helps.contains_key(named) || named == "help" || is_hidden {
                    continue;
                }
                count += 1;
                let at = format!("{}:{}: {code}", path.display(), number + 1);
                match unknown_options(code, &helps, &global) {
                    Err(name) => findings.push(format!("{at}: there is no command {name}")),
                    Ok(unknown) => {
                        findings.extend(unknown.iter().map(|option| format!("{at}: {option}")));
                    }
                }
            }
        }
    }
    assert!(count > 150, "{count} command lines");
    none(&findings, "pages name commands and options that exist");
}
