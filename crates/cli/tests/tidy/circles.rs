//! Rejects import circles: files of a crate that use each other, directly or through others.
//!
//! Read are the `use` lines. A name that a module re-exports counts for the file that defines it, and a
//! module may use the modules above it: so a file that is split into a folder is no circle.

use std::collections::{BTreeMap, BTreeSet};

use crate::{files_ending, map, none, text};

/// Circles that are accepted: a crate, one of the files, and the reason. At most three.
const ACCEPTED: [(&str, &str, &str); 1] = [(
    "store",
    "sftp::session",
    "a session owns its further connections; their threads log in with it and open its files again",
)];

/// A module's path in its crate: the names from the root.
type Module = Vec<String>;

/// What a file imports, and what it re-exports.
#[derive(Default)]
struct Imports {
    uses: Vec<String>,
    reexports: Vec<String>,
}

/// The module of a file below `src`: `a/b.rs` and `a/b/mod.rs` are `a::b`.
fn module_of(file: &str) -> Module {
    let file = file.trim_end_matches(".rs");
    let mut names: Module = file.split('/').map(str::to_owned).collect();
    if matches!(names.last().map(String::as_str), Some("mod" | "lib")) {
        names.pop();
    }
    names
}

/// `a::{b, c::{d, e}}` is `a::b`, `a::c::d` and `a::c::e`.
fn expand(path: &str) -> Vec<String> {
    let path = path.trim();
    let Some((head, rest)) = path.split_once('{') else {
        return vec![path.split(" as ").next().unwrap_or(path).trim().to_owned()];
    };
    let inner = rest.trim_end().strip_suffix('}').unwrap_or(rest);
    let mut parts = vec![String::new()];
    let mut depth = 0_usize;
    for c in inner.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if c == ',' && depth == 0 {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    let expanded = parts.flat_map(|part| expand(part));
    expanded
        .map(|end| format!("{}{end}", head.trim()))
        .collect()
}

fn imports(source: &str) -> Imports {
    let code = source.split("#[cfg(test)]\nmod ").next().unwrap_or(source);
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line));
    let code = lines.collect::<Vec<_>>().join(" ");
    let mut found = Imports::default();
    for statement in code.split(';') {
        // A statement may follow attributes, braces and others without a semicolon.
        let Some((before, path)) = statement.rsplit_once("use ") else {
            continue;
        };
        if before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let before = before.trim_end();
        let is_reexport =
            before.ends_with("pub") || before.ends_with(')') && before.contains("pub(");
        let list = if is_reexport {
            &mut found.reexports
        } else {
            &mut found.uses
        };
        list.extend(expand(path));
    }
    found
}

struct Crate {
    modules: BTreeMap<Module, Imports>,
}

impl Crate {
    fn read(name: &str) -> Self {
        let folder = format!("crates/{name}/src/");
        let mut modules = BTreeMap::new();
        for path in files_ending(".rs") {
            let shown = path.to_string_lossy().into_owned();
            let Some(file) = shown.strip_prefix(&folder) else {
                continue;
            };
            let is_test = file.ends_with("tests.rs") || file.contains("tests/");
            if !is_test && file != "main.rs" {
                modules.insert(module_of(file), imports(&text(&path)));
            }
        }
        Self { modules }
    }

    /// The module that defines what `path` names in `module`; `None` for what is not of this crate.
    fn resolve(&self, module: &[String], path: &str, depth: usize) -> Option<Module> {
        let mut names = path.split("::").map(str::trim).peekable();
        let mut at = match *names.peek()? {
            "crate" => {
                names.next();
                Module::new()
            }
            "self" => {
                names.next();
                module.to_vec()
            }
            "super" => {
                let mut at = module.to_vec();
                while names.next_if_eq(&"super").is_some() {
                    at.pop();
                }
                at
            }
            first => {
                let child = [module, &[first.to_owned()]].concat();
                self.modules.get(&child)?;
                module.to_vec()
            }
        };
        while let Some(name) = names.peek() {
            let child = [&at[..], &[(*name).to_owned()]].concat();
            if !self.modules.contains_key(&child) {
                break;
            }
            at = child;
            names.next();
        }
        let (Some(item), true) = (names.next(), depth < 8) else {
            return Some(at);
        };
        let reexports = &self.modules.get(&at)?.reexports;
        let from = reexports
            .iter()
            .find(|from| from.rsplit("::").next() == Some(item));
        let defined = from.and_then(|from| self.resolve(&at, from, depth + 1));
        Some(defined.unwrap_or(at))
    }

    /// The modules that each module uses, without those above it.
    fn edges(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let used = |(module, imports): (&Module, &Imports)| -> BTreeSet<Module> {
            let used = imports.uses.iter();
            let used = used.filter_map(|path| self.resolve(module, path, 0));
            used.filter(|used| !module.starts_with(used)).collect()
        };
        let modules = self.modules.iter();
        modules
            .map(|(module, imports)| (module, used((module, imports))))
            .collect()
    }
}

/// The modules that `from` uses, directly or through others.
fn reached(edges: &BTreeMap<&Module, BTreeSet<Module>>, from: &Module) -> BTreeSet<Module> {
    let mut found = BTreeSet::new();
    let mut left = vec![from.clone()];
    while let Some(module) = left.pop() {
        for used in edges.get(&module).into_iter().flatten() {
            if found.insert(used.clone()) {
                left.push(used.clone());
            }
        }
    }
    found
}

#[test]
fn no_file_uses_a_file_that_uses_it() {
    const { assert!(ACCEPTED.len() <= 3, "a fourth exception is one too many") };
    let mut findings = Vec::new();
    for (name, _) in map() {
        let read = Crate::read(&name);
        let edges = read.edges();
        let reached: BTreeMap<_, _> = edges
            .keys()
            .map(|from| (*from, reached(&edges, from)))
            .collect();
        let mut seen = BTreeSet::new();
        for module in read
            .modules
            .keys()
            .filter(|module| reached[module].contains(*module))
        {
            let of_circle = reached[module].iter();
            let circle: BTreeSet<_> = of_circle
                .filter(|other| reached[other].contains(module))
                .collect();
            let shown: Vec<_> = circle.iter().map(|module| module.join("::")).collect();
            let is_accepted = ACCEPTED
                .iter()
                .any(|(of, file, _)| *of == name && shown.iter().any(|shown| shown == file));
            if seen.insert(shown.clone()) && !is_accepted {
                findings.push(format!("{name}: {}", shown.join(" <-> ")));
            }
        }
    }
    none(&findings, "files use each other in one direction");
}

#[test]
fn imports_are_read_with_braces_reexports_and_attributes() {
    let source = "//! Uses nothing; really.\n#[cfg(x)]\nuse crate::a::{B, c::{D, E as F}};\n\
                  pub(crate) use super::g::H;\nfn use_it() { use self::i::J; }\n";
    let found = imports(source);
    assert_eq!(
        found.uses,
        [
            "crate::a::B",
            "crate::a::c::D",
            "crate::a::c::E",
            "self::i::J"
        ]
    );
    assert_eq!(found.reexports, ["super::g::H"]);
}
